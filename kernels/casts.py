"""A cast that the compiler does worse by itself."""

import triton
import triton.language as tl


@triton.jit
def widen(x, ACC: tl.constexpr):
    """x in ACC, the accumulation dtype, any shape. bf16 to fp32 as a shift: one instruction, not 1.5."""
    if x.dtype.is_bf16() and tl.float32 == ACC:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(ACC)

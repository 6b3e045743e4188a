"""The channel MLP with PyTorch's products (cuBLAS, hipBLASLt), where ``configs.Library.ATEN`` was chosen.

What the fused kernels do inside a product takes passes here. With u the bytes of one activation and e those
of the hidden, 4 u where E = 4 C, fc1 moves 2 u and 2 e more than its kernel (n is written and read, p is
written and read), or with p kept for the backward 2 u and 1 e more; fc2 moves 2 u more (o is written and
read). The roundings are eager PyTorch's: n, p and o, to the products' dtype, each with its bias added before;
only the scaled branch is not rounded by itself.

A residual as the product's own addend (``addmm`` with beta = 1) would save none of this: PyTorch copies it
to the output first. It would cost a rounding where there is a bias, which has to be in the addend already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer.configs import cdiv, next_power_of_2
from fastmixer.ops.launch import Call, Context, accumulator, activation_constants, empty_hidden, kernels, run
from fastmixer.ops.layouts import PackedLinear
from fastmixer.ops.passes import dense


def fc1(call: Call, packed: PackedLinear, x: Tensor, moments: Tensor, p: Tensor | None = None) -> Tensor:
    """gelu(fc1(LN(x))) of x (B, S, C), any strides: the hidden (B * S, E), rows padded.

    p: laid out as the hidden; filled with the pre-activation if given.
    """
    E, dtype = call.problem.hidden, call.problem.dtype
    M = x.shape[0] * x.shape[1]
    n = dense(call, x, moments=moments).flatten(0, 1)
    product = empty_hidden(M, E, dtype, x.device) if p is None else p
    _linear(n, packed.weight, call.params.fc1_bias, product[:, :E])
    del n  # before the hidden needs memory
    g = product if p is None else torch.empty_like(p)
    rows, block_n = _tile(E, call.context)
    run(
        call.context, kernels().gelu_fwd, cdiv(M, rows) * cdiv(E, block_n),
        p_ptr=product, g_ptr=g, M=M, N=E, stride_m=g.stride(0),
        **activation_constants(call.params, dtype), ROWS=rows, BLOCK_N=block_n,
    )  # fmt: skip
    return g


def fc2(call: Call, packed: PackedLinear, g: Tensor, x: Tensor) -> Tensor:
    """x + scale * fc2(g), contiguous, for x (B, R, C), any strides, and g (B * R, E), rows maybe padded."""
    B, R, C = x.shape
    dtype = call.problem.dtype
    o = torch.empty((B, R, C), dtype=dtype, device=x.device)
    _linear(g[:, : call.problem.hidden], packed.weight, call.params.fc2_bias, o.view(B * R, C))
    y = o if x.dtype == dtype else torch.empty((B, R, C), dtype=x.dtype, device=x.device)
    rows, block_c = _tile(C, call.context)
    run(
        call.context, kernels().residual_fwd, cdiv(B * R, rows) * cdiv(C, block_c),
        x_ptr=x, o_ptr=o, scale_ptr=call.scale, y_ptr=y, B=B, S=R, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ACC=accumulator(dtype), ROWS=rows, BLOCK_C=block_c,
    )  # fmt: skip
    return y


def _linear(a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = a W^T + b with the bias in out's dtype; the rows of W may be padded beyond those of a.

    Into ``out``: that form autocast leaves alone, and rows may be padded.
    """
    weight = weight[:, : a.shape[1]].t()
    if bias is None:
        torch.mm(a, weight, out=out)
    else:
        torch.addmm(bias.to(out.dtype), a, weight, out=out)


def _tile(columns: int, context: Context) -> tuple[int, int]:
    """Rows and columns of a program: 16 elements per thread are two 16-byte loads in 16 bits."""
    block = min(next_power_of_2(columns), 1024)
    return (256 if context.target.backend == "interpreter" else max(1, 2048 // block)), block

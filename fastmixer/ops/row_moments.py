"""Row moments: the LayerNorm statistics of every token, one tensor (NUM_BLOCKS, 2, T), T = B * S.

In the accumulation dtype: mean and centred sum of squares of each row over each block of its C channels.
Blocks are powers of two wide, the last maybe ragged: so their width follows from their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer.configs import cdiv, next_power_of_2
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Context, accumulator, kernels, pass_tile, run


def row_moments(x: Tensor, context: Context) -> Tensor:
    """The moments (1, 2, T) of the rows of x (B, S, C), any strides."""
    B, S, C = x.shape
    moments = torch.empty((1, 2, B * S), dtype=accumulate_dtype(x.dtype), device=x.device)
    # Short rows per program: reductions stay inside a warp, and fewer lanes are masked (compiled: NOTES.md).
    rows, block_c = pass_tile(C, context, 1024 if context.target.backend == "interpreter" else 256)
    run(
        context, kernels().row_moments, cdiv(B * S, rows),
        x_ptr=x, moments_ptr=moments, T=B * S, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ROWS=rows, BLOCK_C=block_c, ACC=accumulator(x.dtype),
    )  # fmt: skip
    return moments


def joined(moments: Tensor, channels: int, context: Context) -> Tensor:
    """The same moments in one block, (1, 2, T): the shape that a trace knows, whatever tile made them."""
    blocks, _, T = moments.shape
    if blocks == 1:
        return moments
    out = moments.new_empty((1, 2, T))
    rows = max(1, 1024 // next_power_of_2(blocks))
    run(
        context, kernels().join_moments, cdiv(T, rows),
        moments_ptr=moments, joined_ptr=out, T=T, C=channels, ROWS=rows,
        **moments_constants(moments, channels),
    )  # fmt: skip
    return out


def moments_constants(moments: Tensor | None, channels: int) -> dict[str, int]:
    """The constexprs by which a kernel reads moments; None: it reads none."""
    blocks = 1 if moments is None else moments.shape[0]
    width = channels if blocks == 1 else next_power_of_2(cdiv(channels, blocks))
    return {"COUNT": width, "NUM_BLOCKS": blocks, "NUM_BLOCKS_POW2": next_power_of_2(blocks)}

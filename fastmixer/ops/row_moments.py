"""Row moments: the LayerNorm statistics of every token, in the format of ``kernels/row_moments.py``.

Moments are one tensor (NUM_BLOCKS, 2, T) in the accumulation dtype, T = B * S: mean and centred sum of
squares of each row over each block of its C channels. Blocks are powers of two wide, the last maybe ragged:
so their width follows from their number. A single block has all channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer.configs import cdiv, next_power_of_2
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Context, kernels, run


def row_moments(x: Tensor, context: Context) -> Tensor:
    """The moments (1, 2, T) of the rows of x (B, S, C), any strides."""
    B, S, C = x.shape
    acc = accumulate_dtype(x.dtype)
    moments = torch.empty((1, 2, B * S), dtype=acc, device=x.device)
    interpreted = context.target.backend == "interpreter"
    # Short rows per program: reductions stay inside a warp, and fewer lanes are masked (compiled: NOTES.md).
    block_c = min(next_power_of_2(C), 1024 if interpreted else 256)
    rows = 256 if interpreted else 2048 // block_c
    run(
        context, kernels().row_moments, cdiv(B * S, rows),
        x_ptr=x, moments_ptr=moments, T=B * S, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ROWS=rows, BLOCK_C=block_c, ACC=kernels().dtype[acc],
    )  # fmt: skip
    return moments


def joined(moments: Tensor, channels: int, context: Context) -> Tensor:
    """The same moments in one block, (1, 2, T): the shape that a trace knows, whatever tile made them."""
    if moments.shape[0] == 1:
        return moments
    T = moments.shape[2]
    out = torch.empty((1, 2, T), dtype=moments.dtype, device=moments.device)
    rows = max(1, 1024 // next_power_of_2(moments.shape[0]))
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
    return {"COUNT": width, "NUM_BLOCKS": blocks, "NUM_BLOCKS_P2": next_power_of_2(blocks)}

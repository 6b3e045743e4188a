"""Host side of the backward's passes around the products: dense operands before, LayerNorm after."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import configs
from .configs import Problem, TileConfig, next_power_of_2, round_up
from .half import Half
from .launch import Context, Moments, accumulator, kernels, run, sample_scale, with_dense_vectors

if TYPE_CHECKING:
    from .launch_backward import Needs


def dense_half(half: Half, g: Tensor, dtype: torch.dtype) -> Half:
    """The half with dense vectors, and with the residual scale as the kernels read it: made once."""
    scale = sample_scale(half, g.shape[0], dtype, g.device)
    return with_dense_vectors(half)._replace(residual_scale=scale)


def dense(
    x: Tensor,
    problem: Problem,
    context: Context,
    *,
    half: Half | None = None,
    moments: Moments | None = None,
    scale: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """LN(x) with ``half``'s parameters if x's ``moments`` are given, times ``scale``; in the products' dtype.

    x: (B, S, C), any strides; the result is dense, (B, S, C) or transposed (B, C, S), with padded rows.
    """
    B, S, C, _, _, dtype = problem
    if transposed:
        padded = torch.empty((B, C, round_up(S, configs.ALIGNED)), dtype=dtype, device=x.device)
        out = padded[..., :S]
        y = out.transpose(1, 2)
    else:
        y = out = torch.empty((B, S, C), dtype=dtype, device=x.device)
    acc = kernels().dtype[accumulator(dtype)]
    op = "layer_norm_fwd_transposed" if transposed else "layer_norm_fwd"
    tiles = context.select(op, problem, context.target)
    blocks = 1 if moments is None else moments.values.shape[0]
    tiles_m = B * -(-S // tiles.block_m) if transposed else -(-B * S // tiles.block_m)
    run(
        context, kernels().layer_norm_fwd, tiles_m * -(-C // tiles.block_n), tiles,
        x_ptr=x, moments_ptr=None if moments is None else moments.values,
        gamma_ptr=half.norm_weight if half else None, beta_ptr=half.norm_bias if half else None,
        scale_ptr=scale, y_ptr=y, B=B, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        stride_yb=y.stride(0), stride_ys=y.stride(1), stride_yc=y.stride(2),
        PER_SAMPLE=transposed, EPS=half.eps if half else 0.0, COUNT=moments.count if moments else 1,
        NUM_BLOCKS=blocks, NUM_BLOCKS_P2=next_power_of_2(blocks), ACC=acc,
        ROWS=tiles.block_m, BLOCK_C=tiles.block_n,
    )  # fmt: skip
    return out


def branch_gradient(
    g: Tensor, half: Half, problem: Problem, context: Context, *, transposed: bool = False
) -> Tensor:
    """The gradient of what the MLP returns: g scaled, dense, in the products' dtype; maybe g itself."""
    scale = half.residual_scale
    if scale is None and not transposed and g.dtype == problem.dtype and g.is_contiguous():
        return g
    return dense(g, problem, context, scale=scale, transposed=transposed)


def finish(
    g: Tensor,
    x: Tensor | None,
    moments: Moments | None,
    dn: Tensor | None,
    half: Half,
    problem: Problem,
    context: Context,
    needs: Needs,
    *,
    of: str,
) -> dict[str, Tensor]:
    """What is left: the gradients of x, of LayerNorm's parameters and of fc2's bias."""
    if dn is None and not needs.fc2_bias:
        return {}
    B, S, C = g.shape
    acc = accumulator(problem.dtype)
    tiles = context.select("layer_norm_bwd", problem, context.target)
    programs = min(-(-B * S // tiles.block_m), _norm_programs(tiles, context))
    rows = round_up(-(-B * S // programs), tiles.block_m)
    programs = -(-B * S // rows)

    def sums(wanted: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=acc, device=g.device) if wanted else None

    dx = None
    if needs.x:  # in dn's place, whose rows are read before they are written
        dx = dn if dn.dtype == g.dtype else torch.empty((B, S, C), dtype=g.dtype, device=g.device)
    dgamma, dbeta = sums(needs.norm_weight, programs, C), sums(needs.norm_bias, programs, C)
    row_sums = sums(needs.fc2_bias and of == "token", B, S)
    column_sums = sums(needs.fc2_bias and of == "channel", programs, C)
    if dn is None:
        x = moments = None
    blocks = 1 if moments is None else moments.values.shape[0]
    strides = (0, 0, 0) if x is None else x.stride()
    run(
        context, kernels().layer_norm_bwd, programs, tiles,
        g_ptr=g, x_ptr=x, moments_ptr=None if moments is None else moments.values,
        gamma_ptr=half.norm_weight, dn_ptr=dn, scale_ptr=half.residual_scale,
        dx_ptr=dx, dgamma_ptr=dgamma, dbeta_ptr=dbeta, column_sums_ptr=column_sums, row_sums_ptr=row_sums,
        T=B * S, S=S, C=C, rows_a_program=rows,
        stride_gb=g.stride(0), stride_gs=g.stride(1), stride_gc=g.stride(2),
        stride_xb=strides[0], stride_xs=strides[1], stride_xc=strides[2],
        EPS=half.eps, COUNT=1 if moments is None else moments.count, NUM_BLOCKS=blocks,
        NUM_BLOCKS_P2=next_power_of_2(blocks), ACC=kernels().dtype[acc],
        ROWS=tiles.block_m, BLOCK_C=tiles.block_n,
    )  # fmt: skip
    found: dict[str, Tensor] = {}
    if dx is not None:
        found["x"] = dx
    if dgamma is not None:
        found["norm_weight"] = sum_partials(dgamma, half.norm_weight, context)
    if dbeta is not None:
        found["norm_bias"] = sum_partials(dbeta, half.norm_bias, context)
    if needs.fc2_bias:
        sums_of_g = row_sums if of == "token" else column_sums
        found["fc2_bias"] = sum_partials(sums_of_g, half.fc2_bias, context)
    return found


def _norm_programs(tiles: TileConfig, context: Context) -> int:
    """As many as are resident at once: each walks over its share of the rows."""
    return max(1, configs.NORM_WARPS // tiles.num_warps) * context.target.multiprocessors


def sum_partials(partials: Tensor, like: Tensor, context: Context, *, transposed: bool = False) -> Tensor:
    """The sum over the first axis of (P, ...), maybe transposed, cut to ``like``'s shape and in its dtype."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    matrix = out.unsqueeze(0) if out.dim() == 1 else out.t() if transposed else out
    partials = partials.view(partials.shape[0], -1, partials.shape[-1])
    N, K = matrix.shape
    block_p, block_n, block_k = configs.sum_tile(N, K, context.target)
    run(
        context, kernels().sum_partials, -(-N // block_n) * -(-K // block_k),
        partials_ptr=partials, out_ptr=out, P=partials.shape[0], N=N, K=K,
        stride_pp=partials.stride(0), stride_pn=partials.stride(1),
        stride_on=matrix.stride(0), stride_ok=matrix.stride(1),
        BLOCK_P=block_p, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return out

"""Host side of the forward: which launches make the two halves, with which tiles, grids and buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch_library, packing
from .configs import Library, Problem, TileConfig, next_power_of_2
from .half import Half
from .launch import (
    Context,
    Moments,
    PackedLinear,
    accumulator,
    empty_hidden,
    gelu_constants,
    kernels,
    piece_constants,
    problem_of,
    product_constants,
    row_moments,
    run,
    sample_scale,
    with_dense_vectors,
)


def token_mixing(
    x: Tensor, half: Half, dtype: torch.dtype, context: Context, moments: Moments | None = None
) -> tuple[Tensor, Moments]:
    """The token half of x (B, S, C), with products in ``dtype``; ``moments`` of x's rows, if known.

    Returns the output, contiguous, and its row moments.
    """
    half = with_dense_vectors(half)
    B, S, C = x.shape
    problem = problem_of(x, half, dtype)
    tiles = context.select("token_mixing", problem, context.target)
    packed = context.packed or packing.pack(packing.forward_layouts("token", half, problem, context), context)
    fc1, fc2 = packed["token_fc1"], packed["token_fc2"]
    moments = moments or row_moments(x, context)
    if tiles is None:
        return _token_mixing_two_pass(x, half, problem, moments, context, fc1, fc2)

    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    blocks = -(-C // tiles.block_m)
    y_moments = torch.empty((blocks, 2, B * S), dtype=accumulator(dtype), device=x.device)
    run(
        context, kernels().token_mixing, B * blocks, tiles,
        x_ptr=x, x_moments_ptr=moments.values, gamma_ptr=half.norm_weight, beta_ptr=half.norm_bias,
        w1_ptr=fc1.weight, b1_ptr=fc1.bias, w2_ptr=fc2.weight, b2_ptr=half.fc2_bias,
        scale_ptr=sample_scale(half, B, dtype, x.device), y_ptr=y, y_moments_ptr=y_moments,
        T=B * S, S=S, C=C, D=fc2.weight.shape[1],
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2), EPS=half.eps,
        BIAS_IN_PADDING=half.fc1_bias is not None and fc1.bias is None, **piece_constants(S),
        **gelu_constants(half, dtype, context.target), BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n,
    )  # fmt: skip
    return y, Moments(y_moments, tiles.block_m)


def _token_mixing_two_pass(
    x: Tensor,
    half: Half,
    problem: Problem,
    moments: Moments,
    context: Context,
    fc1: PackedLinear,
    fc2: PackedLinear,
) -> tuple[Tensor, Moments]:
    """Token mixing with the hidden (B, C, D) in memory: the MLP kernels on x's transposed strides."""
    B, S, C = x.shape
    rows = x.transpose(1, 2)  # (B, C, S), a view
    tiles = context.select("token_fc2", problem, context.target)
    blocks = -(-C // tiles.block_m)
    y_moments = torch.empty((blocks, 2, B * S), dtype=accumulator(problem.dtype), device=x.device)
    fc1_tiles = context.select("token_fc1", problem, context.target)
    g = _fc1(fc1, rows, half, problem, moments, context, fc1_tiles, norm=kernels().norm.COLUMN)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    _fc2(fc2, g, rows, y.transpose(1, 2), half, problem, context, tiles, y_moments)
    return y, Moments(y_moments, tiles.block_m)


def channel_mixing(
    x: Tensor,
    half: Half,
    dtype: torch.dtype,
    context: Context,
    moments: Moments | None = None,
    *,
    p: Tensor | None = None,
) -> Tensor:
    """The channel half of x (B, S, C), with products in ``dtype``; ``moments`` of x's rows, if known.

    p: an ``empty_hidden``, filled with the pre-activation if given.
    """
    half = with_dense_vectors(half)
    B, S, C = x.shape
    problem = problem_of(x, half, dtype)
    packed = context.packed or packing.pack(
        packing.forward_layouts("channel", half, problem, context), context
    )
    fc1, fc2 = packed["channel_fc1"], packed["channel_fc2"]
    moments = moments or row_moments(x, context)
    fc1_tiles, fc2_tiles = (
        context.select(op, problem, context.target) for op in ("channel_fc1", "channel_fc2")
    )
    rows = x
    if half.residual_scale is None and (B == 1 or x.stride(0) == S * x.stride(1)):
        # Samples of one row: no division, and no size of the compiled code depends on the batch.
        rows = x.as_strided((B * S, 1, C), (x.stride(1), x.stride(1), x.stride(2)))
    if fc1_tiles is Library.ATEN:
        g = launch_library.fc1(fc1, x, half, problem, moments, context, p)
    else:
        norm = kernels().norm.FOLD if fc1.rank1 is not None else kernels().norm.ROW
        g = _fc1(fc1, rows, half, problem, moments, context, fc1_tiles, norm=norm, p=p)
    if fc2_tiles is Library.ATEN:
        return launch_library.fc2(fc2, g, rows, half, problem, context).view(B, S, C)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    _fc2(fc2, g, rows, y.view(rows.shape), half, problem, context, fc2_tiles, None)
    return y


def _tiles(B: int, R: int, N: int, tiles: TileConfig, *, per_sample: bool) -> int:
    """Tiles of a (B * R, N) output; those of token mixing never straddle two samples."""
    tiles_m = B * -(-R // tiles.block_m) if per_sample else -(-B * R // tiles.block_m)
    return tiles_m * -(-N // tiles.block_n)


def _fc1(
    fc1: PackedLinear,
    x: Tensor,
    half: Half,
    problem: Problem,
    moments: Moments,
    context: Context,
    tiles: TileConfig,
    *,
    norm: int,
    p: Tensor | None = None,
) -> Tensor:
    """gelu(fc1(LN(x))) of x (B, R, K), any strides: the hidden (B * R, N), rows padded.

    p: laid out as the hidden; filled with the pre-activation if given.
    """
    B, R, K = x.shape
    N, dtype = problem.hidden, problem.dtype
    fold = norm == kernels().norm.FOLD
    g = empty_hidden(B * R, N, dtype, x.device)
    num_blocks = moments.values.shape[0]
    programs = _tiles(B, R, N, tiles, per_sample=norm == kernels().norm.COLUMN)
    run(
        context, kernels().fc1, programs, tiles,
        x_ptr=x, moments_ptr=moments.values,
        gamma_ptr=None if fold else half.norm_weight, beta_ptr=None if fold else half.norm_bias,
        w_ptr=fc1.weight, bias_ptr=fc1.bias, rank1_ptr=fc1.rank1, row_scale_ptr=fc1.scale, g_ptr=g, p_ptr=p,
        B=B, R=R, N=N, K=K, T=moments.values.shape[2],
        stride_xb=x.stride(0), stride_xr=x.stride(1), stride_xk=x.stride(2),
        stride_wn=fc1.weight.stride(0), stride_gm=g.stride(0), EPS=half.eps,
        COUNT=moments.count, NUM_BLOCKS=num_blocks, NUM_BLOCKS_P2=next_power_of_2(num_blocks), NORM=norm,
        **gelu_constants(half, dtype, context.target), EVEN_K=K % tiles.block_k == 0,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
    )  # fmt: skip
    return g


def _fc2(
    fc2: PackedLinear,
    g: Tensor,
    x: Tensor,
    y: Tensor,
    half: Half,
    problem: Problem,
    context: Context,
    tiles: TileConfig,
    y_moments: Tensor | None,
) -> None:
    """y = x + scale * fc2(g) for x, y (B, R, N), any strides; g (B * R, K). Fills y_moments if given."""
    B, R, N = x.shape
    K, dtype = problem.hidden, problem.dtype
    programs = _tiles(B, R, N, tiles, per_sample=y_moments is not None)
    run(
        context, kernels().fc2, programs, tiles,
        g_ptr=g, w_ptr=fc2.weight, bias_ptr=fc2.bias, scale_ptr=sample_scale(half, B, dtype, x.device),
        x_ptr=x, y_ptr=y, y_moments_ptr=y_moments,
        B=B, R=R, N=N, K=K, stride_gm=g.stride(0), stride_wn=fc2.weight.stride(0),
        stride_xb=x.stride(0), stride_xr=x.stride(1), stride_xn=x.stride(2),
        stride_yr=y.stride(1), stride_yn=y.stride(2),
        **product_constants(dtype, context.target), EVEN_K=K % tiles.block_k == 0,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
    )  # fmt: skip

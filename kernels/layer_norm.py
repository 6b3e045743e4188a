"""LayerNorm where it is a pass of its own, which is in training only.

Forward: n = LN(x) for the products of the backward, which read it several times. The same kernel without
statistics makes the other operand of those products: the output's gradient, scaled, dense and in their dtype.

Backward: finishes what the products left. With g the gradient of a half's output, k the residual scale,
dn the gradient of n, xh = (x - mean) * rstd and w = dn * gamma,

    dx = g + rstd * (w - mean_c(w) - xh * mean_c(w * xh))
    dgamma = sum dn * xh        dbeta = sum dn        d(fc2 bias) = sum k * g

with the means over a row. One program walks over many rows and keeps the column sums in registers.
"""

import triton
import triton.language as tl

from .mlp import _rows_of_tile
from .row_moments import merge_moments


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr,  # (B, S, C), strides (stride_xb, stride_xs, stride_xc)
    moments_ptr,  # (NUM_BLOCKS, 2, T) of x's rows, or None: x is taken as it is
    gamma_ptr,  # (C,) LayerNorm weight, contiguous, or None
    beta_ptr,  # (C,) LayerNorm bias, contiguous, or None
    scale_ptr,  # (B,) factor of each sample, accumulation dtype, or None
    y_ptr,  # (B, S, C), strides (stride_yb, stride_ys, stride_yc)
    B,
    S,
    C,
    stride_xb,
    stride_xs,
    stride_xc,
    stride_yb,
    stride_ys,
    stride_yc,
    PER_SAMPLE: tl.constexpr,  # tiles do not straddle samples: for a transposed y, whose tokens are contiguous
    EPS: tl.constexpr,
    COUNT: tl.constexpr,  # channels of a full block of moments
    NUM_BLOCKS: tl.constexpr,
    NUM_BLOCKS_P2: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = scale * LN(x), in y's dtype; grid (tiles * cdiv(C, BLOCK_C),).

    tiles is cdiv(B * S, ROWS), or PER_SAMPLE B * cdiv(S, ROWS).
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = tl.program_id(0) // blocks_c
    sample, s, exists = _rows_of_tile(tile, B, S, PER_SAMPLE, ONE_SAMPLE=False, BLOCK_M=ROWS)
    valid = exists[:, None] & (c < C)[None, :]  # (ROWS, BLOCK_C), like every tile
    c64 = c.to(tl.int64)[None, :]
    x_rows = x_ptr + sample * stride_xb + s * stride_xs
    y = tl.load(x_rows[:, None] + c64 * stride_xc, mask=valid, other=0.0).to(ACC)
    if moments_ptr is not None:
        row = sample * S + tl.minimum(s, S - 1)
        T = tl.cast(B, tl.int64) * S
        mean, rstd = merge_moments(moments_ptr, row, T, C, EPS, COUNT, NUM_BLOCKS, NUM_BLOCKS_P2)
        y = (y - mean[:, None]) * rstd[:, None]
        if gamma_ptr is not None:
            y *= tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
        if beta_ptr is not None:
            y += tl.load(beta_ptr + c, mask=c < C, other=0.0).to(ACC)[None, :]
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + sample)[:, None]
    y_rows = y_ptr + sample * stride_yb + s * stride_ys
    tl.store(y_rows[:, None] + c64 * stride_yc, y.to(y_ptr.dtype.element_ty), mask=valid)


@triton.jit
def _store_column_sums(
    sums_ptr,  # (programs, C)
    sums,  # (ROWS, BLOCK_C)
    C,
    BLOCK_C: tl.constexpr,
):
    c = tl.arange(0, BLOCK_C)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(sums, axis=0), mask=c < C)


@triton.jit
def _layer_norm_bwd_kernel(
    g_ptr,  # (B, S, C) gradient of the half's output, strides (stride_gb, stride_gs, stride_gc)
    x_ptr,  # (B, S, C) input of the half, strides (stride_xb, stride_xs, stride_xc); None without dn
    moments_ptr,  # (NUM_BLOCKS, 2, T) of x's rows; None without dn
    gamma_ptr,  # (C,) LayerNorm weight, contiguous, or None
    dn_ptr,  # (B, S, C) gradient of LN(x), contiguous, or None: only the sums of g are wanted
    scale_ptr,  # (B,) residual scale a sample, accumulation dtype, or None
    dx_ptr,  # (B, S, C), contiguous, or None: not wanted, like every output below
    dgamma_ptr,  # (programs, C) partial sums, accumulation dtype, or None
    dbeta_ptr,  # (programs, C) partial sums, accumulation dtype, or None
    column_sums_ptr,  # (programs, C) partial sums of scale * g over the rows, or None
    row_sums_ptr,  # (T,) sums of scale * g over the channels, or None
    T,  # rows, B * S
    S,
    C,
    rows_a_program,  # a multiple of ROWS
    stride_gb,
    stride_gs,
    stride_gc,
    stride_xb,
    stride_xs,
    stride_xc,
    EPS: tl.constexpr,
    COUNT: tl.constexpr,  # channels of a full block of moments
    NUM_BLOCKS: tl.constexpr,
    NUM_BLOCKS_P2: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least C
):
    """dx, and partial sums of the parameters' gradients; grid (cdiv(T, rows_a_program),)."""
    c = tl.arange(0, BLOCK_C)
    c64 = c.to(tl.int64)[None, :]
    gamma = tl.full((BLOCK_C,), 1.0, ACC)
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(ACC)
    # Summed over the rows once, at the end: a reduction across threads in every step would cost more.
    dgamma = tl.zeros((ROWS, BLOCK_C), ACC)
    dbeta = tl.zeros((ROWS, BLOCK_C), ACC)
    column_sums = tl.zeros((ROWS, BLOCK_C), ACC)

    first = tl.program_id(0).to(tl.int64) * rows_a_program
    for start in tl.range(0, rows_a_program, ROWS):
        row = first + start + tl.arange(0, ROWS)
        row_ok = row < T
        sample, s = row // S, row % S
        valid = row_ok[:, None] & (c < C)[None, :]  # (ROWS, BLOCK_C), like every tile below
        g_rows = g_ptr + sample * stride_gb + s * stride_gs
        g = tl.load(g_rows[:, None] + c64 * stride_gc, mask=valid, other=0.0).to(ACC)
        branch = g
        if scale_ptr is not None:
            branch = g * tl.load(scale_ptr + sample, mask=row_ok, other=0.0)[:, None]
        if column_sums_ptr is not None:
            column_sums += branch
        if row_sums_ptr is not None:
            tl.store(row_sums_ptr + row, tl.sum(branch, axis=1), mask=row_ok)
        if dn_ptr is not None:
            dn = tl.load(dn_ptr + row[:, None] * C + c64, mask=valid, other=0.0).to(ACC)
            x_rows = x_ptr + sample * stride_xb + s * stride_xs
            x = tl.load(x_rows[:, None] + c64 * stride_xc, mask=valid, other=0.0).to(ACC)
            mean, rstd = merge_moments(
                moments_ptr, tl.minimum(row, T - 1), T, C, EPS, COUNT, NUM_BLOCKS, NUM_BLOCKS_P2
            )
            xh = (x - mean[:, None]) * rstd[:, None]
            if dgamma_ptr is not None:
                dgamma += dn * xh  # dn is 0 where there is no element
            if dbeta_ptr is not None:
                dbeta += dn
            if dx_ptr is not None:
                w = dn * gamma[None, :]
                mean_w = tl.sum(w, axis=1) / C
                mean_wxh = tl.sum(w * xh, axis=1) / C
                dx = g + rstd[:, None] * (w - mean_w[:, None] - xh * mean_wxh[:, None])
                tl.store(dx_ptr + row[:, None] * C + c64, dx.to(dx_ptr.dtype.element_ty), mask=valid)

    if dgamma_ptr is not None:
        _store_column_sums(dgamma_ptr, dgamma, C, BLOCK_C)
    if dbeta_ptr is not None:
        _store_column_sums(dbeta_ptr, dbeta, C, BLOCK_C)
    if column_sums_ptr is not None:
        _store_column_sums(column_sums_ptr, column_sums, C, BLOCK_C)

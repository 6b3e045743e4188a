"""The two-pass MLP: fc1 with LayerNorm, bias and GELU; fc2 with bias, scale and residual.

Channel mixing uses it as it is: rows are tokens, K runs over channels. Token mixing of long sequences,
whose accumulators would not fit one program, uses the same kernels on the transposed *strides*: rows are
(sample, channel) pairs, K runs over tokens; nothing is copied.

                     rows R a sample    K of fc1, N of fc2    N of fc1, K of fc2    LayerNorm
    channel mixing   S                  C                     E                     FOLD or ROW
    token mixing     C                  S                     D                     COLUMN
"""

import triton
import triton.language as tl

from .activations import gelu
from .row_moments import merge_moments, tile_moments

# Where fc1 applies LayerNorm.
FOLD: tl.constexpr = tl.constexpr(0)  # in the epilogue: weights folded by packing, product on the raw x
ROW: tl.constexpr = tl.constexpr(1)  # on the operand, whose rows are tokens
COLUMN: tl.constexpr = tl.constexpr(2)  # on the operand, whose columns are tokens


@triton.jit
def _tile_of_program(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Tile coordinates, GROUP_M row tiles at a time so that neighbours share operands in L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first_m + within % height, within // height


@triton.jit
def _rows_of_tile(tile, B, R, PER_SAMPLE: tl.constexpr, ONE_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(sample, row within the sample, exists) of a tile's rows.

    PER_SAMPLE tiles never straddle two samples, at the price of a ragged last tile in each: rows beyond R
    do not exist and are to be masked. (Clamping them would hide from the compiler that rows are contiguous
    in memory there.) Otherwise rows beyond the last are clamped to it: readable, not to be stored.
    """
    m = tl.arange(0, BLOCK_M)
    if PER_SAMPLE:
        tiles = tl.cdiv(R, BLOCK_M)
        row = ((tile % tiles) * BLOCK_M + m).to(tl.int64)
        exists = row < R
        sample = tl.zeros_like(row) + tile // tiles
    else:
        row = tile.to(tl.int64) * BLOCK_M + m
        rows = tl.cast(B, tl.int64) * R
        exists = row < rows
        row = tl.minimum(row, rows - 1)
        if ONE_SAMPLE:
            sample = tl.zeros_like(row)
        else:
            sample = row // R
            row = row % R
    return sample, row, exists


@triton.jit
def _fc1_fwd_kernel(
    x_ptr,  # (B, R, K), strides (stride_xb, stride_xr, stride_xk)
    moments_ptr,  # (NUM_BLOCKS, 2, T) of x's tokens
    gamma_ptr,  # (C,) LayerNorm weight or None; unused by FOLD
    beta_ptr,  # (C,) LayerNorm bias or None; unused by FOLD
    w_ptr,  # (N, K) rows stride_wn apart, columns contiguous, compute dtype
    bias_ptr,  # (N,) or None; with FOLD W beta + b
    rank1_ptr,  # (N,) accumulation dtype: row sums of the folded weight; None unless FOLD
    g_ptr,  # (B * R, N) hidden, rows stride_gm apart, compute dtype
    B,
    R,
    N,
    K,
    T,  # tokens in all: B * R for FOLD and ROW, B * K for COLUMN
    stride_xb,
    stride_xr,
    stride_xk,
    stride_wn,
    stride_gm,
    EPS: tl.constexpr,
    COUNT: tl.constexpr,  # channels of a full block of moments
    NUM_BLOCKS: tl.constexpr,
    NUM_BLOCKS_P2: tl.constexpr,
    NORM: tl.constexpr,  # FOLD, ROW or COLUMN
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    ONE_SAMPLE: tl.constexpr,  # B == 1: also a batch whose rows are evenly spaced, given as one sample
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """g = gelu(LN(x) W^T + b); grid (tiles_m * cdiv(N, BLOCK_N),).

    tiles_m is cdiv(B * R, BLOCK_M), or for COLUMN B * cdiv(R, BLOCK_M): there a tile needs one sample's
    statistics.
    """
    DTYPE: tl.constexpr = w_ptr.dtype.element_ty
    PER_SAMPLE: tl.constexpr = NORM == COLUMN
    tiles_m = B * tl.cdiv(R, BLOCK_M) if PER_SAMPLE else tl.cdiv(B * R, BLOCK_M)
    tile_m, tile_n = _tile_of_program(tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    sample, row, row_ok = _rows_of_tile(tile_m, B, R, PER_SAMPLE, ONE_SAMPLE, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N

    if NORM == COLUMN:
        token0 = (tile_m // tl.cdiv(R, BLOCK_M)).to(tl.int64) * K  # first token of this sample
        if gamma_ptr is not None:
            gamma = tl.load(gamma_ptr + row, mask=row_ok, other=0.0).to(ACC)[:, None]
        if beta_ptr is not None:
            beta = tl.load(beta_ptr + row, mask=row_ok, other=0.0).to(ACC)[:, None]
    else:
        mean, rstd = merge_moments(moments_ptr, sample * R + row, T, K, EPS, COUNT, NUM_BLOCKS, NUM_BLOCKS_P2)

    x_rows = x_ptr + sample * stride_xb + row * stride_xr
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_ok = k < K
        x_tile = x_rows[:, None] + k.to(tl.int64)[None, :] * stride_xk  # (BLOCK_M, BLOCK_K)
        w_tile = w_rows[None, :] + k[:, None]  # (BLOCK_K, BLOCK_N)
        if PER_SAMPLE:
            x = tl.load(x_tile, mask=row_ok[:, None] & k_ok[None, :], other=0.0)
        elif EVEN_K:
            x = tl.load(x_tile)
        else:
            x = tl.load(x_tile, mask=k_ok[None, :], other=0.0)
        w = tl.load(w_tile) if EVEN_K else tl.load(w_tile, mask=k_ok[:, None], other=0.0)
        if NORM == ROW:
            x = (x.to(ACC) - mean[:, None]) * rstd[:, None]
            if gamma_ptr is not None:
                x *= tl.load(gamma_ptr + k, mask=k_ok, other=0.0).to(ACC)[None, :]
            if beta_ptr is not None:
                x += tl.load(beta_ptr + k, mask=k_ok, other=0.0).to(ACC)[None, :]
        if NORM == COLUMN:
            token = token0 + tl.minimum(k, K - 1)
            token_mean, token_rstd = merge_moments(
                moments_ptr, token, T, R, EPS, COUNT, NUM_BLOCKS, NUM_BLOCKS_P2
            )
            x = (x.to(ACC) - token_mean[None, :]) * token_rstd[None, :]
            if gamma_ptr is not None:
                x *= gamma
            if beta_ptr is not None:
                x += beta
        if not EVEN_K and NORM != FOLD:
            x = tl.where(k_ok[None, :], x, 0.0)  # the shift made the padding non-zero, or NaN
        acc = tl.dot(x.to(DTYPE), w, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)

    if NORM == FOLD:
        acc = (acc - mean[:, None] * tl.load(rank1_ptr + n, mask=n_ok, other=0.0)[None, :]) * rstd[:, None]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(ACC)[None, :]
    g = gelu(acc, APPROXIMATE, POLYNOMIAL).to(DTYPE)
    g_tile = g_ptr + (sample * R + row)[:, None] * stride_gm + n[None, :]
    tl.store(g_tile, g, mask=row_ok[:, None] & n_ok[None, :])


@triton.jit
def _column_halves(tile):
    """(M, N) -> two (M, N / 2): the left and the right columns. In an MMA accumulator nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _store_residual(
    acc,  # (BLOCK_M, COLUMNS)
    scale,  # (BLOCK_M,) or None
    bias_ptr,  # (N,) or None
    x_rows,  # (BLOCK_M,) pointers to the residual's rows
    y_rows,  # (BLOCK_M,) pointers to the output's rows
    y_moments_ptr,  # (cdiv(R, BLOCK_M), 2, B * N) or None
    row_ok,  # (BLOCK_M,)
    tile_m,
    first,  # first column
    B,
    R,
    N,
    stride_xn,
    stride_yn,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """y = x + scale * (acc + bias) for COLUMNS columns, and the moments of the rounded y if asked for."""
    n = first + tl.arange(0, COLUMNS)
    n_ok = n < N
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n_ok, other=0.0).to(ACC)[None, :]
    if scale is not None:
        acc *= scale[:, None]
    valid = row_ok[:, None] & n_ok[None, :]
    n64 = n.to(tl.int64)[None, :]
    x = tl.load(x_rows[:, None] + n64 * stride_xn, mask=valid, other=0.0)
    y = (x.to(ACC) + acc).to(y_rows.dtype.element_ty)
    tl.store(y_rows[:, None] + n64 * stride_yn, y, mask=valid)
    if y_moments_ptr is not None:
        tiles = tl.cdiv(R, BLOCK_M)
        block = tile_m % tiles
        count = tl.minimum(R - block * BLOCK_M, BLOCK_M).to(ACC)
        mean, sum_sq = tile_moments(y.to(ACC), valid, count, AXIS=0)
        tokens = tl.cast(B, tl.int64) * N
        token = (tile_m // tiles).to(tl.int64) * N + n
        y_moments_ptr += block * (2 * tokens)
        tl.store(y_moments_ptr + token, mean, mask=n_ok)
        tl.store(y_moments_ptr + tokens + token, sum_sq, mask=n_ok)


@triton.jit
def _fc2_fwd_kernel(
    g_ptr,  # (B * R, K) hidden, rows stride_gm apart, compute dtype
    w_ptr,  # (N, K) rows stride_wn apart, columns contiguous, compute dtype
    bias_ptr,  # (N,) or None
    scale_ptr,  # (B,) residual scale a sample, accumulation dtype, or None
    x_ptr,  # (B, R, N) residual, strides (stride_xb, stride_xr, stride_xn)
    y_ptr,  # (B, R, N), strides (R * N, stride_yr, stride_yn)
    y_moments_ptr,  # (cdiv(R, BLOCK_M), 2, B * N): moments of y over its rows, or None
    B,
    R,
    N,
    K,
    stride_gm,
    stride_wn,
    stride_xb,
    stride_xr,
    stride_xn,
    stride_yr,
    stride_yn,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    EVEN_K: tl.constexpr,
    ONE_SAMPLE: tl.constexpr,  # B == 1
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x + scale * (g W^T + b); grid (tiles_m * cdiv(N, BLOCK_N),).

    With y_moments_ptr (token mixing: rows are channels, columns tokens) tiles_m is B * cdiv(R, BLOCK_M),
    otherwise cdiv(B * R, BLOCK_M).
    """
    PER_SAMPLE: tl.constexpr = y_moments_ptr is not None
    tiles_m = B * tl.cdiv(R, BLOCK_M) if PER_SAMPLE else tl.cdiv(B * R, BLOCK_M)
    tile_m, tile_n = _tile_of_program(tiles_m, tl.cdiv(N, BLOCK_N), GROUP_M)
    sample, row, row_ok = _rows_of_tile(tile_m, B, R, PER_SAMPLE, ONE_SAMPLE, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    g_rows = g_ptr + (sample * R + tl.minimum(row, R - 1)) * stride_gm
    w_rows = w_ptr + tl.minimum(n, N - 1).to(tl.int64) * stride_wn
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        g_tile = g_rows[:, None] + k[None, :]  # (BLOCK_M, BLOCK_K)
        w_tile = w_rows[None, :] + k[:, None]  # (BLOCK_K, BLOCK_N)
        if EVEN_K:
            g = tl.load(g_tile)
            w = tl.load(w_tile)
        else:
            g = tl.load(g_tile, mask=(k < K)[None, :], other=0.0)
            w = tl.load(w_tile, mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(g, w, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)

    scale = None
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + sample)
    x_rows = x_ptr + sample * stride_xb + row * stride_xr
    y_rows = y_ptr + sample * (tl.cast(R, tl.int64) * N) + row * stride_yr
    # In two halves: the residual and its addresses do not fit beside a whole accumulator in registers.
    left, right = _column_halves(acc)
    HALF: tl.constexpr = BLOCK_N // 2
    first = tile_n * BLOCK_N
    _store_residual(
        left, scale, bias_ptr, x_rows, y_rows, y_moments_ptr, row_ok, tile_m, first, B, R, N,
        stride_xn, stride_yn, ACC, BLOCK_M, HALF,
    )  # fmt: skip
    _store_residual(
        right, scale, bias_ptr, x_rows, y_rows, y_moments_ptr, row_ok, tile_m, first + HALF, B, R, N,
        stride_xn, stride_yn, ACC, BLOCK_M, HALF,
    )  # fmt: skip

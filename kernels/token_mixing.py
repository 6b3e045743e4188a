"""Token mixing in one pass, for sequences of up to about 256 tokens.

Shaped like flash attention with channels as queries: the hidden H^T = n^T W1^T is the score matrix, GELU
the softmax, and Y^T += gelu(H^T) W2^T the value product. One program owns (one sample, BLOCK_C channels,
all tokens): it normalises its x tile once and walks over the hidden units, which never leave the chip.

The token axis is cut into at most three power-of-two pieces P0 >= P1 >= P2 (196 -> 128 + 64 + 16 = 208,
6% of padding) instead of the next power of two (256, 31%). P1 and P2 may be 0.
"""

import triton
import triton.language as tl

from .activations import gelu
from .row_moments import merge_moments, tile_moments


@triton.jit
def _normalised_piece(
    x_ptr,  # (S, C) of this sample, strides (stride_xs, stride_xc)
    moments_ptr,  # (1, 2, T)
    row,  # first row of this sample, int64
    c,  # (BLOCK_C,) int64 channel indices
    gamma,  # (BLOCK_C,) or None
    beta,  # (BLOCK_C,) or None
    S,
    C,
    T,
    stride_xs,
    stride_xc,
    EPS: tl.constexpr,
    START: tl.constexpr,
    PIECE: tl.constexpr,
    ONES_IN_PADDING: tl.constexpr,
    ACC: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """LN(x)^T for tokens [START, START + PIECE): a (BLOCK_C, PIECE) tile, zero beyond S."""
    s = START + tl.arange(0, PIECE)
    s_ok = s < S
    offsets = s.to(tl.int64)[:, None] * stride_xs + c[None, :] * stride_xc
    x = tl.load(x_ptr + offsets, mask=s_ok[:, None] & (c < C)[None, :], other=0.0).to(ACC)
    mean, rstd = merge_moments(
        moments_ptr, row + tl.minimum(s, S - 1), T, C, EPS, COUNT=1, NUM_BLOCKS=1, NUM_BLOCKS_P2=1
    )
    n = (x - mean[:, None]) * rstd[:, None]  # (PIECE, BLOCK_C)
    if gamma is not None:
        n = n * gamma[None, :]
    if beta is not None:
        n = n + beta[None, :]
    n = tl.where(s_ok[:, None], n, 0.0)
    if ONES_IN_PADDING:  # meets the bias that packing put into columns S and S + 1 of W1
        n = tl.where(((s == S) | (s == S + 1))[:, None], 1.0, n)
    return tl.trans(n.to(DTYPE))


@triton.jit
def _store_piece(
    acc,  # (BLOCK_C, PIECE), accumulation dtype
    x_ptr,  # (S, C) of this sample, strides (stride_xs, stride_xc)
    y_ptr,  # (S, C) of this sample, contiguous
    b2_ptr,  # (S,) or None
    y_moments_ptr,  # (2, T): this channel block's slice of the output's moments
    row,
    scale,
    c,  # (BLOCK_C,) int64
    count,  # channels of this block that exist, accumulation dtype
    S,
    C,
    T,
    stride_xs,
    stride_xc,
    START: tl.constexpr,
    PIECE: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = x + scale * (acc + b2) for tokens [START, START + PIECE), and the moments of the rounded y."""
    s = START + tl.arange(0, PIECE)
    s_ok = s < S
    valid = (c < C)[:, None] & s_ok[None, :]  # (BLOCK_C, PIECE)
    if b2_ptr is not None:
        acc += tl.load(b2_ptr + s, mask=s_ok, other=0.0).to(ACC)[None, :]
    s64 = s.to(tl.int64)
    x = tl.load(x_ptr + s64[None, :] * stride_xs + c[:, None] * stride_xc, mask=valid, other=0.0)
    y = (x.to(ACC) + scale * acc).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + s64[None, :] * C + c[:, None], y, mask=valid)
    mean, sum_sq = tile_moments(y.to(ACC), valid, count, y.dtype, AXIS=0)
    tl.store(y_moments_ptr + row + s, mean, mask=s_ok)
    tl.store(y_moments_ptr + tl.cast(T, tl.int64) + row + s, sum_sq, mask=s_ok)


@triton.jit
def _token_mixing_fwd_kernel(
    x_ptr,  # (B, S, C), any strides
    x_moments_ptr,  # (1, 2, T), T = B * S
    gamma_ptr,  # (C,) LayerNorm weight, contiguous, or None
    beta_ptr,  # (C,) LayerNorm bias, contiguous, or None
    w1_ptr,  # (D, S_PAD) packed, contiguous, zeros beyond S (but for the bias, see BIAS_IN_PADDING)
    b1_ptr,  # (D,), or None: no bias, or in the padding
    w2_ptr,  # (S_PAD, D) packed, contiguous, zeros beyond S
    b2_ptr,  # (S,) or None
    scale_ptr,  # (B,) residual scale a sample, accumulation dtype, or None
    y_ptr,  # (B, S, C), contiguous
    y_moments_ptr,  # (cdiv(C, BLOCK_C), 2, T): moments of y
    T,
    S,
    C,
    D,  # a multiple of BLOCK_D: packing pads it with zeros, and gelu(0) = 0
    stride_xb,
    stride_xs,
    stride_xc,
    EPS: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    P2: tl.constexpr,
    BIAS_IN_PADDING: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """y = x + scale * (W2 gelu(W1 LN(x) + b1) + b2); grid (B * cdiv(C, BLOCK_C),)."""
    S_PAD: tl.constexpr = P0 + P1 + P2
    DTYPE: tl.constexpr = w1_ptr.dtype.element_ty
    blocks = tl.cdiv(C, BLOCK_C)
    sample = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = sample.to(tl.int64) * S
    x_ptr += sample.to(tl.int64) * stride_xb
    c = block.to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)

    gamma = None
    beta = None
    if gamma_ptr is not None:
        gamma = tl.load(gamma_ptr + c, mask=c < C, other=0.0).to(ACC)
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + c, mask=c < C, other=0.0).to(ACC)
    n0 = _normalised_piece(
        x_ptr, x_moments_ptr, row, c, gamma, beta, S, C, T, stride_xs, stride_xc, EPS,
        0, P0, BIAS_IN_PADDING, ACC, DTYPE,
    )  # fmt: skip
    y0 = tl.zeros((BLOCK_C, P0), ACC)
    if P1:
        n1 = _normalised_piece(
            x_ptr, x_moments_ptr, row, c, gamma, beta, S, C, T, stride_xs, stride_xc, EPS,
            P0, P1, BIAS_IN_PADDING, ACC, DTYPE,
        )  # fmt: skip
        y1 = tl.zeros((BLOCK_C, P1), ACC)
    if P2:
        n2 = _normalised_piece(
            x_ptr, x_moments_ptr, row, c, gamma, beta, S, C, T, stride_xs, stride_xc, EPS,
            P0 + P1, P2, BIAS_IN_PADDING, ACC, DTYPE,
        )  # fmt: skip
        y2 = tl.zeros((BLOCK_C, P2), ACC)

    s0 = tl.arange(0, P0)
    d_block = tl.arange(0, BLOCK_D)
    for start in tl.range(0, D, BLOCK_D):
        d = start + d_block
        w1_cols = w1_ptr + d[None, :] * S_PAD  # W1^T tiles are (piece, BLOCK_D), s contiguous
        w2_rows = w2_ptr + d[:, None]  # W2^T tiles are (BLOCK_D, piece), d contiguous
        h = tl.dot(n0, tl.load(w1_cols + s0[:, None]), input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P1:
            s1 = P0 + tl.arange(0, P1)
            w1 = tl.load(w1_cols + s1[:, None])
            h = tl.dot(n1, w1, h, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P2:
            s2 = P0 + P1 + tl.arange(0, P2)
            w1 = tl.load(w1_cols + s2[:, None])
            h = tl.dot(n2, w1, h, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if b1_ptr is not None:
            h += tl.load(b1_ptr + d).to(ACC)[None, :]
        g = gelu(h, APPROXIMATE, POLYNOMIAL).to(DTYPE)  # (BLOCK_C, BLOCK_D)
        w2 = tl.load(w2_rows + s0[None, :] * D)
        y0 = tl.dot(g, w2, y0, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P1:
            w2 = tl.load(w2_rows + s1[None, :] * D)
            y1 = tl.dot(g, w2, y1, input_precision=INPUT_PRECISION, out_dtype=ACC)
        if P2:
            w2 = tl.load(w2_rows + s2[None, :] * D)
            y2 = tl.dot(g, w2, y2, input_precision=INPUT_PRECISION, out_dtype=ACC)

    scale = 1.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + sample)
    y_ptr += row * C
    y_moments_ptr += block.to(tl.int64) * (2 * tl.cast(T, tl.int64))
    count = tl.minimum(C - block * BLOCK_C, BLOCK_C).to(ACC)
    _store_piece(
        y0, x_ptr, y_ptr, b2_ptr, y_moments_ptr, row, scale, c, count, S, C, T, stride_xs, stride_xc,
        0, P0, ACC,
    )  # fmt: skip
    if P1:
        _store_piece(
            y1, x_ptr, y_ptr, b2_ptr, y_moments_ptr, row, scale, c, count, S, C, T, stride_xs, stride_xc,
            P0, P1, ACC,
        )  # fmt: skip
    if P2:
        _store_piece(
            y2, x_ptr, y_ptr, b2_ptr, y_moments_ptr, row, scale, c, count, S, C, T, stride_xs, stride_xc,
            P0 + P1, P2, ACC,
        )  # fmt: skip

"""Backward of the two-pass MLP through fc2 and GELU: all of it that is of the hidden's size.

With P the pre-activation and g the gradient of fc2's output, one program writes a tile of

    hidden = gelu(P)    and    dP = (g W2) * gelu'(P)

and dP's column sums. What is left are plain products: dn = dP W1, dW1 = dP^T n, dW2 = g^T hidden. P is read
from memory, or the program makes it again from n = LN(x) as fc1 did. Shapes are those of ``mlp``: rows are
tokens for channel mixing, (sample, channel) pairs for token mixing of long sequences.
"""

import triton
import triton.language as tl

from .activations import gelu_and_derivative
from .mlp import _column_halves, _tile_of_program


@triton.jit
def _product_tile(
    a_rows,  # (BLOCK_M,) pointers to A's rows, all readable, columns contiguous
    b_columns,  # (BLOCK_N,) pointers to B's columns, whose rows are stride_bk apart
    n_ok,  # (BLOCK_N,) columns that exist, or None: all readable
    K,
    stride_bk,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of A B, (BLOCK_M, BLOCK_N) in ACC."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in tl.range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a_tile = a_rows[:, None] + k[None, :]  # (BLOCK_M, BLOCK_K)
        # int64 for the start only: a 64-bit product for every row of the tile is a quarter of the loop.
        b_start = b_columns + tl.cast(start, tl.int64) * stride_bk
        b_tile = b_start[None, :] + tl.arange(0, BLOCK_K)[:, None] * stride_bk  # (BLOCK_K, BLOCK_N)
        a = tl.load(a_tile) if EVEN_K else tl.load(a_tile, mask=(k < K)[None, :], other=0.0)
        if n_ok is None:
            b = tl.load(b_tile) if EVEN_K else tl.load(b_tile, mask=(k < K)[:, None], other=0.0)
        else:
            b_ok = n_ok[None, :] if EVEN_K else n_ok[None, :] & (k < K)[:, None]
            b = tl.load(b_tile, mask=b_ok, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=INPUT_PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _activate(
    p,  # (BLOCK_M, COLUMNS) in the accumulation dtype, or None: read from p_ptr
    dg,  # (BLOCK_M, COLUMNS) g W2, or None: not wanted
    p_ptr,
    hidden_ptr,
    dhidden_ptr,
    db1_ptr,  # as the kernel's
    row,  # (BLOCK_M,) int64, clamped
    row_ok,  # (BLOCK_M,)
    tile_m,
    first,  # first column
    N,
    stride_pm,
    stride_hm,
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    PIECE: tl.constexpr,
):
    """Hidden, dP and its column sums for COLUMNS columns, at most PIECE at a time, to save registers."""
    if COLUMNS > PIECE:
        HALF: tl.constexpr = COLUMNS // 2
        p_left, p_right, dg_left, dg_right = None, None, None, None
        if p is not None:
            p_left, p_right = _column_halves(p)
        if dg is not None:
            dg_left, dg_right = _column_halves(dg)
        _activate(
            p_left, dg_left, p_ptr, hidden_ptr, dhidden_ptr, db1_ptr, row, row_ok, tile_m, first, N,
            stride_pm, stride_hm, APPROXIMATE, POLYNOMIAL, ACC, HALF, PIECE,
        )  # fmt: skip
        _activate(
            p_right, dg_right, p_ptr, hidden_ptr, dhidden_ptr, db1_ptr, row, row_ok, tile_m, first + HALF, N,
            stride_pm, stride_hm, APPROXIMATE, POLYNOMIAL, ACC, HALF, PIECE,
        )  # fmt: skip
    else:
        n = first + tl.arange(0, COLUMNS)
        n_ok = n < N
        valid = row_ok[:, None] & n_ok[None, :]
        if p is None:
            p_tile = p_ptr + row[:, None] * stride_pm + n[None, :]  # (BLOCK_M, COLUMNS)
            p = tl.load(p_tile, mask=n_ok[None, :], other=0.0).to(ACC)
        hidden, derivative = gelu_and_derivative(p, APPROXIMATE, POLYNOMIAL)
        out = row[:, None] * stride_hm + n[None, :]
        if hidden_ptr is not None:
            tl.store(hidden_ptr + out, hidden.to(hidden_ptr.dtype.element_ty), mask=valid)
        if dg is not None:
            dp = dg * derivative
            if dhidden_ptr is not None:
                tl.store(dhidden_ptr + out, dp.to(dhidden_ptr.dtype.element_ty), mask=valid)
            if db1_ptr is not None:
                sums = tl.sum(tl.where(row_ok[:, None], dp, 0.0), axis=0)
                tl.store(db1_ptr + tile_m.to(tl.int64) * N + n, sums, mask=n_ok)


@triton.jit
def _mlp_hidden_bwd_kernel(
    g_ptr,  # (M, K) gradient of fc2's output, rows stride_gm apart, columns contiguous, compute dtype
    w2_ptr,  # (K, N) fc2's weight as nn.Linear keeps it, rows stride_w2k apart, columns contiguous
    p_ptr,  # (M, N) pre-activation, rows stride_pm apart, compute dtype; None: made again from n, w1, b1
    n_ptr,  # (M, K) LN(x), rows stride_nm apart, columns contiguous, compute dtype; None with p_ptr
    w1_ptr,  # (N, K) fc1's weight, rows stride_w1n apart, columns contiguous; None with p_ptr
    b1_ptr,  # (N,) fc1's bias or None; unused with p_ptr
    hidden_ptr,  # (M, N) gelu(P), rows stride_hm apart, compute dtype, or None: not wanted
    dhidden_ptr,  # (M, N) dP, rows stride_hm apart, compute dtype, or None: not wanted
    db1_ptr,  # (cdiv(M, BLOCK_M), N) column sums of each tile's unrounded dP, accumulation dtype, or None
    M,
    N,
    K,
    stride_gm,
    stride_w2k,
    stride_pm,
    stride_nm,
    stride_w1n,
    stride_hm,
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """hidden = gelu(P), dP = (g W2) * gelu'(P); grid (cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N),).

    Without dhidden_ptr and db1_ptr the product g W2 is skipped, and g_ptr and w2_ptr are unused.
    """
    tile_m, tile_n = _tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < M
    row = tl.minimum(row, M - 1)  # readable, not to be stored
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < N

    p, dg = None, None  # made in this order: with P first the compiler needs up to 30 registers more
    if dhidden_ptr is not None or db1_ptr is not None:
        dg = _product_tile(
            g_ptr + row * stride_gm, w2_ptr + n, n_ok, K, stride_w2k,
            INPUT_PRECISION, ACC, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if p_ptr is None:
        w1_rows = w1_ptr + tl.minimum(n, N - 1).to(tl.int64) * stride_w1n
        p = _product_tile(
            n_ptr + row * stride_nm, w1_rows, None, K, 1,
            INPUT_PRECISION, ACC, EVEN_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if b1_ptr is not None:
            p += tl.load(b1_ptr + n, mask=n_ok, other=0.0).to(ACC)[None, :]
    # Quarters of 32 columns: on sm_90 (128, 128) by 8 warps then fits in 128 registers, twice on an SM.
    PIECE: tl.constexpr = max(BLOCK_N // 4, 32)
    _activate(
        p, dg, p_ptr, hidden_ptr, dhidden_ptr, db1_ptr, row, row_ok, tile_m, tile_n * BLOCK_N, N,
        stride_pm, stride_hm, APPROXIMATE, POLYNOMIAL, ACC, BLOCK_N, PIECE,
    )  # fmt: skip

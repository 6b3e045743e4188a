"""Row moments: the mean and the centred sum of squares of every token's channels.

One format serves every producer and consumer of LayerNorm statistics, *partial moments*:

    moments (NUM_BLOCKS, 2, T) fp32 or fp64, contiguous; T = B * S rows
    moments[j, 0, t] = mean of row t over channel block j
    moments[j, 1, t] = sum of (value - that mean)**2 over channel block j

The kernel below writes NUM_BLOCKS = 1; an epilogue that owns a channel block writes its own j, so that
the statistics of its output cost no pass. ``merge_moments`` joins the blocks by Chan's formula (Chan,
Golub, LeVeque 1983), which is stable for rows whose mean is far from zero, unlike sum and sum of squares.
"""

import triton
import triton.language as tl


@triton.jit
def tile_moments(
    x,  # (BLOCK_C, ROWS) or (ROWS, BLOCK_C) tile in the accumulation dtype
    valid,  # broadcastable to x: True where the element exists
    count,  # number of valid elements along AXIS, same for every row
    DTYPE: tl.constexpr,  # what x was rounded to
    AXIS: tl.constexpr,
):
    """Mean and centred sum of squares of a tile along AXIS: two (ROWS,) vectors.

    Where x has all the digits of the sums, those of a mean far from zero would be lost in them: there the
    mean is corrected by that of what is left.
    """
    mean = tl.sum(tl.where(valid, x, 0.0), axis=AXIS) / count
    centred = tl.where(valid, x - tl.expand_dims(mean, AXIS), 0.0)
    sum_sq = tl.sum(centred * centred, axis=AXIS)
    if DTYPE.primitive_bitwidth >= 32:
        rest = tl.sum(centred, axis=AXIS) / count
        mean += rest
        corrected = sum_sq - count * rest * rest
        sum_sq = tl.where(corrected > 0, corrected, sum_sq)  # rounding must not make it negative
    return mean, sum_sq


@triton.jit
def merge_moments(
    moments_ptr,  # (NUM_BLOCKS, 2, T), contiguous
    rows,  # (ROWS,) int64 row indices, all below T
    T,
    C,
    EPS: tl.constexpr,
    COUNT: tl.constexpr,  # channels in a full block; the last block holds the remainder
    NUM_BLOCKS: tl.constexpr,
    NUM_BLOCKS_P2: tl.constexpr,  # NUM_BLOCKS rounded up to a power of two
):
    """(mean, rstd) of ``rows``: two (ROWS,) vectors in the dtype of the moments."""
    T64 = tl.cast(T, tl.int64)
    if NUM_BLOCKS == 1:
        mean = tl.load(moments_ptr + rows)
        sum_sq = tl.load(moments_ptr + T64 + rows)
    else:
        j = tl.arange(0, NUM_BLOCKS_P2)
        count = tl.maximum(tl.minimum(C - j * COUNT, COUNT), 0)[:, None].to(moments_ptr.dtype.element_ty)
        offsets = (
            j.to(tl.int64)[:, None] * (2 * tl.cast(T, tl.int64)) + rows[None, :]
        )  # (NUM_BLOCKS_P2, ROWS)
        exists = (j < NUM_BLOCKS)[:, None]
        means = tl.load(moments_ptr + offsets, mask=exists, other=0.0)
        sums_sq = tl.load(moments_ptr + T64 + offsets, mask=exists, other=0.0)
        first = tl.load(moments_ptr + rows)  # relative to it: a mean far from zero keeps its digits
        mean = first + tl.sum((means - first[None, :]) * count, axis=0) / C
        shift = means - mean[None, :]
        sum_sq = tl.sum(sums_sq + count * shift * shift, axis=0)
    return mean, tl.rsqrt(sum_sq / C + EPS)


@triton.jit
def _row_moments_fwd_kernel(
    x_ptr,  # (B, S, C), any strides
    moments_ptr,  # (1, 2, T), contiguous
    T,  # rows, B * S
    S,
    C,
    stride_xb,
    stride_xs,
    stride_xc,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACC: tl.constexpr,  # accumulation dtype: tl.float32, or tl.float64 for fp64 input
):
    """Moments of ROWS rows; grid (cdiv(T, ROWS),). Each element is read once, whatever C is."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = row < T
    x_rows = x_ptr + (row // S) * stride_xb + (row % S) * stride_xs
    mean = tl.zeros((ROWS,), ACC)
    sum_sq = tl.zeros((ROWS,), ACC)
    for start in tl.range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        valid = row_ok[:, None] & (c < C)[None, :]
        x = tl.load(x_rows[:, None] + c.to(tl.int64)[None, :] * stride_xc, mask=valid, other=0.0)
        count = tl.minimum(C - start, BLOCK_C).to(ACC)
        block_mean, block_sum_sq = tile_moments(x.to(ACC), valid, count, x_ptr.dtype.element_ty, AXIS=1)
        # Chan's pairwise update of (start elements seen so far) with this block.
        seen = (start + count).to(ACC)
        delta = block_mean - mean
        mean += delta * (count / seen)
        sum_sq += block_sum_sq + delta * delta * (start * (count / seen))
    tl.store(moments_ptr + row, mean, mask=row_ok)
    tl.store(moments_ptr + tl.cast(T, tl.int64) + row, sum_sq, mask=row_ok)

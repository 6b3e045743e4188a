"""How programs share a matrix among them: which tile a program has, its rows, and its columns in halves."""

import triton
import triton.language as tl


@triton.jit
def tile_at(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Coordinates of a tile, GROUP_M row tiles at a time so that neighbours share operands in L2."""
    group = index // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    height = tl.minimum(tiles_m - first_m, GROUP_M)
    within = index % (GROUP_M * tiles_n)
    return first_m + within % height, within // height


@triton.jit
def rows_of_tile(tile, B, R, PER_SAMPLE: tl.constexpr, BLOCK_M: tl.constexpr):
    """(sample, row within the sample, exists) of a tile's rows.

    Rows that are evenly spaced over the whole batch are passed as B * S samples of R = 1 row each: Triton
    compiles a 1 as a constant, so the division by R is gone, and no size but B depends on the batch.

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
        sample = row // R
        row = row % R
    return sample, row, exists


@triton.jit
def column_halves(tile):
    """(M, N) -> two (M, N / 2): the left and the right columns. In an MMA accumulator nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (tile.shape[0], 2, tile.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def column_parts(tile, PARTS: tl.constexpr):
    """(M, N) -> a tuple of PARTS tiles (M, N / PARTS) from left to right; PARTS is 1, 2 or 4."""
    if PARTS == 1:
        return (tile,)
    elif PARTS == 2:
        return column_halves(tile)
    else:
        left, right = column_halves(tile)
        first, second = column_halves(left)
        third, fourth = column_halves(right)
        return (first, second, third, fourth)

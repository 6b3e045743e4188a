"""Which tiles a kernel runs with by rule.

Pure functions of problem and target. What is said of registers and spills was read from code compiled ahead
of time: ``python -m fastmixer compile`` reproduces it, benchmarks/NOTES.md has figures. No tile has been
timed on a GPU yet.
"""

from __future__ import annotations

import functools
import itertools

from fastmixer.configs.ops import OPS, matrix_sizes
from fastmixer.configs.problem import Problem, TileConfig, cdiv, next_power_of_2
from fastmixer.configs.targets import Target


@functools.cache
def token_pieces(tokens: int, largest: int = 128) -> tuple[int, int, int]:
    """At most three descending powers of two from 16 to ``largest`` that cover the tokens most tightly.

    196 -> (128, 64, 16), 6% of padding where the next power of two has 31%; 49 -> (64, 0, 0). Among equal
    sums the fewest pieces win: fewer, larger matrix instructions.
    """
    sizes = [size for size in (256, 128, 64, 32, 16, 0) if size <= largest]
    triples = itertools.combinations_with_replacement(sizes, 3)
    covers = [pieces for pieces in triples if sum(pieces) >= tokens]
    return min(covers, key=lambda pieces: (sum(pieces), -pieces.count(0), pieces))


def pieces_of(op: str, problem: Problem, target: Target) -> tuple[int, int, int]:
    """The ``token_pieces`` of a one-pass op: what packing pads the weights to, however it is cut.

    On sm_90 the backward takes 256 tokens as one piece, with half the waits for products. The forward's would
    wait for each other wherever nothing is added to p behind its product; elsewhere it costs registers.
    """
    wide = target.arch == 90 and problem.dtype.itemsize == 2 and OPS[op].direction == "backward"
    return token_pieces(problem.tokens, 256 if wide else 128)


# Triton knows that rows are aligned, and loads them 16 bytes at a time, only where the distance between
# them is a multiple of 16 elements.
ALIGNED = 16

# Programs per multiprocessor that the backward's sums over samples are split into: more fill the GPU better
# and write more partial sums. Not timed yet.
WGRAD_WAVES = 2
NORM_WARPS = 20  # so many are resident for every width from 512: a second wave would be ragged


def rule(op: str, problem: Problem, target: Target) -> TileConfig | None:
    """The rule-based tiles for ``op``, one of ``OPS``, of the batch independent.

    None, for a one-pass op, means: too long for one pass, use the two-pass design (token_fc1, token_fc2,
    token_mlp_hidden_bwd_recompute). ValueError: a row of a new kernel that has no rule here.
    """
    row = OPS[op]
    if row.one_pass and not row.takes(problem.tokens):
        return None
    if row.is_matrix:
        B, rows, columns, depth = matrix_sizes(op, problem)
        return _matmul(op, B * rows, columns, depth, problem, target)
    if row.kernel.startswith("layer_norm"):
        return _layer_norm(op, problem, target)
    rules = {"token_mixing": _token_mixing, "token_dgrad": _token_bwd, "token_wgrad": _token_bwd}
    if row.kernel not in rules:
        raise ValueError(f"op: no rule for the tiles of {op!r}")
    if target.backend == "interpreter":  # few large tiles: an operation costs much the same at any size
        return TileConfig(_clip(problem.channels, 16, 256), _clip(problem.hidden, 16, 128))
    if problem.dtype.itemsize >= 4:  # fits everywhere, untuned
        stages = 2 if row.direction == "backward" and target.backend == "cuda" else 1
        return TileConfig(16, 16, num_warps=4, num_stages=stages)
    return rules[row.kernel](op, problem, target)


def _token_mixing(op: str, problem: Problem, target: Target) -> TileConfig:
    tokens = sum(token_pieces(problem.tokens))
    if target.arch == 90 and problem.channels % ALIGNED == 0:
        # 128 channels: every program reads all of both weights, and 64 would ask twice what L2 delivers. 64
        # hidden units, which take fewer instructions each. Up to 64 tokens two programs share an SM; with a
        # wide x that takes 32 hidden units.
        hidden = 32 if tokens <= 64 and problem.x_dtype.itemsize > problem.dtype.itemsize else 64
        return TileConfig(128, hidden, num_warps=8, num_stages=3 if tokens <= 64 else 2)
    # 64 x 32 with 4 warps: two programs on one SM, so that one's GELU runs under the other's products. A
    # stage holds a W1 and a W2 tile; three and about one more for layout conversions have to fit twice.
    stage = 2 * tokens * 32 * problem.dtype.itemsize
    stages = 3 if 2 * 4 * stage <= target.shared_memory else 2
    return TileConfig(64, 32, num_warps=4, num_stages=stages if target.backend == "cuda" else 1)


def wgrad_in_one_launch(problem: Problem, target: Target) -> bool:
    """Whether both token-mixing weights get their gradients in one launch, which shares the recomputation.

    Two fp32 accumulators of hidden x tokens: on sm_90 beyond 144 padded tokens they spill in the loop and the
    products wait for each other.
    """
    if target.backend in ("interpreter", "hip"):
        return True
    if problem.dtype.itemsize >= 4:
        return False
    tokens = sum(token_pieces(problem.tokens))
    return tokens <= (144 if target.arch in (90, 100) else 64) or (target.arch == 80 and tokens == 256)


def wgrad_splits(problem: Problem, tiles: TileConfig, blocks_d: int, target: Target) -> tuple[int, int]:
    """Into how many shares token_wgrad splits its (sample, channel block) pairs, and how many pairs each has.

    As many shares as fill the GPU; the last may have fewer pairs, but has some. That decides the order of the
    sums: it depends on the GPU's size, never on the run. blocks_d: blocks of hidden units; a share has one
    program for each.
    """
    pairs = problem.batch * cdiv(problem.channels, tiles.block_m)
    share = cdiv(pairs, max(1, WGRAD_WAVES * target.multiprocessors // blocks_d))
    return cdiv(pairs, share), share


def is_launched(op: str, problem: Problem, target: Target) -> bool:
    """Whether a half of this problem that the kernels run may launch ``op``, one of ``OPS``."""
    elsewhere = op == "token_wgrad_fc2" and wgrad_in_one_launch(problem, target)
    return OPS[op].takes(problem.tokens) and not elsewhere


def _token_bwd(op: str, problem: Problem, target: Target) -> TileConfig:
    """Tiles of block_m channels by block_n hidden units.

    The largest without a spill in the loop, two programs on one SM where that leaves a choice.
    """
    tokens = sum(token_pieces(problem.tokens))
    dgrad = op == "token_dgrad"

    def tile(m: int, n: int, stages: int = 2, warps: int = 4) -> TileConfig:
        """So many channels by hidden units of dgrad, transposed of the weight gradients."""
        return TileConfig(*((m, n) if dgrad else (n, m)), num_warps=warps, num_stages=stages)

    if target.backend == "hip":
        return tile(64, 32, stages=1)
    if target.arch in (90, 100):
        if tokens <= 64:
            return tile(64, 64, stages=3)
        if tokens <= 144:
            return tile(64, 64 if dgrad else 32)
        if tokens <= 224:
            return tile(64, 32, stages=3 if op == "token_wgrad_fc2" and tokens <= 208 else 2)
        return tile(64, 32) if op == "token_wgrad_fc2" else tile(128, 32, warps=8)
    if tokens <= 64:
        return tile(64, 32)
    if target.arch == 80:
        return tile(64, 32, warps=8) if tokens > 224 else tile(64, 16, stages=3)
    return tile(64, 16)


def _layer_norm(op: str, problem: Problem, target: Target) -> TileConfig:
    """Tiles of block_m rows by block_n channels; the backward's hold whole rows."""
    width = next_power_of_2(problem.channels)
    if target.backend == "interpreter":
        # NumPy adds the rows of a tile one after the other, where a GPU adds in pairs: few of them.
        most = 64 if op == "layer_norm_bwd" else 256
        return TileConfig(_clip(problem.batch * problem.tokens, 16, most), width)
    if op == "layer_norm_fwd_transposed":  # square enough to be read and written in whole sectors
        return TileConfig(32, 64, num_warps=4, num_stages=1)
    if op == "layer_norm_fwd":
        width = min(width, 1024)
        return TileConfig(max(1, 2048 // width), width, num_warps=4, num_stages=1)
    # Few elements per thread, for many warps: a pass over memory with two reductions per row.
    return TileConfig(max(1, 1024 // width), width, num_warps=min(16, max(4, width // 256)), num_stages=1)


def sum_tile(rows: int, columns: int, target: Target) -> tuple[int, int, int]:
    """Tile of the sum of partials (P, rows, columns): partials, rows, columns."""
    if target.backend == "interpreter":
        return 16, _clip(rows, 1, 64), _clip(columns, 16, 256)
    return (64, 1, 64) if rows == 1 else (8, 8, 64)


def _matmul(op: str, rows: int, columns: int, depth: int, problem: Problem, target: Target) -> TileConfig:
    if target.backend == "interpreter":
        return TileConfig(_clip(rows, 16, 256), _clip(columns, 16, 1024), _clip(depth, 16, 256))
    if problem.dtype.itemsize >= 4:
        return TileConfig(64, 64, 16, num_warps=4, num_stages=2)
    if (columns | depth) % ALIGNED:  # element-wide loads need many registers
        return TileConfig(64, 64, 32, num_warps=4, num_stages=2)
    if OPS[op].products == 2 and target.arch != 100:
        # Two accumulators: half the rows leave room for two programs on one SM.
        depth, stages = (64, 3) if target.arch == 90 else (64, 2) if target.backend == "hip" else (32, 4)
        return TileConfig(64, 128, depth, num_warps=4, num_stages=stages)
    if target.backend == "hip":
        return TileConfig(128, 128, 64, num_warps=4, num_stages=2)
    if target.arch not in (90, 100):  # mma.sync: operands live in registers too, so 8 warps share a tile
        return TileConfig(128, 128, 32, num_warps=8, num_stages=4)
    if OPS[op].kernel == "mlp_hidden_bwd":  # with 8 warps two programs fit an SM
        return TileConfig(128, 128, 64, num_warps=8, num_stages=3)
    if op == "token_fc1":  # the operand is normalised in registers: more, smaller programs overlap its waits
        return TileConfig(64, 128, 64, num_warps=4, num_stages=3)
    if problem.x_dtype.itemsize == 4:
        if op == "channel_fc1":  # the same, with an operand twice as wide
            return TileConfig(128, 128, 32, num_warps=4, num_stages=3)
        return TileConfig(128, 128, 64, num_warps=8, num_stages=3)  # with 4 warps the residual spills
    return TileConfig(128, 128, 64, num_warps=4, num_stages=3)


def _clip(n: int, low: int, high: int) -> int:
    return max(low, min(next_power_of_2(n), high))


def multiplies_on_ordinary_cores(problem: Problem, target: Target) -> bool:
    """Whether products run outside the matrix units: fp32 without TF32 on NVIDIA; AMD has units for fp32."""
    return problem.dtype.itemsize >= 4 and target.backend == "cuda"

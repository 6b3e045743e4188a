"""Which tiles a kernel runs with: pure functions of problem and target, testable without a GPU.

Registers, spills and shared memory quoted here were read from cubins compiled ahead of time by Triton 3.6.0
and 3.9.0 (``python -m fastmixer compile`` reproduces them). No tile has been timed on a GPU yet.
"""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .targets import Target


class Problem(NamedTuple):
    """One half of a block: batch B, tokens S, channels C, hidden D or E; dtypes of x and of the products."""

    batch: int
    tokens: int
    channels: int
    hidden: int
    x_dtype: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program, in elements.

    ``token_mixing``: block_m channels by block_n hidden units, block_k unused; the matrix products: block_m
    rows by block_n columns, block_k deep, group_m row tiles share L2. num_warps and num_stages (of the loop's
    pipeline) as Triton takes them.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8


class Library(enum.Enum):
    """What PyTorch runs in place of a kernel of ours.

    ATEN: the product of "channel_fc1" or "channel_fc2" (cuBLAS, hipBLASLt), with a light pass of ours for the
    rest. REFERENCE: a whole "token_half" or "channel_half".
    """

    ATEN = "aten"
    REFERENCE = "reference"


# None: for the ops of ONE_PASS the sequence is too long for one pass; for the halves the fused one runs.
Choice = TileConfig | Library | None


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def token_pieces(tokens: int) -> tuple[int, int, int]:
    """At most three descending powers of two from 16 to 128 that cover up to 384 tokens most tightly.

    196 -> (128, 64, 16), 6% of padding where the next power of two has 31%; 49 -> (64, 0, 0). Among equal
    sums the fewest pieces win: fewer, larger matrix instructions. Not one piece of 256: on sm_90 with Triton
    3.9.0 it spills 184 times, two of 128 do 47 times (compiled).
    """
    sizes = [0, 16, 32, 64, 128]
    covers = (
        (a + b + c, (a > 0) + (b > 0) + (c > 0), (a, b, c))
        for a in sizes[1:]
        for b in sizes
        for c in sizes
        if a >= b >= c and a + b + c >= tokens
    )
    return min(covers)[2]


# Triton knows that rows are aligned, and loads them 16 bytes at a time, only where the distance between
# them is a multiple of 16 elements.
ALIGNED = 16

# Programs a multiprocessor that the backward's sums over samples are split into: more fill the GPU better and
# write more partial sums. Not timed yet.
WGRAD_WAVES = 2
NORM_WARPS = 20  # so many are resident for every width from 512 (compiled): a second wave would be ragged

# The one-pass token kernel holds a BLOCK_C x S accumulator in registers: 256 tokens are the end of that road.
ONE_PASS_TOKENS = 256
ONE_PASS = ("token_mixing", "token_dgrad", "token_wgrad_fc1", "token_wgrad_fc2")


def rule(op: str, problem: Problem, target: Target) -> TileConfig | None:
    """The rule-based tiles for ``op``, of the batch independent.

    forward: "token_mixing", "token_fc1", "token_fc2", "channel_fc1", "channel_fc2";
    backward: "token_dgrad", "token_wgrad_fc1", "token_wgrad_fc2", "token_mlp_hidden_bwd_recompute",
    "channel_mlp_hidden_bwd", "channel_mlp_hidden_bwd_recompute", "layer_norm_fwd",
    "layer_norm_fwd_transposed", "layer_norm_bwd".

    None, for the ops of ONE_PASS, means: too long for one pass, use the two-pass design (token_fc1,
    token_fc2, token_mlp_hidden_bwd_recompute).
    """
    B, S, C, H = problem[:4]
    if op in ONE_PASS:
        if S > ONE_PASS_TOKENS:
            return None
        return _token_mixing(problem, target) if op == "token_mixing" else _token_bwd(op, problem, target)
    if op.startswith("layer_norm"):
        return _layer_norm(op, problem, target)
    rows, columns, depth = {
        "token_fc1": (B * C, H, S),
        "token_fc2": (B * C, S, H),
        "token_mlp_hidden_bwd_recompute": (B * C, H, S),
        "channel_fc1": (B * S, H, C),
        "channel_fc2": (B * S, C, H),
        "channel_mlp_hidden_bwd": (B * S, H, C),
        "channel_mlp_hidden_bwd_recompute": (B * S, H, C),
    }[op]
    return _matmul(op, rows, columns, depth, problem, target)


def _token_mixing(problem: Problem, target: Target) -> TileConfig:
    C, D = problem.channels, problem.hidden
    if target.backend == "interpreter":  # few large tiles: an operation costs much the same at any size
        return TileConfig(_clip(C, 16, 256), _clip(D, 16, 128))
    if problem.dtype.itemsize >= 4:
        return TileConfig(16, 16, num_warps=4, num_stages=1)  # fits everywhere, untuned
    tokens = sum(token_pieces(problem.tokens))
    if target.arch == 90 and C % ALIGNED == 0:  # loads by the element leave no registers for larger tiles
        # 128 channels: every program reads all of both weights, and 64 would ask twice what L2 delivers. 64
        # hidden units where the registers allow: at 208 tokens 255 and no spill in the loop, 16 to 18
        # instructions a hidden element where 32 units have 20 to 23 (compiled). Up to 64 tokens two programs
        # share an SM.
        if 64 < tokens <= 224:
            return TileConfig(128, 64, num_warps=8, num_stages=2)
        return TileConfig(128, 32, num_warps=8, num_stages=3 if tokens <= 64 else 2)
    # 64 x 32 with 4 warps: 255 registers, and two programs on one SM, so that one's GELU runs under the
    # other's products. A stage holds a W1 and a W2 tile; three of them and about one more for layout
    # conversions have to fit twice.
    stage = 2 * tokens * 32 * problem.dtype.itemsize
    stages = 3 if 2 * 4 * stage <= target.shared_memory else 2
    return TileConfig(64, 32, num_warps=4, num_stages=stages if target.backend == "cuda" else 1)


def wgrad_in_one_launch(problem: Problem, target: Target) -> bool:
    """Whether both token-mixing weights get their gradients in one launch, which shares the recomputation.

    Two fp32 accumulators of hidden x tokens: on sm_90 beyond 144 padded tokens they spill in the loop and the
    products wait for each other (compiled: 158 spills, 76 in the loop, at 208; a launch each has none).
    """
    if target.backend == "interpreter" or target.backend == "hip":
        return True
    if problem.dtype.itemsize >= 4:
        return False
    tokens = sum(token_pieces(problem.tokens))
    return tokens <= (144 if target.arch in (90, 100) else 64) or (target.arch == 80 and tokens == 256)


def _token_bwd(op: str, problem: Problem, target: Target) -> TileConfig:
    """Tiles of block_m channels by block_n hidden units.

    For 16 bits the largest without a spill in the loop, two programs on one SM where that leaves a choice
    (compiled: benchmarks/NOTES.md).
    """
    C, D = problem.channels, problem.hidden
    if target.backend == "interpreter":
        return TileConfig(_clip(C, 16, 256), _clip(D, 16, 128))
    if problem.dtype.itemsize >= 4:
        return TileConfig(16, 16, num_warps=4, num_stages=2 if target.backend == "cuda" else 1)
    tokens = sum(token_pieces(problem.tokens))
    dgrad = op == "token_dgrad"
    if target.backend == "hip":
        return TileConfig(64, 32, num_stages=1) if dgrad else TileConfig(32, 64, num_stages=1)
    if target.arch in (90, 100):
        if tokens <= 64:
            return TileConfig(64, 64, num_stages=3)
        if tokens <= 144:
            return TileConfig(64 if dgrad else 32, 64, num_stages=2)
        if tokens <= 224:
            stages = 3 if op == "token_wgrad_fc2" and tokens <= 208 else 2
            return TileConfig(64, 32, num_stages=2) if dgrad else TileConfig(32, 64, num_stages=stages)
        if op == "token_wgrad_fc2":
            return TileConfig(32, 64, num_stages=2)
        return TileConfig(*((128, 32) if dgrad else (32, 128)), num_warps=8, num_stages=2)
    if tokens <= 64:
        return TileConfig(*((64, 32) if dgrad else (32, 64)), num_stages=2)
    if target.arch == 80 and tokens > 224:
        return TileConfig(*((64, 32) if dgrad else (32, 64)), num_warps=8, num_stages=2)
    return TileConfig(*((64, 16) if dgrad else (16, 64)), num_stages=3 if target.arch == 80 else 2)


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
    # Few elements a thread, for many warps: a pass over memory with two reductions a row (compiled: 48 to 96
    # registers for 512 to 1280 channels).
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
    if op.endswith("hidden_bwd_recompute") and target.arch != 100:
        # Two accumulators: half the rows leave room for two programs on one SM (compiled: 0 spills; with 128
        # rows and 8 warps 0 too, and one program).
        hopper = target.arch == 90
        return TileConfig(64, 128, 64 if hopper or target.backend == "hip" else 32, num_warps=4,
                          num_stages=3 if hopper else 2 if target.backend == "hip" else 4)  # fmt: skip
    if target.backend == "hip":
        return TileConfig(128, 128, 64, num_warps=4, num_stages=2)
    if target.arch not in (90, 100):  # mma.sync: operands live in registers too, so 8 warps share a tile
        return TileConfig(128, 128, 32, num_warps=8, num_stages=4)
    if "hidden_bwd" in op:  # with 8 warps 126 registers (compiled): two programs on one SM, 16 warps
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

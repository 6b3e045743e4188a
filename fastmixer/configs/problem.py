"""The vocabulary of every choice: what is chosen for, and what can be chosen."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import NamedTuple

import torch


class Problem(NamedTuple):
    """One half of a block: batch B, tokens S, channels C, hidden D or E; dtypes of x and of the products.

    approximate: GELU's, "none" (erf) or "tanh".
    """

    batch: int
    tokens: int
    channels: int
    hidden: int
    x_dtype: torch.dtype
    dtype: torch.dtype
    approximate: str = "none"


@dataclass(frozen=True)
class TileConfig:
    """Tile of one program, in elements.

    One-pass ops: block_m channels by block_n hidden units, block_k unused. Matrix products: block_m rows by
    block_n columns, block_k deep; group_m row tiles share L2. num_warps and num_stages (of the loop's
    pipeline) as Triton takes them. descriptors: operands and results of a product are moved in whole tiles by
    tensor descriptors (TMA, NVIDIA from sm_90). persistent: as many programs as multiprocessors, each with
    many tiles.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8
    descriptors: bool = False
    persistent: bool = False


class Library(enum.Enum):
    """What PyTorch runs in place of a kernel of ours.

    ATEN: the product of "channel_fc1" or "channel_fc2" (cuBLAS, hipBLASLt), with a light pass of ours for the
    rest.

    ATEN_GELU: that of "channel_fc1" with GELU in the product's epilogue, which is tanh's. It is ATEN for
    erf's GELU, for products in more than 16 bits, and where a backward needs the pre-activation.

    ADDMM: that of "channel_fc2" added to the residual, in place where nobody else reads that. It is ATEN
    where there is a residual scale, where x has another dtype than the products, and where TF32 would round
    fc2's bias.

    REFERENCE: a whole "token_half" or "channel_half".
    """

    ATEN = "aten"
    ATEN_GELU = "aten_gelu"
    ADDMM = "addmm"
    REFERENCE = "reference"


# None: for the one-pass ops the sequence is too long for one pass; for the halves the fused one runs.
Choice = TileConfig | Library | None


def cdiv(n: int, divisor: int) -> int:
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    return cdiv(n, multiple) * multiple


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def bucketed(problem: Problem) -> Problem:
    """The problem with its batch rounded up to a power of two: few batches to choose and compile for."""
    return problem._replace(batch=next_power_of_2(problem.batch))


def measured_as(problem: Problem) -> tuple[Problem, Problem]:
    """Whose measured choice holds for the problem, the best first: what erf's GELU runs with suits tanh's."""
    return problem, problem._replace(approximate="none")

"""Generated cases: blocks of any shape, dtype, layout and option, drawn from a seed.

A test with ``@generated(quick, more, most)`` and the arguments ``part`` and ``draw`` runs ``quick`` draws of
each part by default, ``more`` with those marked slow, and ``most`` with ``--exhaustive``. Which ones,
``--draws SEED`` says: CI gives the commit, so every change meets new cases, and one change always the same. A
draw that fails becomes a named case (docs/development.md).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from support import LAYOUTS, SCALES, Case

from fastmixer.configs import TARGETS, TileConfig

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PARTS = ("token", "channel", "block")
G_LAYOUTS = (*LAYOUTS, "expanded everywhere")
# Pooled elements of the shortest gradient of a drawn case: with 256 the bound was less than 4 standard
# deviations away for some (docs/development.md). Named cases, always the same, do with fewer.
DRAWN_ELEMENTS = 768
LONG = (49, 64, 130, 196, 256, 257, 300)
# Of x: the branch is what y consists of, and rounding y no longer hides the error of the branch.
SMALL_STD = 2.0**-10


class Counts(NamedTuple):
    """How many draws a part: by default, with the slow ones, and with ``--exhaustive``."""

    quick: int
    more: int
    most: int


def generated(quick: int, more: int, most: int) -> Callable:
    """Marks a test of generated cases; ``draw`` is then the name of one."""
    return pytest.mark.generated(Counts(quick, more, most))


def names(counts: Counts, config: pytest.Config) -> list:
    """The draws that ``--draws`` and ``--exhaustive`` ask for, those beyond the quick ones marked slow."""
    count = counts.most if config.getoption("exhaustive") else counts.more
    all_names = [f"{config.getoption('draws')}-{number}" for number in range(count)]
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in all_names[counts.quick :]]
    return [*all_names[: counts.quick], *slow]


def architectures(config: pytest.Config) -> list[str]:
    """Those that a run compiles the whole catalogue for: sm_90 and one of the others, in turns with --draws.

    All with ``--exhaustive``. The records of compiled candidates are of all, and of this device code
    (test_records): a change of kernels has compiled for every one before it comes here.
    """
    others = [arch for arch in TARGETS if arch != "sm_90"]
    if not config.getoption("exhaustive"):
        others = [random.Random(f"architectures {config.getoption('draws')}").choice(others)]
    return ["sm_90", *others]


def forward_case(part: str, draw: str) -> Case:
    """A small block, so that many run. Fewer than 4 channels or hidden units are among the named cases.

    A whole block gets 8 channels at least. LayerNorm over 2 gives little more than a sign, which the rounding
    between the halves flips where they are close: a few such rows are then all of the error, of eager's too.
    fp64 gets well-conditioned rows: there the truth is no more exact than what is compared with it. Outlier
    channels are left to a named case, here and in the gradients: LayerNorm makes the same of them in every
    token, so that few roundings, or one, are all of the error.
    """
    rng = random.Random(f"forward {part} {draw}")
    dtype = rng.choice([BF16, BF16, FP16, FP16, FP32, FP64])
    wide = dtype.itemsize == 2 and rng.random() < 0.5
    batch, tokens = rng.randint(1, 3), rng.choice([rng.randint(1, 70), rng.choice(LONG)])
    channels, *hidden = (rng.randint(4, rng.choice([20, 90])) for _ in range(3))
    # Several tiles along every axis, but not hundreds: the interpreter runs them one by one.
    edges = [16, 32] if batch * tokens <= 100 else [32, 64]
    if rng.random() < 0.25:  # many steps of a sum
        hidden[rng.randrange(2)] = rng.randint(300, 1100)
    std = rng.choice([1.0, SMALL_STD])
    return Case(
        batch,
        tokens,
        max(channels, 8 if part == "block" or dtype == FP64 else 4),
        *hidden,
        dtype,
        x_dtype=FP32 if wide else None,
        norm_dtype=FP32 if dtype != FP64 and rng.random() < 0.5 else None,
        layout=rng.choice(LAYOUTS),
        biases=_flags(rng),
        approximate=rng.choice(["none", "tanh"]),
        eps=rng.choice([1e-6, 1e-5, 1e-3, 1e-12]) * std**2,
        scale=rng.choice(SCALES),
        std=std,
        mean=0.0 if dtype == FP64 else rng.choice([0.0, 10.0, 100.0]),
        tiles=_tiles(rng, edges),
        one_pass=rng.choice([None, None, False]),
        seed=rng.getrandbits(32),
    )


def forward_repeats(case: Case) -> int:
    """Enough draws that an error is the sum of many roundings, pooled: then it is no matter of luck."""
    elements = (1 if case.layout == "expanded" else case.B) * case.S * case.C
    hidden = case.C * min(case.D, case.E)
    return max(-(-800 // elements), -(-512 // hidden))


def gradient_case(part: str, draw: str) -> Case:
    """A block in either memory mode, also under real autocast.

    Not as small as the forward's: a bias's gradient has few elements, a relative error of few elements is
    luck, and many draws of them take the interpreter minutes. The extremes are among the named cases. fp64
    is gradcheck's: here the truth is fp64 itself.
    """
    rng = random.Random(f"gradients {part} {draw}")
    dtype = rng.choice([BF16, BF16, FP16, FP16, FP32])
    wide = dtype.itemsize == 2 and rng.random() < 0.5
    batch, tokens = rng.randint(1, 2), rng.choice([rng.randint(24, 70), rng.choice(LONG)])
    channels, *hidden = (rng.randint(24 if tokens <= 70 else 40, 90) for _ in range(3))
    std = rng.choice([1.0, SMALL_STD])
    return Case(
        batch,
        tokens,
        channels,
        *hidden,
        dtype,
        x_dtype=FP32 if wide else None,
        norm_dtype=FP32 if rng.random() < 0.5 else None,
        weight_dtype=FP32 if wide and rng.random() < 0.5 else None,
        layout=rng.choice(LAYOUTS),
        biases=_flags(rng),
        approximate=rng.choice(["none", "tanh"]),
        eps=rng.choice([1e-6, 1e-5, 1e-3, 1e-12]) * std**2,
        scale=rng.choice(SCALES),
        std=std,
        mean=rng.choice([0.0, 10.0, 100.0]),
        tiles=_tiles(rng, [16, 32] if tokens <= 40 else [32, 64]),
        one_pass=rng.choice([None, None, False]),
        g_layout=rng.choice(G_LAYOUTS),
        lean=rng.random() < 0.5,
        seed=rng.getrandbits(32),
    )


def gradient_repeats(case: Case, elements: int = 256) -> int:
    """Enough draws that the shortest gradient has so many elements, pooled, and 96 of outliers.

    LayerNorm makes nearly all of an outlier channel: it dominates the gradient of gamma.
    """
    # The gradient of a sum is one number: fewer different roundings.
    elements *= 2 if case.g_layout == "expanded everywhere" else 1
    shortest = -(-elements // min(case.S, case.C, case.D, case.E))
    return max(shortest, -(-96 // case.outliers)) if case.outliers else shortest


def _flags(rng: random.Random) -> tuple[bool, ...]:
    return tuple(rng.random() < 0.5 for _ in range(4))


def _tiles(rng: random.Random, edges: list[int]) -> TileConfig | None:
    """Tiles in half of the cases; in half of these products have descriptors, where they can."""
    if rng.random() < 0.5:
        return None
    described = rng.random() < 0.5
    persistent = described and rng.random() < 0.5
    return TileConfig(*(rng.choice(edges) for _ in range(3)), descriptors=described, persistent=persistent)

"""Finite stays finite: NaN and inf come out only where eager PyTorch has them, for x of every size.

What is huge overflows where sums and squares of it are taken. The answer is eager's: a row whose variance
overflows has rstd = 0, and its LayerNorm is beta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    Case,
    context_of,
    fused_run,
    gradients,
    leaves,
    make_half,
    make_x,
    moved,
    poisoned,
    run_eager,
    with_library,
)
from torch import Tensor

import fastmixer
from fastmixer import launch, parity
from fastmixer.configs import Library, TileConfig
from fastmixer.half import Half

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
HUGE = {BF16: 3e38, FP16: 6e4, FP32: 3e38, FP64: 1.7e308}

# Overflow is what these tests are about: NumPy, which interprets the kernels, remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def both_signs(row: Tensor, huge: float) -> None:
    row[::2], row[1::2] = huge, -huge


ROWS: dict[str, Callable[[Tensor, float], object]] = {
    "one element of 1e25": lambda row, huge: row[7].fill_(min(1e25, huge)),
    "the first element": lambda row, huge: row[0].fill_(huge),
    "the last element": lambda row, huge: row[-1].fill_(-huge),
    "two neighbours": lambda row, huge: row[2:4].fill_(huge),
    "two far apart": lambda row, huge: row[:: len(row) - 1].fill_(huge),
    "all": lambda row, huge: row.fill_(huge),
    "all but one": lambda row, huge: row[1:].fill_(-huge),
    "all of a channel block": lambda row, huge: row[:64].fill_(huge),
    "both signs": both_signs,
    "a variance that just overflows": lambda row, huge: row.mul_(huge**0.5),
    "a variance that just does not": lambda row, huge: row.mul_(huge**0.5 / 20),
    "a constant whose sum does not overflow": lambda row, huge: row.fill_(huge * 1e-3),
    "all of one sign": lambda row, huge: row.abs_().clamp_(0.5, 1).mul_(huge),
    "next to nothing": lambda row, huge: row.mul_(1e-40),
    "nothing": lambda row, huge: row.zero_(),
}

SIZES = len(ROWS), 9, 70, 24, 40
SHORT = {"tiles": TileConfig(64, 32, 32), "eps": 1e-2}  # two blocks of channels, whose moments are joined
LEAN = {**SHORT, "one_pass": False, "lean": True, "approximate": "tanh"}
CASES = {
    "bf16": Case(*SIZES, BF16, **SHORT),
    "fp16": Case(*SIZES, FP16, **SHORT),
    "fp32": Case(*SIZES, FP32, **SHORT),
    "fp64": Case(*SIZES, FP64, **SHORT),
    "fp32 by bf16": Case(*SIZES, BF16, x_dtype=FP32, **SHORT),
    "fp32 by fp16": Case(*SIZES, FP16, x_dtype=FP32, **SHORT),
    "bf16, two passes": Case(*SIZES, BF16, **LEAN),
    "fp32, two passes": Case(*SIZES, FP32, **LEAN),
    "bf16, library": Case(*SIZES, BF16, **SHORT),
    "fp32, library": Case(*SIZES, FP32, **SHORT),
}


def context_for(name: str, case: Case) -> launch.Context:
    context = context_of(case, CPU)
    if name.endswith("library"):
        return with_library(context, {"channel_fc1": Library.ATEN, "channel_fc2": Library.ATEN})
    return context


def parts(case: Case) -> tuple[Tensor, dict[str, Half], Tensor]:
    """x, both halves and an output gradient."""
    generator = torch.Generator().manual_seed(case.seed)
    x = make_x(case, generator)
    halves = {of: make_half(case, of + "s", generator) for of in ("token", "channel")}
    return x, halves, torch.randn(x.shape, generator=generator).to(x.dtype)


def output_and_gradients(run: Callable, x: Tensor, halves: dict[str, Half], g: Tensor) -> dict[str, Tensor]:
    x, halves = x.detach().clone(), {of: moved(half, CPU) for of, half in halves.items()}
    found = {}

    def keeping_y(x: Tensor, halves: dict[str, Half]) -> Tensor:
        found["y"] = run(x, halves)
        return found["y"]

    return gradients(keeping_y, x, halves, g) | {"y": found["y"].detach()}


@pytest.mark.parametrize("name", CASES)
def test_a_huge_row_leaves_everything_finite(name: str) -> None:
    """Each in a sample of its own. Eager on the CPU has NaN for some of them; on a GPU it has not."""
    case = CASES[name]
    x, halves, g = parts(case)
    for sample, fill in zip(x, ROWS.values(), strict=True):
        fill(sample[4], HUGE[x.dtype])
    assert x.isfinite().all()
    with poisoned():
        found = output_and_gradients(fused_run(case, context_for(name, case)), x, halves, g)
    bad = {
        name: sorted({row for row, ok in zip(ROWS, tensor.isfinite(), strict=True) if not ok.all()})
        for name in ("y", "x")
        if not (tensor := found.pop(name)).isfinite().all()
    }
    assert not bad, bad
    assert all(gradient.isfinite().all() for gradient in found.values())

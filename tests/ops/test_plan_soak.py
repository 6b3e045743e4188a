"""A soak of plans: random calls, each repeated without a plan; the bits must be the same."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import threading
from typing import NamedTuple

import pytest
import torch
from support import Case, block_inputs, laid_out, leaves
from torch import Tensor

import fastmixer
from fastmixer import functional, reference
from fastmixer.dtypes import product_dtype
from fastmixer.ops import autograd, launch, plan
from fastmixer.params import MixingParams

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES = (  # of x, of the weights, autocast's or None
    (FP32, FP32, None), (BF16, BF16, None), (FP16, FP16, None), (FP64, FP64, None), (FP32, BF16, None),
    (FP32, FP32, BF16),
)  # fmt: skip
LAYOUTS = ("contiguous", "contiguous", "transposed", "batch last", "channel slice", "expanded")
SHAPES = ((5, 8, 4, 12), (9, 16, 8, 8), (17, 8, 16, 24), (257, 4, 4, 4))  # tokens, channels, D, E


class Habit(NamedTuple):
    """How a block is called, again and again."""

    block: int
    halves: tuple[str, ...]
    batch: int
    layout: str
    g_layout: str
    needs_x: bool
    scale: str
    backend: str
    memory: str
    trains: bool


class Caller:
    """Random calls of blocks that live on and change between them. One seed, one sequence of calls."""

    def __init__(self, seed: int) -> None:
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.blocks = [self.new_block() for _ in range(6)]
        self.habits = [self.new_habit() for _ in range(8)]
        self.calls = self.differences = self.reference = 0

    def new_block(self) -> tuple[Case, dict[str, MixingParams]]:
        rng = self.random
        x_dtype, weight_dtype, product = rng.choice(DTYPES)
        wide = FP64 if x_dtype == FP64 else FP32
        case = Case(
            1,
            *rng.choices(SHAPES, (6, 6, 6, 1))[0],
            dtype=product or weight_dtype,
            x_dtype=x_dtype,
            norm_dtype=rng.choice([x_dtype, wide]),
            weight_dtype=weight_dtype,
            biases=tuple(rng.random() < 0.8 for _ in range(4)),
            approximate=rng.choice(["none", "tanh"]),
            eps=rng.choice([1e-6, 1e-5]),
            seed=rng.randrange(1 << 30),
        )
        halves = block_inputs(case)[1]
        for params in halves.values():
            for tensor in params[:6]:
                if tensor is not None:
                    tensor.requires_grad_(rng.random() < 0.6)
        return case, halves

    def change(self, index: int) -> None:
        """Does to a block what happens to blocks."""
        rng, (case, halves) = self.random, self.blocks[index]
        what = rng.choice(["another", "written", "moved", "misaligned", "strided", "frozen", "cast"])
        tensors = [t for params in halves.values() for t in params[:6] if t is not None]
        one = rng.choice(tensors)
        with torch.no_grad():
            if what == "another":
                self.blocks[index] = self.new_block()
            elif what == "written":
                one.mul_(0.5)
            elif what == "moved":
                one.data = one.data.clone()
            elif what == "misaligned":
                room = torch.empty(one.numel() + 1, dtype=one.dtype)[1:].view(one.shape)
                one.data = room.copy_(one.data)
            elif what == "strided":
                one.data = (
                    one.data.mT.contiguous().mT if one.ndim == 2 else one.data.repeat_interleave(2)[::2]
                )
            elif what == "frozen":
                one.requires_grad_(not one.requires_grad)
            elif case.x_dtype in (BF16, FP16):
                other = {BF16: FP16, FP16: BF16}[case.x_dtype]
                for tensor in tensors:
                    tensor.data = tensor.data.to(other if tensor.dtype == case.x_dtype else tensor.dtype)
                norm = other if case.norm_dtype != FP32 else FP32
                case = dataclasses.replace(
                    case, dtype=other, x_dtype=other, weight_dtype=other, norm_dtype=norm
                )
                self.blocks[index] = case, halves

    def new_habit(self) -> Habit:
        rng = self.random
        return Habit(
            rng.randrange(len(self.blocks)),
            rng.choice([("token",), ("channel",), ("token", "channel")]),
            rng.choice([1, 2, 3, 5]),
            rng.choice(LAYOUTS),
            rng.choice(LAYOUTS),
            rng.random() < 0.5,
            rng.choice(["none", "none", "number", "scalar", "vector", "column"]),
            rng.choices(["triton", "torch", "auto"], (8, 1, 1))[0],
            rng.choice(["balanced", "lean"]),
            rng.random() < 0.6,
        )

    def scale(self, kind: str, batch: int) -> Tensor | float | None:
        if kind in ("none", "number"):
            return None if kind == "none" else self.random.choice([1, 0.5, self.random.random()])
        shape = {"scalar": (), "vector": (batch,), "column": (batch, 1, 1)}[kind]
        return torch.rand(shape, generator=self.generator)

    def call(self) -> None:
        rng, index = self.random, self.random.randrange(len(self.habits))
        if rng.random() < 0.1:
            self.habits[index] = self.new_habit()
        habit = self.habits[index]
        if rng.random() < 0.1:
            self.change(habit.block)
        case, halves = self.blocks[habit.block]
        own = {
            h: halves[h]._replace(residual_scale=self.scale(habit.scale, habit.batch)) for h in habit.halves
        }
        x = torch.randn(habit.batch, case.S, case.C, generator=self.generator).to(case.x_dtype)
        x = laid_out(x, habit.layout).requires_grad_(habit.needs_x)
        grads = contextlib.nullcontext() if habit.trains else torch.no_grad()
        autocast = torch.autocast("cpu", case.dtype, enabled=case.weight_dtype == FP32 and case.dtype == BF16)
        with fastmixer.backend(habit.backend), fastmixer.memory(habit.memory), grads, autocast:
            found = self.results(functional.prepared(x, own)(), x, own, habit.g_layout)
            expected = self.results(self.planless(x, own, habit.backend), x, own, habit.g_layout)
        self.calls += 1
        self.reference += habit.backend != "triton"
        same = len(found) == len(expected) and all(map(torch.equal, found, expected))
        self.differences += not same

    @staticmethod
    def planless(x: Tensor, halves: dict[str, MixingParams], backend: str) -> Tensor:
        if backend != "triton":  # on a CPU "auto" is the reference, too
            for half, params in halves.items():
                x = getattr(reference, f"{half}_mixing")(x, **params._asdict())
            return x
        dtype = product_dtype(x.device, next(iter(halves.values())).fc1_weight.dtype)
        context = launch.context_of(x.device, kernels_only=True)
        return autograd.mix(x, halves, dtype, context, lean=fastmixer.current_memory() == "lean")

    def results(self, y: Tensor, x: Tensor, halves: dict[str, MixingParams], g_layout: str) -> list[Tensor]:
        """The output and every gradient that is wanted."""
        if not y.requires_grad:
            return [y]
        wanted = [t for t in leaves(x, halves).values() if t.requires_grad]
        g = laid_out(torch.ones_like(y).cumsum(1) / y.shape[1], g_layout)
        return [y.detach(), *torch.autograd.grad(y, wanted, g)]


def soak(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """So many calls, by two threads, with few plans kept."""
    monkeypatch.setattr(plan, "MOST_PLANS", 40)
    callers = [Caller(seed) for seed in range(2)]
    errors: list[BaseException] = []
    found = plan.find
    hits = [0]

    def counted(key: tuple) -> plan.Plan | None:
        kept = found(key)
        hits[0] += kept is not None
        return kept

    monkeypatch.setattr(plan, "find", counted)

    def run(caller: Caller) -> None:
        try:
            for _ in range(calls // 2):
                caller.call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(caller,)) for caller in callers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert sum(caller.calls for caller in callers) == calls
    assert sum(caller.differences for caller in callers) == 0
    assert sum(caller.reference for caller in callers) < calls / 2 < hits[0], "plans were used again"
    assert len(plan._plans) <= plan.MOST_PLANS
    del callers
    gc.collect()
    plans = [item for item in gc.get_objects() if isinstance(item, plan.Plan)]
    assert len(plans) <= plan.MOST_PLANS


@pytest.mark.filterwarnings("ignore::fastmixer.FallbackWarning")
def test_a_hundred_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    soak(100, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::fastmixer.FallbackWarning")
def test_many_calls(monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    """3,000 with --exhaustive."""
    soak(3000 if pytestconfig.getoption("exhaustive") else 300, monkeypatch)

"""Plans: they repeat what the launchers do, are found by all that they depend on, and stay few."""

from __future__ import annotations

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from support import Case, block_inputs, context_of, gradients, laid_out, leaves
from torch import Tensor
from torch.utils._pytree import tree_leaves

import fastmixer
from fastmixer import configs, functional
from fastmixer.aot.recording import recording
from fastmixer.configs import tables
from fastmixer.ops import autograd, launch, mixing, plan, plan_recording
from fastmixer.params import MixingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = Case(2, 10, 24, 12, 40, FP32)


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def block(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    return functional.prepared(x, halves)()


def planless(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    """The same without plans."""
    context = launch.context_of(x.device, kernels_only=True)
    dtype = functional.product_dtype(x.device, next(iter(halves.values())).fc1_weight.dtype)
    return autograd.mix(x, halves, dtype, context, lean=fastmixer.current_memory() == "lean")


# ---- keys ------------------------------------------------------------------------------------------------


def moved_by(tensor: Tensor, elements: int) -> Tensor:
    """The same values so many elements behind an aligned address."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)[elements:]
    return room.view(tensor.shape).copy_(tensor)


OTHER: dict[str, Callable[[Tensor, dict], tuple[Tensor, dict]]] = {
    "batch": lambda x, halves: (x[:1], halves),
    "strides": lambda x, halves: (laid_out(x, "transposed"), halves),
    "address": lambda x, halves: (moved_by(x, 1), halves),
    "a weight's address": lambda x, halves: (x, replaced(halves, fc1_weight=lambda t: moved_by(t, 1))),
    "a weight's strides": lambda x, halves: (x, replaced(halves, fc2_weight=lambda t: t.mT.contiguous().mT)),
    "a bias": lambda x, halves: (x, replaced(halves, fc1_bias=lambda t: None)),
    "a scale": lambda x, halves: (x, replaced(halves, residual_scale=lambda t: torch.ones(2))),
    "eps": lambda x, halves: (x, replaced(halves, eps=lambda eps: 1e-3)),
    "gelu": lambda x, halves: (x, replaced(halves, approximate=lambda name: "tanh")),
    "dtype": lambda x, halves: (x.bfloat16(), {h: MixingParams(*map(cast, p)) for h, p in halves.items()}),
    "a gradient": lambda x, halves: (x.clone().requires_grad_(), halves),
    "a gradient of a weight": lambda x, halves: (
        x, replaced(halves, fc1_weight=lambda t: t.clone().requires_grad_())
    ),
    "one half": lambda x, halves: (x, {"channel": halves["channel"]}),
}  # fmt: skip


def cast(value: object) -> object:
    return value.bfloat16() if isinstance(value, Tensor) else value


def replaced(halves: dict[str, MixingParams], **changes: Callable) -> dict[str, MixingParams]:
    """With fields of the token half changed."""
    token = halves["token"]
    return halves | {
        "token": token._replace(**{n: change(getattr(token, n)) for n, change in changes.items()})
    }


@pytest.mark.parametrize("what", OTHER)
def test_another_call_has_another_plan(what: str) -> None:
    x, halves, _ = block_inputs(SMALL)
    expected = block(x, halves)
    (first,) = plan._plans
    other_x, other = OTHER[what](x, halves)
    assert torch.equal(block(other_x, other), planless(other_x, other))
    assert len(plan._plans) == 2
    assert torch.equal(block(x, halves), expected) and len(plan._plans) == 2
    assert first in plan._plans


def test_switches_lead_to_other_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    x, halves, g = block_inputs(SMALL)

    def count() -> int:
        gradients(block, x, halves, g)
        return len(plan._plans)

    assert count() == 2, "forward and backward"
    with fastmixer.memory("lean"):
        assert count() == 4
    with torch.autocast("cpu", BF16):
        assert count() == 6
    with torch.no_grad():
        block(x, halves)
    with recording(configs.INTERPRETER, tf32=True):
        assert count() == 9
    monkeypatch.setattr(tables, "_edition", tables.edition() + 1)
    assert count() == count() == 11


def test_a_number_as_scale_is_no_part_of_the_key() -> None:
    x, halves, _ = block_inputs(SMALL)
    for scale in (0.5, 0.25, 2):
        scaled = replaced(halves, residual_scale=lambda _, scale=scale: scale)
        assert torch.equal(block(x, scaled), planless(x, scaled))
    assert len(plan._plans) == 1
    block(x, replaced(halves, residual_scale=lambda _: 1))
    block(x, halves)
    assert len(plan._plans) == 2, "1 is none"


@pytest.mark.parametrize(
    "change",
    [
        {"eps": True},
        {"approximate": "erf"},
        {"approximate": ["tanh"]},
        {"residual_scale": True},
        {"eps": np.float32(1.0)},
        {"fc2_bias": 3},
    ],
)
def test_a_plan_does_not_hide_a_wrong_argument(change: dict) -> None:
    """True == 1 == 1.0, also as a key."""
    x, halves, _ = block_inputs(dataclasses.replace(SMALL, eps=1.0))
    block(x, halves)
    with pytest.raises((TypeError, ValueError), match=f"token.{next(iter(change))}"):
        block(x, halves | {"token": halves["token"]._replace(**change)})


# ---- recordings ------------------------------------------------------------------------------------------


def test_a_recording_refuses_what_it_would_not_repeat() -> None:
    def computes(context: launch.Context, x: Tensor) -> list[Tensor]:
        out = torch.empty_like(x)
        context.call(torch.add, x.double(), 1, out=out)
        return [out]

    context = context_of(SMALL, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"_to_copy.* in a recording"):
        plan_recording.record(computes, context, plan.seen([torch.ones(4, 6)]))


def test_a_pointer_says_how_far_it_reaches() -> None:
    """AMD's code addresses up to 2 GiB behind a pointer by 32 bits."""
    look = torch.empty_strided((3, 5, 7), (1000, 7, 1), dtype=FP16)
    view = plan.View(0, 96, look.shape, look.stride(), look.dtype)
    pointer = plan_recording._Pointer(view, 4)
    assert pointer.ptr_range() == (2 * 1000 + 4 * 7 + 6 + 1) * 2
    assert pointer.data_ptr() == 100 and pointer.dtype == FP16


# ---- how many are kept -----------------------------------------------------------------------------------


def test_few_plans_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest go. None holds a tensor."""
    monkeypatch.setattr(plan, "MOST_PLANS", 3)
    x, halves, g = block_inputs(dataclasses.replace(SMALL, B=6))
    expected = gradients(block, x, halves, g)
    for batch in range(1, 6):
        block(x[:batch], halves)
    batches = [key[-1][0][0][0] for key in plan._plans]
    assert batches == [3, 4, 5]
    found = gradients(block, x, halves, g)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    for key, kept in plan._plans.items():
        held = [*tree_leaves(key), *(leaf for step in kept.steps for leaf in tree_leaves(vars_of(step)))]
        assert held and not any(isinstance(leaf, Tensor) for leaf in held)


def vars_of(step: object) -> dict:
    return step._asdict() if hasattr(step, "_asdict") else vars(step)


# ---- the workspace ---------------------------------------------------------------------------------------


def test_what_lives_at_once_does_not_overlap() -> None:
    rng = random.Random(0)
    for _ in range(200):
        starts = [(rng.randrange(1, 50), rng.randrange(12)) for _ in range(rng.randrange(1, 14))]
        lives = [(size, first, first + rng.randrange(6)) for size, first in starts]
        offsets, total = plan_recording._arranged(lives)
        for i, (size, first, last) in enumerate(lives):
            assert offsets[i] >= 0 and offsets[i] + size <= total
            for j, (other, start, end) in enumerate(lives[:i]):
                if first <= end and start <= last:
                    assert offsets[i] + size <= offsets[j] or offsets[j] + other <= offsets[i]
        at_once = max(sum(size for size, first, last in lives if first <= t <= last) for t in range(18))
        assert at_once <= total <= sum(size for size, *_ in lives)


def held(made: plan.Plan, inputs: int) -> list[int]:
    """Bytes that a call holds after each step, beside its inputs."""
    sizes, now, found = {}, made.workspace, []
    for step in made.steps:
        if isinstance(step, plan.Allocation):
            extent = 1 + sum((n - 1) * stride for n, stride in zip(step.shape, step.stride, strict=True))
            sizes[inputs + 1 + len(sizes)] = extent * step.dtype.itemsize
            now += [*sizes.values()][-1]
        elif isinstance(step, plan.Release):
            now -= sizes[step.memory]
        found.append(now)
    return found


def least(inputs: list, results: list, steps: list) -> int:
    """The most bytes that live at once if each tensor lives from its first use to its last, results on."""
    ours = {t.untyped_storage()._cdata for t in inputs if t is not None}
    ends = {t.untyped_storage()._cdata for t in results if t is not None}
    lives: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        for leaf in tree_leaves(vars_of(step)):
            if isinstance(leaf, Tensor) and (key := leaf.untyped_storage()._cdata) not in ours:
                end = len(steps) if key in ends else index
                lives.setdefault(key, [leaf.untyped_storage().nbytes(), index, end])[2] = end
    return max(sum(n for n, a, b in lives.values() if a <= t <= b) for t in range(len(steps)))


@pytest.mark.parametrize("lean", [False, True])
def test_a_call_holds_what_lives_at_once(lean: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a B/16 block in training: one tensor after the other would take as much at its peak."""
    case = Case(64, 196, 768, 384, 3072, BF16)
    x, halves, _ = block_inputs(dataclasses.replace(case, B=1))
    for tensor in leaves(x, halves).values():
        tensor.requires_grad_()
    tensors = [x.expand(case.B, -1, -1), *mixing.tensors_of(x, halves)[1:]]
    settings = mixing.settings_of(halves, BF16, mixing.needs_of(tensors), lean=lean)
    bounds, original = [], plan_recording._Memory
    monkeypatch.setattr(
        plan_recording, "_Memory", lambda *args: bounds.append(least(*args)) or original(*args)
    )

    def recorded(what: Callable, *given: Tensor | None) -> plan.Plan:
        context = context_of(case, x.device)
        return plan_recording.record(
            lambda own, *metas: what(settings, own, *metas), context, plan.seen(given)
        )

    first = recorded(mixing.forward, *tensors)
    allocations = [step for step in first.steps if isinstance(step, plan.Allocation)]
    made = [torch.empty_strided(*step[:2], dtype=step.dtype, device="meta") for step in allocations]
    y, *saved = [None if i is None else made[i - len(tensors) - 1] for i in first.results]
    given = y, tensors[0], *saved, *tensors[1:]
    second = recorded(mixing.backward, *given)
    peaks = [max(held(first, len(tensors))), max(held(second, len(given)))]
    assert all(bound <= peak <= 1.05 * bound for bound, peak in zip(bounds, peaks, strict=True))
    results = sum(t.nbytes for t in (x, *halves["token"][:6], *halves["channel"][:6]) if t is not None)
    assert held(second, len(given))[-1] <= second.workspace + results * 1.01 + (case.B - 1) * x.nbytes


def test_a_plan_returns_no_view() -> None:
    def part_of_what_is_computed(context: launch.Context, x: Tensor) -> list[Tensor]:
        out = torch.empty_like(x)
        context.call(torch.neg, x, out=out)
        return [out[1:]]

    look = plan.seen([torch.empty(4, 6)])
    context = context_of(SMALL, torch.device("cpu"))
    for function in (
        lambda _, x: [x],
        lambda _, x: [torch.empty_like(x)[1:]],
        part_of_what_is_computed,
    ):
        with pytest.raises(ValueError, match="a result is a view or an input"):
            plan_recording.record(function, context, look)


def test_two_threads_share_plans() -> None:
    x, halves, _ = block_inputs(SMALL)
    batches = [x[:1], x, laid_out(x, "transposed")]
    expected = [planless(b, halves) for b in batches]
    wrong: list[int] = []

    def calls(seed: int) -> None:
        rng = random.Random(seed)
        with fastmixer.backend("triton"):
            for _ in range(10):
                i = rng.randrange(3)
                if not torch.equal(block(batches[i], halves), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=calls, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(plan._plans) == 3

"""What a backward needs is computed, kept and launched, and nothing else."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from support import (
    A100,
    Case,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    leaves,
    with_sms,
)
from torch import Tensor

import fastmixer
from fastmixer import functional
from fastmixer.configs import Target, TileConfig
from fastmixer.ops import launch
from fastmixer.params import MixingParams, Needs

BF16, FP32 = torch.bfloat16, torch.float32
TILES = TileConfig(32, 32, 16)
SMALL = Case(2, 10, 24, 12, 40, FP32)


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def names_of(launched: list[launch.Launch]) -> list[str]:
    return [item.kernel_name for item in launched]


@pytest.mark.parametrize("part", ["token", "channel"])
@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("one_pass", [None, False])
def test_every_input_frozen_and_every_input_alone(part: str, lean: bool, one_pass: bool | None) -> None:
    """Whatever else is frozen, a gradient is the same bits, and no kernel that is not needed runs."""
    case = dataclasses.replace(SMALL, lean=lean, one_pass=one_pass, scale="vector")
    x, halves, g = block_inputs(case)
    halves = {part: halves[part]}
    launched: list[launch.Launch] = []

    def execute(item: launch.Launch) -> None:
        launched.append(item)
        launch.execute(item)

    context = dataclasses.replace(context_of(case, x.device), execute=execute)
    run = fused_run(case, context)
    everything = gradients(run, x, halves, g)
    everything_launched = names_of(launched)

    named = list(leaves(x, halves))
    subsets = [[n] for n in named] + [[m for m in named if m != n] for n in named]
    for subset in subsets:
        launched.clear()
        asked = leaves(x, halves)
        for name, tensor in asked.items():
            tensor.requires_grad_(name in subset)
        out = run(x, halves)
        found = torch.autograd.grad(out, [asked[n] for n in subset], g)
        for name, gradient in zip(subset, found, strict=True):
            assert torch.equal(gradient, everything[name]), (name, subset)
        assert len(names_of(launched)) <= len(everything_launched)
        short = {n.removeprefix(f"{part}.") for n in subset}
        ran = set(names_of(launched))
        if part == "token" and one_pass is None:
            assert ("token_wgrad" in ran) == bool(short & {"fc1_weight", "fc1_bias", "fc2_weight"})
            assert ("token_dgrad" in ran) == bool(short & {"x", "norm_weight", "norm_bias"})
        else:
            assert ("mlp_hidden_bwd" in ran) == (short != {"fc2_bias"})
        finished = bool(short & {"x", "norm_weight", "norm_bias", "fc2_bias"})
        assert ("layer_norm_bwd" in ran) == finished


def test_every_tensor_of_a_block_alone() -> None:
    """What the token half needs goes through the channel half, whose own gradients nobody may want."""
    x, halves, g = block_inputs(SMALL)

    def block(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
        return functional.mixer_block(x, halves["token"], halves["channel"])

    everything = gradients(block, x, halves, g)
    asked = leaves(x, halves)
    for name, alone in asked.items():
        for tensor in asked.values():
            tensor.requires_grad_(tensor is alone)
        (gradient,) = torch.autograd.grad(block(x, halves), alone, g)
        assert torch.equal(gradient, everything[name]), name


@pytest.mark.parametrize(
    "trainable, keeps_x, keeps_p",
    [
        ({"x"}, True, True),
        ({"norm_bias"}, True, True),
        ({"fc1_weight"}, True, True),
        ({"fc1_bias"}, False, True),
        ({"fc2_weight"}, False, True),
        ({"fc2_bias"}, False, False),
    ],
)
def test_what_is_not_needed_is_not_kept(trainable: set, keeps_x: bool, keeps_p: bool) -> None:
    x, halves, _ = block_inputs(SMALL)
    for name, tensor in leaves(x, {"channel": halves["channel"]}).items():
        tensor.requires_grad_(name.removeprefix("channel.") in trainable)
    out = functional.channel_mixing(x, **halves["channel"]._asdict())
    kept_x, _, _, _, kept_p, *_ = out.grad_fn.saved_tensors
    assert (kept_x is not None) == keeps_x and (kept_p is not None) == keeps_p
    with fastmixer.memory("lean"):
        out = functional.channel_mixing(x, **halves["channel"]._asdict())
    kept_x, _, _, _, kept_p, *_ = out.grad_fn.saved_tensors
    assert kept_p is None and (kept_x is not None) == (trainable != {"fc2_bias"})
    for name, tensor in leaves(x, {"token": halves["token"]}).items():
        tensor.requires_grad_(name.removeprefix("token.") in trainable)
    out = functional.token_mixing(x, **halves["token"]._asdict())
    assert (out.grad_fn.saved_tensors[0] is not None) == (trainable != {"fc2_bias"})


def test_nothing_that_needs_gradients_keeps_nothing() -> None:
    x, halves, _ = block_inputs(SMALL)
    assert functional.mixer_block(x, *halves.values()).grad_fn is None
    for tensor in leaves(x, halves).values():
        tensor.requires_grad_()
    with torch.no_grad():
        assert functional.mixer_block(x, *halves.values()).grad_fn is None


def test_gradients_say_what_they_need() -> None:
    for flags in itertools.product([False, True], repeat=7):
        needs = Needs(*flags)
        assert bool(needs.hidden) == any(flags[:6])
        assert bool(needs.before_fc1) == any(flags[:3]) and bool(needs.before_gelu) == any(flags[:5])


# ---- which results a launch has --------------------------------------------------------------------------


OUTPUTS = (
    *("hidden_ptr", "dp_ptr", "db1_ptr", "dw1_ptr", "dw2_ptr", "dn_ptr"),
    *("dx_ptr", "dgamma_ptr", "dbeta_ptr", "column_sums_ptr", "row_sums_ptr"),
)
FINISHED = {"x": "dx_ptr", "norm_weight": "dgamma_ptr", "norm_bias": "dbeta_ptr"}
TWO_PASS = {
    **{name: {"dp_ptr", "dn_ptr", pointer} for name, pointer in FINISHED.items()},
    "fc1_weight": {"dp_ptr"},
    "fc1_bias": {"db1_ptr"},
    "fc2_weight": {"hidden_ptr"},
}
ONE_PASS = {
    **{name: {"dn_ptr", pointer} for name, pointer in FINISHED.items()},
    "fc1_weight": {"dw1_ptr"},
    "fc1_bias": {"db1_ptr"},
    "fc2_weight": {"dw2_ptr"},
}


def launches_for(needed: str, part: str, case: Case, target: Target) -> list[launch.Launch]:
    """What the backward launches where one input needs its gradient; nothing runs."""
    x, halves, g = block_inputs(case)
    launched: list[launch.Launch] = []
    context = dataclasses.replace(context_of(case, x.device), target=target, execute=launched.append)
    halves = {part: halves[part]}
    asked = leaves(x, halves)
    wanted = asked[needed if needed == "x" else f"{part}.{needed}"].requires_grad_()
    out = fused_run(case, context)(x, halves)
    launched.clear()
    torch.autograd.grad(out, wanted, g)
    return launched


@pytest.mark.parametrize("needed", [*TWO_PASS, "fc2_bias"])
@pytest.mark.parametrize("lean", [False, True], ids=["balanced", "lean"])
@pytest.mark.parametrize("design", ["one launch", "two launches", "two passes", "channel"])
def test_only_what_is_needed_is_made(design: str, needed: str, lean: bool) -> None:
    part = "channel" if design == "channel" else "token"
    one_pass = False if design == "two passes" else None
    case = Case(2, 101, 37, 19, 35, BF16, scale="vector", tiles=TILES, one_pass=one_pass, lean=lean)
    launched = launches_for(needed, part, case, A100 if design == "two launches" else with_sms(2))
    written = {name for item in launched for name in OUTPUTS if item.args.get(name) is not None}
    sums = "column_sums_ptr" if part == "channel" else "row_sums_ptr"
    expected = (ONE_PASS if "launch" in design else TWO_PASS) | {"fc2_bias": {sums}}
    assert written == expected[needed]
    normalises = [item for item in launched if "y_ptr" in item.args and item.args["moments_ptr"] is not None]
    reads_n = needed != "fc2_bias" and (part == "token" or lean or needed == "fc1_weight")
    assert len(normalises) == reads_n, "n is made where it is read"
    packed = [len(item.args["layers"]) for item in launched if item.kernel_name == "pack_weights"]
    reads_fc1 = part == "token" or lean or needed in FINISHED
    assert packed == ([] if needed == "fc2_bias" else [1 + reads_fc1]), (
        "layers are packed where they are read"
    )

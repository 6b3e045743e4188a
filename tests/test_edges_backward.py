"""Edges of the backward that random cases seldom meet: shares of sums, offsets, what is not needed."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import (
    Case,
    context_of,
    fused_run,
    gradients,
    leaves,
    make_half,
    make_x,
    run_eager,
    run_gradients,
)
from torch import Tensor

from fastmixer.configs import INTERPRETER, Target, TileConfig
from fastmixer.ops import launch
from fastmixer.params import MixingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
TILES = TileConfig(32, 32, 16)
A100 = Target("cuda", 80, 3, 163 * 1024)  # dW1 and dW2 take a launch each beyond 64 tokens
SPREAD = {"scale": "vector", "mean": 3.0, "tiles": TILES}


def sms(number: int) -> Target:
    """How many SMs there are decides how sums over samples are split."""
    return dataclasses.replace(INTERPRETER, multiprocessors=number)


SIZES = 3, 41, 70, 40, 70, FP32
# Ragged in every axis but for one; most in fp32, where eager is exact enough to notice small mistakes.
NAMED = {
    "one share": (Case(2, 101, 37, 70, 40, FP32, **SPREAD, lean=True), sms(1)),
    "many shares, the last empty": (Case(5, 41, 70, 40, 70, FP32, **SPREAD), sms(4)),
    "shares that end within a sample": (Case(2, 41, 150, 70, 40, FP32, **SPREAD, lean=True), sms(5)),
    "dW1 and dW2 apart": (Case(2, 101, 37, 70, 40, FP32, **SPREAD), A100),
    "two passes": (Case(*SIZES, **SPREAD, one_pass=False, layout="strided channels"), sms(2)),
    "strides": (Case(*SIZES, **SPREAD, layout="batch last", g_layout="strided channels"), sms(1)),
    "tanh": (Case(*SIZES, **SPREAD, approximate="tanh", eps=1e-2, lean=True), sms(2)),
    "autocast": (Case(*SIZES[:5], BF16, **SPREAD, x_dtype=FP32, weight_dtype=FP32), sms(2)),
    "even": (Case(2, 64, 64, 64, 64, FP32, **SPREAD), sms(2)),
}


@pytest.mark.parametrize("name", NAMED)
def test_named(name: str) -> None:
    case, target = NAMED[name]
    context = dataclasses.replace(context_of(case, CPU), target=target)
    results = run_gradients("block", case, CPU, context=context)
    bad = {of: str(result) for of, result in results.items() if not result.ok}
    assert len(results) == 13 and not bad, bad


def parts(case: Case) -> tuple[Tensor, dict[str, MixingParams], Tensor]:
    """x, both halves and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    x = make_x(case, generator)
    halves = {of: make_half(case, of + "s", generator) for of in ("token", "channel")}
    return x, halves, torch.randn(x.shape, generator=generator).to(x.dtype)


@pytest.mark.parametrize("one_pass", [None, False])
@pytest.mark.parametrize("strides", [(2**30 + 8, 24, 1), (1, 2**27 + 8, 8), (8, 24, 2**30 // 8 + 8)])
def test_offsets_beyond_int32(strides: tuple[int, ...], one_pass: bool | None) -> None:
    case = Case(3, 17, 20, 16, 24, FP16, one_pass=one_pass, lean=True)
    x, halves, g = parts(case)
    extent = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    assert extent > 2**31
    far = [torch.empty(extent, dtype=case.dtype).as_strided(x.shape, strides).copy_(t) for t in (x, g)]
    run = fused_run(case, context_of(case, CPU))
    near = gradients(run, x, halves, g)
    for name, gradient in gradients(run, far[0], halves, far[1]).items():
        assert torch.equal(gradient, near[name]), name


OUTPUTS = (
    *("hidden_ptr", "dhidden_ptr", "db1_ptr", "dw1_ptr", "dw2_ptr", "dn_ptr"),
    *("dx_ptr", "dgamma_ptr", "dbeta_ptr", "column_sums_ptr", "row_sums_ptr"),
)
FINISHED = {"x": "dx_ptr", "norm_weight": "dgamma_ptr", "norm_bias": "dbeta_ptr"}
TWO_PASS = {
    **{name: {"dhidden_ptr", "dn_ptr", pointer} for name, pointer in FINISHED.items()},
    "fc1_weight": {"dhidden_ptr"},
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
    launched: list[launch.Launch] = []
    context = dataclasses.replace(context_of(case, CPU), target=target, execute=launched.append)
    x, halves, g = parts(case)
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
    launched = launches_for(needed, part, case, A100 if design == "two launches" else sms(2))
    written = {name for item in launched for name in OUTPUTS if item.args.get(name) is not None}
    sums = "column_sums_ptr" if part == "channel" else "row_sums_ptr"
    expected = (ONE_PASS if "launch" in design else TWO_PASS) | {"fc2_bias": {sums}}
    assert written == expected[needed]
    normalises = [item for item in launched if "y_ptr" in item.args and item.args["moments_ptr"] is not None]
    reads_n = needed != "fc2_bias" and (part == "token" or lean or needed == "fc1_weight")
    assert len(normalises) == reads_n, "n is made where it is read"


@pytest.mark.parametrize(("target", "launches"), [(sms(2), 1), (A100, 2)])
def test_both_weights_in_as_many_launches_as_configs_says(target: Target, launches: int) -> None:
    case = Case(2, 101, 37, 19, 35, BF16, tiles=TILES)
    launched: list[launch.Launch] = []
    context = dataclasses.replace(context_of(case, CPU), target=target, execute=launched.append)
    x, halves, g = parts(case)
    gradients(fused_run(case, context), x, {"token": halves["token"]}, g)
    weights = [item.args for item in launched if "dw1_ptr" in item.args]
    assert len(weights) == launches
    for pointer in ("dw1_ptr", "db1_ptr", "dw2_ptr"):
        assert sum(args[pointer] is not None for args in weights) == 1, pointer


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("one_pass", [None, False])
@pytest.mark.parametrize("part", ["token", "channel"])
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_eager_has_it(
    value: float, where: str, part: str, one_pass: bool | None
) -> None:
    """In the last element, which tiles beyond the end must not repeat into anybody else's sums."""
    case = Case(3, 21, 20, 33, 40, FP32, tiles=TILES, one_pass=one_pass)
    x, halves, g = parts(case)
    halves = {part: halves[part]}
    (x if where == "x" else g)[1, -1, -1] = value
    expected = gradients(run_eager, x, halves, g)
    for name, gradient in gradients(fused_run(case, context_of(case, CPU)), x, halves, g).items():
        assert torch.equal(gradient.isfinite(), expected[name].isfinite()), name


@pytest.mark.parametrize("one_pass", [None, False])
@pytest.mark.parametrize("part", ["token", "channel"])
def test_a_scale_of_zero_gives_the_gradient_its_own_bits(part: str, one_pass: bool | None) -> None:
    """Under autocast too: what the residual carries is never rounded to the products' dtype."""
    case = Case(3, 21, 37, 19, 35, BF16, x_dtype=FP32, weight_dtype=FP32, tiles=TILES, one_pass=one_pass)
    x, halves, g = parts(case)
    halves = {part: halves[part]._replace(residual_scale=0.0)}
    found = gradients(fused_run(case, context_of(case, CPU)), x, halves, g)
    assert torch.equal(found.pop("x"), g)
    assert not any(gradient.any() for gradient in found.values())

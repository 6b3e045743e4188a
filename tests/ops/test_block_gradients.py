"""Parity of every gradient with the fp64 truth, by ``fastmixer.parity``; edges of the backward.

This is the backward of each half too, by the parts "token" and "channel". What is particular to one half is
in ``test_token_mixing.py`` and ``test_channel_mixing.py``; the forward in ``test_block_parity.py``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from draws import DRAWN_ELEMENTS, generated, gradient_case, gradient_repeats
from support import (
    A100,
    Case,
    assert_parity,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    run_gradients,
    with_sms,
)
from test_block_parity import NAMED

from fastmixer import configs, parity
from fastmixer.aot.catalogue import MODEL_BLOCKS
from fastmixer.configs import TileConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@generated(1, 7, 40)
@pytest.mark.parametrize("part", ["token", "channel"])
def test_generated_gradients_of_a_half(part: str, draw: str, device: torch.device) -> None:
    assert_parity(drawn_gradients(part, draw, device))


@generated(0, 3, 40)
def test_generated_gradients_of_a_block(draw: str, device: torch.device) -> None:
    assert_parity(drawn_gradients("block", draw, device))


def drawn_gradients(part: str, draw: str, device: torch.device) -> dict[str, parity.Parity]:
    case = gradient_case(part, draw)
    return run_gradients(part, case, device, gradient_repeats(case, DRAWN_ELEMENTS))


# Of a gradient of few numbers a relative error is luck: theirs are in test_exact_sums.py.
FEW_NUMBERS = ("one token", "one channel")
LONG_RUNS = ("4096 tokens", "4096 tokens, autocast", "outlier channel")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG_RUNS else name
        for name in NAMED
        if name not in FEW_NUMBERS and NAMED[name].dtype != torch.float64
    ],
)
def test_named_gradients(name: str, device: torch.device) -> None:
    assert_parity(run_gradients("block", NAMED[name], device, gradient_repeats(NAMED[name])))


@pytest.mark.parametrize("name", ["fp16", "autocast", "448 pixels", "transposed"])
def test_named_gradients_with_lean_memory(name: str, device: torch.device) -> None:
    case = dataclasses.replace(NAMED[name], lean=True)
    assert_parity(run_gradients("block", case, device, gradient_repeats(case)))


QUICK = ("S/32", "B/16")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_BLOCKS]
)
def test_gradients_of_the_blocks_of_the_seven_models(name: str, device: torch.device) -> None:
    assert_parity(run_gradients("block", Case(1, *MODEL_BLOCKS[name], mean=1.0), device))


AUTOCAST = {"x_dtype": FP32, "weight_dtype": FP32}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_under_autocast(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(2, 196, 256, 128, 512, dtype, **AUTOCAST, scale="column", mean=10.0)
    assert_parity(run_gradients("block", case, device))


@pytest.mark.parametrize("name", ["S/32", "S/16"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_86"])
def test_gradients_with_the_tiles_of_a_gpu(name: str, arch: str, device: torch.device) -> None:
    """The interpreter's default tiles are large: here it walks the many small ones that a GPU would."""
    shape = MODEL_BLOCKS[name]._replace(channels=128, token_hidden=256, channel_hidden=256)
    case = Case(2, *shape, mean=3.0)
    target = configs.TARGETS[arch]
    context = dataclasses.replace(
        context_of(case, device), choose=lambda op, problem, _: configs.select_kernels(op, problem, target)
    )
    assert_parity(run_gradients("block", case, device, context=context))


# ---- edges that random cases seldom meet: shares of sums, strides, offsets -------------------------------

CPU = torch.device("cpu")
TILES = TileConfig(32, 32, 16)
SPREAD = {"scale": "vector", "mean": 3.0, "tiles": TILES}
SIZES = 3, 41, 70, 40, 70, FP32
# Ragged in every axis but for one; most in fp32, where eager is exact enough to notice small mistakes.
EDGES = {
    "one share": (Case(2, 101, 37, 70, 40, FP32, **SPREAD, lean=True), with_sms(1)),
    "many shares, the last empty": (Case(5, 41, 70, 40, 70, FP32, **SPREAD), with_sms(4)),
    "shares that end within a sample": (
        Case(2, 41, 150, 70, 40, FP32, **SPREAD, lean=True),
        with_sms(5),
    ),
    "dW1 and dW2 apart": (Case(2, 101, 37, 70, 40, FP32, **SPREAD), A100),
    "two passes": (Case(*SIZES, **SPREAD, one_pass=False, layout="strided channels"), with_sms(2)),
    "strides": (
        Case(*SIZES, **SPREAD, layout="batch last", g_layout="strided channels"),
        with_sms(1),
    ),
    "strided gradient": (
        Case(*SIZES, mean=3.0, tiles=TILES, g_layout="strided channels"),
        with_sms(2),
    ),
    "tiles deeper than wide": (
        Case(2, 48, 48, 48, 48, FP32, tiles=TileConfig(32, 16, 32), one_pass=False),
        with_sms(2),
    ),
    "tanh": (Case(*SIZES, **SPREAD, approximate="tanh", eps=1e-2, lean=True), with_sms(2)),
    "autocast": (Case(*SIZES[:5], BF16, **SPREAD, x_dtype=FP32, weight_dtype=FP32), with_sms(2)),
    "even": (Case(2, 64, 64, 64, 64, FP32, **SPREAD), with_sms(2)),
}


@pytest.mark.parametrize("name", EDGES)
def test_named(name: str) -> None:
    case, target = EDGES[name]
    context = dataclasses.replace(context_of(case, CPU), target=target)
    results = run_gradients("block", case, CPU, context=context)
    assert len(results) == 13
    assert_parity(results)


@pytest.mark.parametrize("one_pass", [None, False])
@pytest.mark.parametrize("strides", [(2**30 + 8, 24, 1), (1, 2**27 + 8, 8), (8, 24, 2**30 // 8 + 8)])
def test_offsets_beyond_int32(strides: tuple[int, ...], one_pass: bool | None) -> None:
    case = Case(3, 17, 20, 16, 24, FP16, one_pass=one_pass, lean=True)
    x, halves, g = block_inputs(case)
    extent = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    assert extent > 2**31
    far = [torch.empty(extent, dtype=case.dtype).as_strided(x.shape, strides).copy_(t) for t in (x, g)]
    run = fused_run(case, context_of(case, CPU))
    near = gradients(run, x, halves, g)
    for name, gradient in gradients(run, far[0], halves, far[1]).items():
        assert torch.equal(gradient, near[name]), name


@pytest.mark.parametrize("one_pass", [None, False])
@pytest.mark.parametrize("part", ["token", "channel"])
def test_a_scale_of_zero_gives_the_gradient_its_own_bits(part: str, one_pass: bool | None) -> None:
    """Under autocast too: what the residual carries is never rounded to the products' dtype."""
    case = Case(3, 21, 37, 19, 35, BF16, x_dtype=FP32, weight_dtype=FP32, tiles=TILES, one_pass=one_pass)
    x, halves, g = block_inputs(case)
    halves = {part: halves[part]._replace(residual_scale=0.0)}
    found = gradients(fused_run(case, context_of(case, CPU)), x, halves, g)
    assert torch.equal(found.pop("x"), g)
    assert not any(gradient.any() for gradient in found.values())

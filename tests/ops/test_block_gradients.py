"""Parity of every gradient with the fp64 truth, by the criterion of ``fastmixer.parity``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from draws import DRAWN_ELEMENTS, PARTS, generated, gradient_case, gradient_repeats
from support import Case, context_of, run_gradients
from test_kernels import NAMED

from fastmixer import configs
from fastmixer.aot.catalogue import MODEL_BLOCKS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def check(results: dict) -> None:
    bad = {name: str(result) for name, result in results.items() if not result.ok}
    assert results and not bad, bad


@generated(1, 8, 40)
@pytest.mark.parametrize("part", PARTS)
def test_generated_gradients(part: str, draw: str, device: torch.device) -> None:
    case = gradient_case(part, draw)
    check(run_gradients(part, case, device, gradient_repeats(case, DRAWN_ELEMENTS)))


# Shapes with gradients of few numbers: smaller than the forward's, and many draws of them.
EXTREMES = {
    "one of everything": Case(8, 1, 1, 1, 1, BF16),
    "one token": Case(4, 1, 96, 5, 70, BF16),
    "one channel": Case(4, 50, 1, 30, 3, FP16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXTREMES)
def test_gradients_of_extreme_shapes(name: str, device: torch.device) -> None:
    # One number a gradient and draw, and few draws make most of their norm: the more of them.
    draws = 256 if name == "one of everything" else 128
    check(run_gradients("block", EXTREMES[name], device, draws))


LONG_RUNS = ("4096 tokens", "4096 tokens, autocast", "outlier channel")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG_RUNS else name
        for name in NAMED
        if name not in EXTREMES and NAMED[name].dtype != torch.float64
    ],
)
def test_named_gradients(name: str, device: torch.device) -> None:
    check(run_gradients("block", NAMED[name], device, gradient_repeats(NAMED[name])))


@pytest.mark.parametrize("name", ["fp16", "autocast", "448 pixels", "transposed"])
def test_named_gradients_with_lean_memory(name: str, device: torch.device) -> None:
    case = dataclasses.replace(NAMED[name], lean=True)
    check(run_gradients("block", case, device, gradient_repeats(case)))


def test_fp32_gradients_of_a_sum(device: torch.device) -> None:
    """Where all of g is one number, roundings of a bias's gradient add up instead of cancelling."""
    case = Case(3, 256, 75, 64, 75, FP32, mean=100.0, scale="float", g_layout="expanded everywhere")
    check(run_gradients("channel", case, device, 8))


QUICK = ("S/32", "B/16")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_BLOCKS]
)
def test_gradients_of_the_blocks_of_the_seven_models(name: str, device: torch.device) -> None:
    check(run_gradients("block", Case(1, *MODEL_BLOCKS[name], mean=1.0), device))


AUTOCAST = {"x_dtype": FP32, "weight_dtype": FP32}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_gradients_under_autocast(dtype: torch.dtype, device: torch.device) -> None:
    case = Case(2, 196, 256, 128, 512, dtype, **AUTOCAST, scale="column", mean=10.0)
    check(run_gradients("block", case, device))


@pytest.mark.parametrize("name", ["S/32", "S/16"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_86"])
def test_gradients_with_the_tiles_of_a_gpu(name: str, arch: str, device: torch.device) -> None:
    """The interpreter's default tiles are large: here it walks the many small ones that a GPU would."""
    shape = MODEL_BLOCKS[name]._replace(channels=128, token_hidden=256, channel_hidden=256)
    case = Case(2, *shape, mean=3.0)
    target = configs.TARGETS[arch]
    context = dataclasses.replace(
        context_of(case, device), select=lambda op, problem, _: configs.select_kernels(op, problem, target)
    )
    check(run_gradients("block", case, device, context=context))

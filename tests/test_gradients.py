"""Parity of every gradient with the fp64 truth, by the criterion of ``fastmixer.parity``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from support import LAYOUTS, SCALES, Case, context_of, draws, run_gradients
from test_kernels import NAMED, PARTS

from fastmixer import configs
from fastmixer.catalogue import MODEL_BLOCKS
from fastmixer.configs import TileConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
G_LAYOUTS = (*LAYOUTS, "expanded everywhere")


def check(results: dict) -> None:
    bad = {name: str(result) for name, result in results.items() if not result.ok}
    assert results and not bad, bad


@st.composite
def gradient_cases(draw: st.DrawFn, part: str) -> Case:
    """Blocks of any shape, dtype, layout and option, in either memory mode, and under real autocast.

    Not as small as the forward's: a bias's gradient has few elements, a relative error of few elements is
    luck, and many draws of them take the interpreter minutes. The extremes are among the named cases. fp64
    is gradcheck's: here the truth is fp64 itself.
    """
    dtype = draw(st.sampled_from([BF16, BF16, FP16, FP16, FP32]))
    wide = dtype.itemsize == 2 and draw(st.booleans())
    tokens = draw(st.one_of(st.integers(24, 70), st.sampled_from([49, 64, 130, 196, 256, 257, 300])))
    size = st.integers(24 if tokens <= 70 else 40, 90)
    edge = st.sampled_from([16, 32] if tokens <= 40 else [32, 64])
    return Case(
        draw(st.integers(1, 2)),
        tokens,
        draw(size),
        draw(size),
        draw(size),
        dtype,
        x_dtype=FP32 if wide else None,
        norm_dtype=FP32 if draw(st.booleans()) else None,
        weight_dtype=FP32 if wide and draw(st.booleans()) else None,
        layout=draw(st.sampled_from(LAYOUTS)),
        biases=draw(st.tuples(*[st.booleans()] * 4)),
        approximate=draw(st.sampled_from(["none", "tanh"])),
        eps=draw(st.sampled_from([1e-6, 1e-5, 1e-3, 1e-12])),
        scale=draw(st.sampled_from(SCALES)),
        mean=draw(st.sampled_from([0.0, 10.0, 100.0])),
        outliers=draw(st.sampled_from([0, 0, 0, 4])) if tokens <= 70 else 0,
        tiles=draw(st.one_of(st.none(), st.builds(TileConfig, edge, edge, edge))),
        one_pass=draw(st.sampled_from([None, None, False])),
        g_layout=draw(st.sampled_from(G_LAYOUTS)),
        lean=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32)),
    )


def check_generated(part: str, device: torch.device, examples: int, chunk: int = 0) -> None:
    @seed(chunk)  # which cases CI sees must not be a matter of luck
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],
    )
    @given(case=gradient_cases(part))
    def check_case(case: Case) -> None:
        check(run_gradients(part, case, device, repeats_of(case)))

    check_case()


@pytest.mark.parametrize("part", PARTS)
def test_generated_gradients(part: str, device: torch.device) -> None:
    check_generated(part, device, draws(2, device))


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(1, 7))
@pytest.mark.parametrize("part", PARTS)
def test_many_generated_gradients(part: str, chunk: int, device: torch.device) -> None:
    check_generated(part, device, 17, chunk)


def repeats_of(case: Case) -> int:
    """Enough draws that the shortest gradient has 256 elements, pooled, and 96 of outliers.

    LayerNorm makes nearly all of an outlier channel: it dominates the gradient of gamma.
    """
    # The gradient of a sum is one number: fewer different roundings.
    elements = 512 if case.g_layout == "expanded everywhere" else 256
    shortest = -(-elements // min(case.S, case.C, case.D, case.E))
    return max(shortest, -(-96 // case.outliers)) if case.outliers else shortest


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
    draws = 384 if name == "one of everything" else 128
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
    check(run_gradients("block", NAMED[name], device, repeats_of(NAMED[name])))


@pytest.mark.parametrize("name", ["fp16", "autocast", "448 pixels", "transposed"])
def test_named_gradients_with_lean_memory(name: str, device: torch.device) -> None:
    case = dataclasses.replace(NAMED[name], lean=True)
    check(run_gradients("block", case, device, repeats_of(case)))


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

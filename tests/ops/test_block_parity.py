"""Parity of the kernels with the fp64 truth, by the criterion of ``fastmixer.parity``."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from draws import PARTS, forward_case, forward_repeats, generated
from support import Case, context_of, make_half, make_x, moved, run_case

from fastmixer import configs
from fastmixer.aot.catalogue import MODEL_BLOCKS
from fastmixer.configs import TileConfig
from fastmixer.ops import channel_mixing, token_mixing
from fastmixer.ops.row_moments import moments_constants

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@generated(4, 20, 110)
@pytest.mark.parametrize("part", PARTS)
def test_generated_cases(part: str, draw: str, device: torch.device) -> None:
    case = forward_case(part, draw)
    result = run_case(part, case, device, forward_repeats(case))
    assert result.ok, (case, result)


@pytest.mark.parametrize("name", MODEL_BLOCKS)
def test_blocks_of_the_seven_models(name: str, device: torch.device) -> None:
    result = run_case("block", Case(1, *MODEL_BLOCKS[name], mean=1.0), device)
    assert result.ok, result


NAMED = {
    "fp16": Case(2, 196, 128, 96, 256, FP16),
    "fp32": Case(2, 196, 128, 96, 256, FP32),
    "fp64": Case(2, 49, 64, 48, 128, FP64),
    "autocast": Case(2, 196, 128, 96, 256, BF16, x_dtype=FP32),
    "autocast far from zero": Case(2, 196, 128, 96, 256, FP16, x_dtype=FP32, mean=100.0),
    "far from zero": Case(2, 196, 128, 96, 256, BF16, mean=100.0),
    "outlier channel": Case(2, 196, 128, 96, 256, BF16, mean=10.0, outliers=4),
    "norm in fp32": Case(2, 49, 128, 96, 256, BF16, norm_dtype=FP32),
    "nothing but weights": Case(2, 49, 128, 96, 256, BF16, biases=(False,) * 4),
    "tanh, drop path": Case(8, 49, 64, 48, 128, BF16, approximate="tanh", scale="column"),
    "one of everything": Case(700, 1, 1, 1, 1, BF16),
    "one token": Case(8, 1, 96, 5, 70, BF16),
    "one channel": Case(8, 100, 1, 30, 3, FP16),
    "no padding for the bias": Case(2, 64, 64, 48, 64, BF16),
    "one spare token": Case(2, 63, 64, 48, 64, BF16),
    "last of one pass": Case(1, 256, 40, 48, 64, BF16),
    "first of two passes": Case(1, 257, 40, 48, 64, BF16),
    "448 pixels": Case(1, 784, 96, 128, 96, BF16),
    "4096 tokens": Case(1, 4096, 16, 32, 24, BF16),
    "4096 tokens, autocast": Case(1, 4096, 16, 32, 24, FP16, x_dtype=FP32),
    "transposed": Case(2, 49, 64, 48, 128, BF16, layout="transposed"),
    "transposed, long": Case(2, 300, 40, 48, 64, FP16, layout="transposed"),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name: str, device: torch.device) -> None:
    result = run_case("block", NAMED[name], device)
    assert result.ok, result


@pytest.mark.parametrize("name", ["S/32", "S/16"])
def test_blocks_with_the_tiles_of_a_gpu(name: str, device: torch.device) -> None:
    """The interpreter's default tiles are large: here it walks the many small ones that an H100 would."""
    shape = MODEL_BLOCKS[name]._replace(channel_hidden=640)
    case = Case(1, *shape, mean=3.0)
    context = dataclasses.replace(
        context_of(case, device),
        select=lambda op, problem, _: configs.select_kernels(op, problem, configs.TARGETS["sm_90"]),
    )
    result = run_case("block", case, device, context=context)
    assert result.ok, result


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_eager_puts_it(part: str, value: float, device: torch.device) -> None:
    """One bad element spoils its sample in the token half, its row in the channel half, and nothing else."""
    result = run_case(part, Case(3, 20, 24, 33, 40, FP16), device, bad_element=value)
    assert result.ok, result


@pytest.mark.gpu
def test_outputs_beyond_int32() -> None:
    """A B/16 batch of over 2**31 elements: its last sample is what that sample gives alone."""
    case = Case(1, *MODEL_BLOCKS["B/16"])
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cuda")
    x = make_x(case, generator).to(device)
    token, channel = (moved(make_half(case, mixes, generator), device) for mixes in ("tokens", "channels"))
    batch = 2**31 // (case.S * case.C) + 8
    context = context_of(case, device)

    def block(x: torch.Tensor) -> torch.Tensor:
        y, moments = token_mixing.forward(x, token, BF16, context)
        return channel_mixing.forward(y, channel, BF16, context, moments)

    expected = block(x)
    assert torch.equal(block(x.expand(batch, -1, -1))[-1:], expected)


def test_the_moments_of_the_output_are_those_of_the_rounded_output(device: torch.device) -> None:
    """fc1 folds LayerNorm by the statistics of what it reads: the rounded y."""
    for one_pass in (None, False):
        case = Case(2, 49, 70, 40, 8, BF16, mean=10.0, tiles=TileConfig(32, 16, 16), one_pass=one_pass)
        generator = torch.Generator().manual_seed(1)
        x, token = make_x(case, generator).to(device), moved(make_half(case, "tokens", generator), device)
        y, moments = token_mixing.forward(x, token, BF16, context_of(case, device))
        rows = y.double().reshape(-1, case.C)
        for block, columns in enumerate(rows.split(moments_constants(moments, case.C)["COUNT"], dim=1)):
            mean, sum_sq = moments[block].double()
            torch.testing.assert_close(mean, columns.mean(1), rtol=1e-6, atol=1e-6)
            expected = (columns - columns.mean(1, keepdim=True)).square().sum(1)
            torch.testing.assert_close(sum_sq, expected, rtol=1e-5, atol=1e-5)


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    case = Case(2, 196, 64, 48, 96)
    generator = torch.Generator().manual_seed(2)
    x = make_x(case, generator).to(device)
    token = moved(make_half(case, "tokens", generator), device)
    first, second = (token_mixing.forward(x, token, BF16, context_of(case, device))[0] for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, x)

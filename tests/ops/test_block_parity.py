"""Parity of the kernels with the fp64 truth, by ``fastmixer.parity``; edges of the forward.

This is the forward of each half too, by the parts "token" and "channel". What is particular to one half is
in ``test_token_mixing.py`` and ``test_channel_mixing.py``; the backward in ``test_block_gradients.py``.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from draws import PARTS, SMALL_STD, forward_case, forward_repeats, generated
from support import Case, context_of, make_half, make_x, moved, run_case

from fastmixer import configs
from fastmixer.aot.catalogue import MODEL_BLOCKS
from fastmixer.configs import TileConfig
from fastmixer.ops import channel_mixing, launch, token_mixing

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


SMALL = {"std": SMALL_STD, "eps": 1e-12}
NAMED = {
    "fp16": Case(2, 196, 128, 96, 256, FP16, **SMALL),
    "fp32": Case(2, 196, 128, 96, 256, FP32),
    "fp64": Case(2, 49, 64, 48, 128, FP64),
    "autocast": Case(2, 196, 128, 96, 256, BF16, x_dtype=FP32),
    "autocast far from zero": Case(2, 196, 128, 96, 256, FP16, x_dtype=FP32, mean=100.0, **SMALL),
    "far from zero": Case(2, 196, 128, 96, 256, BF16, mean=100.0, **SMALL),
    "outlier channel": Case(2, 196, 128, 96, 256, BF16, mean=10.0, outliers=4),
    "norm in fp32": Case(2, 49, 128, 96, 256, BF16, norm_dtype=FP32, **SMALL),
    "nothing but weights": Case(2, 49, 128, 96, 256, BF16, biases=(False,) * 4),
    "tanh, drop path": Case(8, 49, 64, 48, 128, BF16, approximate="tanh", scale="column"),
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
    "transposed, long": Case(2, 300, 40, 48, 64, FP16, layout="transposed", **SMALL),
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
        choose=lambda op, problem, _: configs.select_kernels(op, problem, configs.TARGETS["sm_90"]),
    )
    result = run_case("block", case, device, context=context)
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


# ---- edges that random cases seldom meet -----------------------------------------------------------------

CPU = torch.device("cpu")
EDGES = {
    "three channel blocks": Case(
        2, 21, 70, 24, 40, BF16, mean=10.0, outliers=1, tiles=TileConfig(32, 32, 32)
    ),
    "three channel blocks, long": Case(
        2, 21, 70, 24, 40, FP16, mean=10.0, outliers=1, tiles=TileConfig(32, 32, 32), one_pass=False
    ),
    "fp32 far from zero": Case(2, 49, 64, 48, 128, FP32, mean=100.0),
    "norm bias, no linear bias": Case(2, 49, 64, 48, 128, BF16, biases=(True, True, False, False)),
    "samples apart": Case(2, 21, 70, 24, 40, BF16, layout="token slice"),
    "tokens innermost": Case(2, 21, 70, 24, 40, BF16, layout="transposed"),
    # Squares of what a row varies by are 0.
    "next to nothing": Case(2, 21, 70, 24, 40, BF16, biases=(False,) * 4, std=1e-24),
    "tiles deeper than wide": Case(2, 48, 48, 48, 48, FP32, tiles=TileConfig(32, 16, 32), one_pass=False),
    "small tiles, two passes, autocast": Case(
        3, 21, 37, 19, 35, FP16, x_dtype=FP32, mean=10.0, tiles=TileConfig(32, 32, 16), one_pass=False
    ),
}


@pytest.mark.parametrize("name", EDGES)
def test_named(name: str) -> None:
    for part in ("block", "channel"):
        result = run_case(part, EDGES[name], CPU)
        assert result.ok, result


@pytest.mark.parametrize("one_pass", [None, False])
@pytest.mark.parametrize("strides", [(2**30 + 8, 24, 1), (1, 2**28 + 8, 8), (8, 24, 2**30 // 8 + 8)])
def test_offsets_beyond_int32(strides, one_pass) -> None:
    case = Case(3, 17, 20, 16, 24, FP16, one_pass=one_pass)
    generator = torch.Generator().manual_seed(0)
    dense = make_x(case, generator)
    token, channel = (make_half(case, mixes, generator) for mixes in ("tokens", "channels"))
    extent = sum((n - 1) * s for n, s in zip(dense.shape, strides, strict=True)) + 1
    assert extent > 2**31
    far = torch.empty(extent, dtype=case.dtype).as_strided(dense.shape, strides)
    far.copy_(dense)
    context = context_of(case, CPU)
    near_y, near_moments = token_mixing.forward(dense, token, case.dtype, context)
    far_y, far_moments = token_mixing.forward(far, token, case.dtype, context)
    assert torch.equal(near_y, far_y) and torch.equal(near_moments, far_moments)
    near_o = channel_mixing.forward(dense, channel, case.dtype, context)
    assert torch.equal(near_o, channel_mixing.forward(far, channel, case.dtype, context))


def test_a_scale_of_zero_gives_x() -> None:
    case = Case(2, 21, 32, 24, 40)
    g = torch.Generator().manual_seed(0)
    x = make_x(case, g)
    zero = torch.zeros(())
    token, ch = (make_half(case, mixes, g)._replace(residual_scale=zero) for mixes in ("tokens", "channels"))
    assert torch.equal(token_mixing.forward(x, token, BF16, context_of(case, CPU))[0], x)
    assert torch.equal(channel_mixing.forward(x, ch, BF16, context_of(case, CPU)), x)


@pytest.mark.parametrize("allowed", ["ieee", "tf32"])
def test_tf32_only_where_torch_allows_it(allowed: str) -> None:
    case = Case(2, 21, 32, 24, 40, FP32)
    g = torch.Generator().manual_seed(0)
    x, token, ch = make_x(case, g), make_half(case, "tokens", g), make_half(case, "channels", g)
    launches: list[launch.Launch] = []
    context = dataclasses.replace(context_of(case, CPU), execute=launches.append)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = allowed
    try:
        token_mixing.forward(x, token, FP32, context)
        channel_mixing.forward(x, ch, FP32, context)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    used = [run.args["INPUT_PRECISION"] for run in launches if "INPUT_PRECISION" in run.args]
    assert used == [allowed] * 3

"""Edges of the kernels that random cases seldom meet: offsets, padding, packing, what is folded when."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support import Case, context_of, make_half, make_x, run_case

import fastmixer
from fastmixer import functional
from fastmixer.configs import TileConfig
from fastmixer.ops import channel_mixing, launch, packing, token_mixing
from fastmixer.ops.layouts import Layout
from fastmixer.params import MixingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")

NAMED = {
    "three channel blocks": Case(
        2, 21, 70, 24, 40, BF16, mean=10.0, outliers=1, tiles=TileConfig(32, 32, 32)
    ),
    "three channel blocks, long": Case(
        2, 21, 70, 24, 40, FP16, mean=10.0, outliers=1, tiles=TileConfig(32, 32, 32), one_pass=False
    ),
    "fp32 far from zero": Case(2, 49, 64, 48, 128, FP32, mean=100.0),
    "norm bias, no linear bias": Case(2, 49, 64, 48, 128, BF16, biases=(True, True, False, False)),
    "small tiles, two passes, autocast": Case(
        3, 21, 37, 19, 35, FP16, x_dtype=FP32, mean=10.0, tiles=TileConfig(32, 32, 16), one_pass=False
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_named(name: str) -> None:
    for part in ("block", "channel"):
        result = run_case(part, NAMED[name], CPU)
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


@pytest.mark.parametrize("strides", [(2**28 + 8, 1), (1, 2**28 + 8)])
def test_weight_offsets_beyond_int32(strides) -> None:
    weight = torch.randn(20, 16)
    far = torch.empty(19 * strides[0] + 15 * strides[1] + 1).as_strided((20, 16), strides)
    far.copy_(weight)
    context = context_of(Case(1, 16, 8, 20, 8), CPU)
    packed = [packing.pack({"fc1": Layout(w, None, BF16, (32, 16))}, context)["fc1"] for w in (weight, far)]
    assert torch.equal(packed[0].weight, packed[1].weight)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_packing_writes(dtype: torch.dtype) -> None:
    """Folded: round(W gamma / s), its row sums, s, W beta + b. In the padding: the bias as hi + lo.

    All of them and a plain one in one launch.
    """
    g = torch.Generator().manual_seed(0)
    weight, bias, gamma, beta = (torch.randn(*s, generator=g) for s in ((21, 37), (21,), (37,), (37,)))
    launches: list[launch.Launch] = []
    context = context_of(Case(1, 8, 8, 8, 8), CPU)
    context = dataclasses.replace(context, execute=lambda one: launches.append(one) or launch.execute(one))
    layouts = {
        "folded": Layout(weight, bias, dtype, norm=(gamma, beta)),
        "padded": Layout(weight, bias, dtype, (32, 48), bias_in_padding=True),
        "with bias": Layout(weight, bias, dtype, (32, 48)),
        "plain": Layout(weight.t(), None, dtype),
    }
    packed = packing.pack(layouts, context)
    assert len(launches) == 1 and packed.keys() == layouts.keys()

    folded, product = packed["folded"], weight * gamma
    scale = torch.ones(21)
    if dtype == FP16:
        scale = 2.0 ** product.abs().amax(1).log2().floor()
        assert torch.equal(folded.scale, scale)
    else:
        assert folded.scale is None
        scale *= 2.0**32
    assert torch.equal(folded.weight[:, :37], (product / scale[:, None]).to(dtype))
    assert not folded.weight[:, 37:].any()
    torch.testing.assert_close(folded.rank1, folded.weight.double().sum(1).float())
    torch.testing.assert_close(folded.bias, (weight.double() @ beta.double() + bias.double()).float())

    hi, expected = bias.to(dtype), torch.zeros(32, 48, dtype=dtype)
    expected[:21, :37] = weight.to(dtype)
    assert torch.equal(packed["with bias"].weight, expected)
    assert torch.equal(packed["with bias"].bias, F.pad(bias, (0, 11)))
    expected[:21, 37], expected[:21, 38] = hi, (bias - hi.float()).to(dtype)
    assert torch.equal(packed["padded"].weight, expected) and packed["padded"].bias is None
    assert torch.equal(packed["plain"].weight[:, :21], weight.t().to(dtype))
    assert packed["plain"].weight.shape == (37, 32) and not packed["plain"].weight[:, 21:].any()


def test_the_scale_of_folded_rows_is_a_power_of_2_up_to_the_largest() -> None:
    """Zeros and what is not finite are left alone; 65504 ** 2 is beyond float16, and fits."""
    weight = torch.tensor([0.0, 1e-40, float("inf"), 65504.0, 2.0**-14]).unsqueeze(1).expand(5, 16)
    gamma = torch.full((16,), 65504.0)
    layout = Layout(weight, None, FP16, norm=(gamma, None))
    packed = packing.pack({"fc1": layout}, context_of(Case(1, 8, 8, 8, 8), CPU))["fc1"]
    assert packed.scale.log2().tolist() == [0, -117, 0, 31, 1]
    assert packed.weight[[0, 1, 3, 4]].isfinite().all() and packed.weight[2].isinf().all()
    assert ((packed.weight[[1, 3, 4]] >= 1) & (packed.weight[[1, 3, 4]] <= 2)).all()


@pytest.mark.parametrize("tokens", [49, 62, 63, 64])
def test_a_wide_bias_loses_nothing_on_its_way(tokens) -> None:
    """b1 in fp32 beside bf16 products (autocast): what reaches GELU is b1, not b1 rounded to bf16."""
    g = torch.Generator().manual_seed(0)
    D, C = tokens, 16
    bias = 1 + 3 * torch.rand(D, generator=g)
    params = MixingParams(None, None, torch.zeros(D, tokens), bias, torch.eye(tokens, D), None)
    x = torch.zeros(1, tokens, C)
    y, _ = token_mixing.forward(x, params, BF16, context_of(Case(1, tokens, C, D, 8), CPU))
    exact = torch.nn.functional.gelu(bias.double())
    rounded_once = exact * torch.finfo(BF16).eps / 2 + 2.6e-4  # GELU's own error: kernels/activations.py
    assert ((y[0, :, 0].double() - exact).abs() <= rounded_once).all()


@pytest.mark.parametrize("one_pass", [None, False])
def test_the_padding_of_a_large_row_stays_zero(one_pass) -> None:
    """The mean of the last row is subtracted in the padding as well: beyond fp16 it would give inf * 0."""
    case = Case(2, 21, 32, 24, 40, FP16, x_dtype=FP32, one_pass=one_pass)
    g = torch.Generator().manual_seed(0)
    x, token = make_x(case, g), make_half(case, "tokens", g)
    x[:, -1] = 1000.0
    y, _ = token_mixing.forward(x, token, FP16, context_of(case, CPU))
    assert y.isfinite().all()


def test_a_scale_of_zero_gives_x() -> None:
    case = Case(2, 21, 32, 24, 40)
    g = torch.Generator().manual_seed(0)
    x = make_x(case, g)
    token, ch = (make_half(case, mixes, g)._replace(residual_scale=0.0) for mixes in ("tokens", "channels"))
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


@pytest.mark.parametrize(
    ("dtype", "x_dtype", "norm"),
    [(BF16, BF16, "FOLD"), (FP16, FP16, "FOLD"), (BF16, FP32, "ROW"), (FP32, FP32, "ROW")],
)
def test_only_what_has_lost_its_digits_already_is_folded(dtype, x_dtype, norm) -> None:
    """Folding rounds the raw x to the products' dtype: an fp32 x would lose digits."""
    case = Case(2, 21, 32, 24, 40, dtype, x_dtype=x_dtype)
    g = torch.Generator().manual_seed(0)
    x, channel = make_x(case, g), make_half(case, "channels", g)
    launches: list[launch.Launch] = []
    context = dataclasses.replace(context_of(case, CPU), execute=launches.append)
    channel_mixing.forward(x, channel, dtype, context)
    fc1 = next(run for run in launches if "NORM" in run.args)
    assert fc1.args["NORM"] == getattr(launch.kernels().norm, norm)


def test_folded_weights_beyond_the_range_of_float16() -> None:
    """gamma W = 240,000 in one channel, whose LN(x) is small: eager's n and W are ordinary numbers."""
    g = torch.Generator().manual_seed(0)
    x, w1, w2 = (torch.randn(*shape, generator=g) for shape in ((2, 9, 40), (48, 40), (40, 48)))
    x[:, :, 0], w1[:, 5] = 1000.0, 8.0
    gamma = torch.ones(40)
    gamma[5] = 3e4
    params = MixingParams(*(t if t is None else t.half() for t in (gamma, None, w1, None, w2 * 1e-3, None)))
    exact = MixingParams(*(t if t is None else t.double() for t in params[:6]))
    truth = functional.channel_mixing(x.half().double(), **exact._asdict()) - x.half().double()
    with fastmixer.backend("triton"), torch.no_grad():
        fused = functional.channel_mixing(x.half(), **params._asdict()) - x.half()
        with fastmixer.backend("torch"):
            eager = functional.channel_mixing(x.half(), **params._asdict()) - x.half()
    assert eager.isfinite().all() and fused.isfinite().all()
    found, allowed = ((y.double() - truth).norm() for y in (fused, eager))
    assert found <= 1.25 * allowed

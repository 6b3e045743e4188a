"""The channel half: what its LayerNorm is folded into, what is packed for it, and a sum of its gradients.

Its parity with the fp64 truth is in ``test_block_parity.py`` and ``test_block_gradients.py``, part "channel".
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import Case, assert_parity, block_inputs, context_of, make_half, make_x, moved, run_gradients

import fastmixer
from fastmixer import functional
from fastmixer.ops import channel_mixing, launch
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import MixingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")


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
    x[:, :, 0], w1[:, 5] = 1000.0, 8 * w1[:, 5].sign()
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
    # Of the channels beside which the branch is large: at 1000 y is rounded to halves.
    found, allowed, size = (
        (y.double() - t)[..., 1:].norm() for y, t in ((fused, truth), (eager, truth), (truth, 0))
    )
    assert found <= 1.25 * allowed < 0.01 * size


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_a_constant_row_is_so_in_spite_of_an_inexact_mean(dtype: torch.dtype, device: torch.device) -> None:
    """A GPU divides by the number of channels with an error of two units in the last place."""
    case = Case(1, 9, 70, 24, 40, dtype)
    g = torch.Generator().manual_seed(0)
    x, params = make_x(case, g).to(device), moved(make_half(case, "channels", g), device)
    x[:, 4] = 1003.0
    context = context_of(case, device)
    moments = row_moments(x, context)
    mean = float(moments[0, 0, 4])
    moments[0, 0, 4] = mean * (1 + 2.0**-22)
    moments[0, 1, 4] = case.C * (moments[0, 0, 4] - mean) ** 2
    p = launch.empty_hidden(9, case.E, dtype, device)
    channel_mixing.forward(x, params, dtype, context, moments, p=p)
    beta, weight, bias = (t.double() for t in (params.norm_bias, params.fc1_weight, params.fc1_bias))
    assert torch.equal(p[4, : case.E], (weight @ beta + bias).to(dtype))


def test_weights_that_fit_are_not_packed() -> None:
    """fc2 of the channel half is read where it lies: no copy."""
    case = Case(1, 4, 32, 8, 64)
    x, halves, _ = block_inputs(case)
    channel = halves["channel"]
    launches: list[launch.Launch] = []
    context = launch.Context(context_of(case, x.device).target, execute=launches.append)
    channel_mixing.forward(x, channel, torch.bfloat16, context)
    names = [recorded.kernel_name for recorded in launches]
    assert names == ["pack_weights", "row_moments", "fc1", "fc2"]
    assert launches[-1].args["w_ptr"] is channel.fc2_weight and len(launches[0].args["layers"]) == 1


def test_fp32_gradients_of_a_sum(device: torch.device) -> None:
    """Where all of g is one number, roundings of a bias's gradient add up instead of cancelling."""
    case = Case(3, 256, 75, 64, 75, FP32, mean=100.0, scale="float", g_layout="expanded everywhere")
    assert_parity(run_gradients("channel", case, device, 8))

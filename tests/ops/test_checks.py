"""What the public functions refuse, and that the error names the argument, before anything is launched."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from public_calls import CALLS, SMALL, call, inputs
from torch import Tensor

import fastmixer
from fastmixer.params import MixingParams


def refused(name: str, x: object, token: MixingParams, channel: MixingParams) -> Exception:
    """The error of a call; warnings count as errors, so that one before it would be the one returned."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((TypeError, ValueError)) as caught:
            call(name, x, token, channel)
    return caught.value


BAD_X = {
    "rank 2": (torch.zeros(5, 6), ValueError, "x must have 3 dimensions (B, S, C), got shape (5, 6)"),
    "rank 4": (torch.zeros(1, 2, 5, 6), ValueError, "x must have 3 dimensions"),
    "no tokens": (
        torch.zeros(2, 0, 6),
        ValueError,
        "at least one token and one channel, got shape (2, 0, 6)",
    ),
    "no channels": (torch.zeros(2, 5, 0), ValueError, "at least one token and one channel"),
    "integer": (
        torch.zeros(2, 5, 6, dtype=torch.int32),
        TypeError,
        "x must be float16, bfloat16, float32 or",
    ),
    "complex": (torch.zeros(2, 5, 6, dtype=torch.complex64), TypeError, "got complex64"),
    "boolean": (torch.zeros(2, 5, 6, dtype=torch.bool), TypeError, "got bool"),
    "list": ([[[0.0]]], TypeError, "x must be a torch.Tensor of shape (B, S, C), got list"),
}


@pytest.mark.parametrize("backend", fastmixer.dispatch.BACKENDS)
@pytest.mark.parametrize("bad", BAD_X)
@pytest.mark.parametrize("name", CALLS[:3])
def test_bad_x_is_named(bad: str, name: str, backend: str, launches: list) -> None:
    _, token, channel = inputs(SMALL)
    x, kind, message = BAD_X[bad]
    with fastmixer.backend(backend):
        error = refused(name, x, token, channel)
    assert type(error) is kind and message in str(error) and not launches


def width(name: str) -> int:
    return SMALL.S if "token" in name else SMALL.C


def hidden(name: str) -> int:
    return SMALL.D if "token" in name else SMALL.E


# What is wrong, as a change of one half; the error's type; what its message must hold. In the message {p} is
# the prefix of the argument's name, {w} the width of the half and {h} its hidden units.
BAD_HALF: dict[str, tuple[Callable[[MixingParams], dict], type[Exception], tuple[str, ...]]] = {
    "weights of another length": (
        lambda params: {"fc1_weight": params.fc1_weight[:, 1:]},
        ValueError,
        ("{p}fc1_weight must have shape (hidden, {w})", "x has shape (2, 5, 6)", "got ({h}, {w-1})"),
    ),
    "fc1_weight of rank 1": (
        lambda params: {"fc1_weight": params.fc1_weight[0]},
        ValueError,
        ("{p}fc1_weight must have shape (hidden, {w})", "got ({w},)"),
    ),
    "no hidden units": (
        lambda params: {"fc1_weight": params.fc1_weight[:0]},
        ValueError,
        ("{p}fc1_weight must have shape", "got (0, {w})"),
    ),
    "fc2_weight transposed": (
        lambda params: {"fc2_weight": params.fc2_weight.T},
        ValueError,
        ("{p}fc2_weight must have shape ({w}, {h})", "got ({h}, {w})"),
    ),
    "norm of another width": (
        lambda params: {"norm_weight": params.norm_weight[1:]},
        ValueError,
        ("{p}norm_weight must have shape (6,)", "got (5,)"),
    ),
    "fc2_bias a scalar": (
        lambda params: {"fc2_bias": params.fc2_bias[0]},
        ValueError,
        ("{p}fc2_bias must have shape ({w},)", "got ()"),
    ),
    "fc1_weight on another device": (
        lambda params: {"fc1_weight": params.fc1_weight.to("meta")},
        ValueError,
        ("{p}fc1_weight must be on x's device cpu, got meta",),
    ),
    "norm_bias on another device": (
        lambda params: {"norm_bias": params.norm_bias.to("meta")},
        ValueError,
        ("{p}norm_bias must be on x's device cpu, got meta",),
    ),
    "scale on another device": (
        lambda params: {"residual_scale": torch.ones(2, device="meta")},
        ValueError,
        ("{p}residual_scale must be on x's device cpu, got meta",),
    ),
    "mixed linear dtypes": (
        lambda params: {"fc2_weight": params.fc2_weight.bfloat16()},
        TypeError,
        ("must share one dtype: {p}fc1_weight is float32, {p}fc2_weight is bfloat16",),
    ),
    "a bias of another dtype": (
        lambda params: {"fc1_bias": params.fc1_bias.double()},
        TypeError,
        ("must share one dtype: {p}fc1_weight is float32, {p}fc1_bias is float64",),
    ),
    "integer weights": (
        lambda params: {"fc1_weight": params.fc1_weight.int()},
        TypeError,
        ("{p}fc1_weight must be float16, bfloat16, float32 or float64, got int32",),
    ),
    "a weight that is no tensor": (
        lambda params: {"fc2_weight": params.fc2_weight.tolist()},
        TypeError,
        ("{p}fc2_weight must be a torch.Tensor, got list",),
    ),
    "a weight that is missing": (
        lambda params: {"fc1_weight": None},
        TypeError,
        ("{p}fc1_weight must be a torch.Tensor, got NoneType",),
    ),
    "negative eps": (
        lambda params: {"eps": -1e-6},
        ValueError,
        ("{p}eps must be finite and not", "got -1e-06"),
    ),
    "NaN eps": (lambda params: {"eps": math.nan}, ValueError, ("{p}eps must be finite", "got nan")),
    "infinite eps": (lambda params: {"eps": math.inf}, ValueError, ("{p}eps must be finite", "got inf")),
    "eps a string": (lambda params: {"eps": "1e-6"}, TypeError, ("{p}eps must be a number, got str",)),
    "unknown approximate": (
        lambda params: {"approximate": "erf"},
        ValueError,
        ("{p}approximate must be one of ('none', 'tanh'), got 'erf'",),
    ),
    "a scale a token": (
        lambda params: {"residual_scale": torch.ones(2, 5)},
        ValueError,
        ("{p}residual_scale must have shape (), (2,) or (2, 1, 1)", "got (2, 5)"),
    ),
    "a scale for other samples": (
        lambda params: {"residual_scale": torch.ones(3)},
        ValueError,
        ("{p}residual_scale must have shape (), (2,) or (2, 1, 1)", "got (3,)"),
    ),
    "an integer scale": (
        lambda params: {"residual_scale": torch.ones(2, dtype=torch.int64)},
        TypeError,
        ("{p}residual_scale must be float16, bfloat16, float32 or float64, got int64",),
    ),
    "a scale that is no number": (
        lambda params: {"residual_scale": [1.0, 2.0]},
        TypeError,
        ("{p}residual_scale must be None, a number or a tensor, got list",),
    ),
    "a norm wider than x": (
        lambda params: {"norm_weight": params.norm_weight.double()},
        TypeError,
        ("{p}norm_weight must be float32 like x; got float64",),
    ),
    "linear layers wider than x": (
        lambda params: {
            name: value.double() for name, value in params._asdict().items() if name.startswith("fc")
        },
        TypeError,
        ("{p}fc1_weight must be float32 like x", "got float64"),
    ),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", BAD_HALF)
def test_a_bad_argument_is_named(bad: str, name: str, launches: list) -> None:
    x, *halves = inputs(SMALL)
    which = 0 if "token" in name else 1
    change, kind, messages = BAD_HALF[bad]
    halves[which] = halves[which]._replace(**change(halves[which]))
    error = refused(name, x, *halves)
    prefix = ("token.", "channel.")[which] if "block" in name else ""
    w, h = width(name), hidden(name)
    assert type(error) is kind and not launches
    for message in messages:
        for field, value in {"{p}": prefix, "{w}": w, "{h}": h, "{w-1}": w - 1}.items():
            message = message.replace(field, str(value))
        assert message in str(error)


@pytest.mark.parametrize(
    "shape, name, message",
    [
        ((2, 4, 6), "token_mixing", "fc1_weight must have shape (hidden, 4) for x with 4 tokens"),
        ((2, 5, 8), "token_mixing", "norm_weight must have shape (8,) (x has shape (2, 5, 8)"),
        ((2, 5, 8), "channel_mixing", "fc1_weight must have shape (hidden, 8) for x with 8 channels"),
        ((2, 4, 6), "mixer_block", "token.fc1_weight must have shape (hidden, 4) for x with 4 tokens"),
        ((2, 5, 8), "mixer_block", "token.norm_weight must have shape (8,)"),
    ],
)
def test_x_that_does_not_fit_the_weights(shape: tuple, name: str, message: str, launches: list) -> None:
    _, token, channel = inputs(SMALL)
    error = refused(name, torch.zeros(shape), token, channel)
    assert type(error) is ValueError and message in str(error) and not launches


def test_halves_of_two_dtypes(launches: list) -> None:
    x, token, channel = inputs(SMALL)
    channel = MixingParams(*(t.bfloat16() if isinstance(t, Tensor) else t for t in channel))
    channel = channel._replace(norm_weight=None, norm_bias=None)
    error = refused("mixer_block", x, token, channel)
    assert type(error) is TypeError and not launches
    assert "token.fc1_weight" in str(error) and "channel.fc1_weight" in str(error)

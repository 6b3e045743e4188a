"""The public functions: what they refuse, and what they return on either backend."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from support import LAYOUTS, Case, make_half, make_x, moved
from torch import Tensor

import fastmixer
from fastmixer import functional, parity, reference
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import launch
from fastmixer.params import MixingParams

SMALL = Case(B=2, S=5, C=6, D=3, E=7, dtype=torch.float32)
CALLS = ("token_mixing", "channel_mixing", "mixer_block: token", "mixer_block: channel")


def inputs(case: Case) -> tuple[Tensor, MixingParams, MixingParams]:
    generator = torch.Generator().manual_seed(case.seed)
    return make_x(case, generator), *(make_half(case, mixes, generator) for mixes in ("tokens", "channels"))


def call(
    name: str, x: Tensor, token: MixingParams, channel: MixingParams, module: object = functional
) -> Tensor:
    """One of the public functions by name, or its reference."""
    if name == "token_mixing":
        return module.token_mixing(x, **token._asdict())
    if name == "channel_mixing":
        return module.channel_mixing(x, **channel._asdict())
    return module.mixer_block(x, token, channel)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[launch.Launch]:
    """Every launch of the test, in order, as it is run."""
    seen: list[launch.Launch] = []
    original = launch.Launch

    def record(*args: object) -> launch.Launch:
        seen.append(original(*args))
        return seen[-1]

    monkeypatch.setattr(launch, "Launch", record)
    return seen


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


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", CALLS[:3])
def test_a_batch_of_none(name: str, backend: str, launches: list) -> None:
    x, token, channel = inputs(Case(B=0, S=5, C=6, D=3, E=7, dtype=torch.bfloat16, scale="vector"))
    for empty in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        with fastmixer.backend(backend), torch.no_grad():
            y = call(name, empty, token, channel)
        assert y.shape == (0, 5, 6) and y.dtype == torch.bfloat16 and y.is_contiguous() and not launches


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("name", CALLS[:3])
@pytest.mark.filterwarnings("ignore::fastmixer.notices.FallbackWarning")
def test_gradients_are_those_of_the_reference(name: str, backend: str, launches: list) -> None:
    x, token, channel = inputs(Case(B=2, S=5, C=6, D=3, E=7, dtype=torch.float32, scale="vector"))
    results = []
    for module in (functional, reference):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *token.tensors(), *channel.tensors())]
        halves = (
            token._make((*leaves[1:7], token.eps, "none", leaves[7])),
            channel._make((*leaves[8:14], channel.eps, "none", leaves[14])),
        )
        with fastmixer.backend(backend):
            y = call(name, leaves[0], *halves, module=module)
        y.square().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    assert sum(grad is not None for grad in results[0]) == (16 if "block" in name else 9)
    for mine, theirs in zip(*results, strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    assert not launches


@pytest.mark.parametrize("argument", ["x", "norm_bias", "fc2_weight"])
def test_one_argument_that_needs_gradients_is_enough(argument: str, launches: list) -> None:
    x, token, _ = inputs(Case(B=2, S=5, C=6, D=3, E=7, dtype=torch.float32, scale="column"))
    leaf = x if argument == "x" else getattr(token, argument)
    leaf.requires_grad_()
    with fastmixer.backend("triton"):
        y = functional.token_mixing(x, **token._asdict())
        assert y.requires_grad and launches
        with torch.no_grad():
            y = functional.token_mixing(x, **token._asdict())
        assert not y.requires_grad


def test_a_residual_scale_that_needs_a_gradient_is_left_to_the_reference(launches: list) -> None:
    x, token, _ = inputs(Case(B=2, S=5, C=6, D=3, E=7, dtype=torch.float32, scale="column"))
    token.residual_scale.requires_grad_()
    with fastmixer.backend("triton"):
        with pytest.raises(RuntimeError, match="residual_scale requires a gradient"):
            functional.token_mixing(x, **token._asdict())
        assert not launches
        with torch.no_grad():
            assert functional.token_mixing(x, **token._asdict()).shape == x.shape and launches


def truth_of(name: str, x: Tensor, token: MixingParams, channel: MixingParams) -> Tensor:
    return call(name, x.double(), moved(token, torch.float64), moved(channel, torch.float64), reference)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype, x_dtype", [(torch.float16, None), (torch.bfloat16, torch.float32), (torch.float64, None)], ids=str
)
def test_result_is_contiguous_and_right_for_any_layout(
    layout: str, dtype: torch.dtype, x_dtype: torch.dtype | None, launches: list
) -> None:
    x, token, channel = inputs(Case(B=3, S=10, C=24, D=9, E=40, dtype=dtype, x_dtype=x_dtype, layout=layout))
    before = x.clone()
    for name in CALLS[:3]:
        with fastmixer.backend("triton"):
            fused = call(name, x, token, channel)
        assert fused.is_contiguous() and fused.dtype == x.dtype and fused.shape == x.shape
        eager = call(name, x, token, channel, reference)
        verdict = parity.compare(fused, eager, truth_of(name, x, token, channel), accumulate_dtype(dtype))
        assert verdict.ok, f"{name}: {verdict}"
    assert launches and torch.equal(x, before)


def spread(tensor: Tensor) -> Tensor:
    """The same values with every stride doubled."""
    return tensor.repeat_interleave(2, dim=-1)[..., ::2]


def beside(tensor: Tensor) -> Tensor:
    """The same values as columns of a wider tensor: what splitting a fused projection gives."""
    return torch.cat([torch.full_like(tensor, torch.nan), tensor], dim=-1)[..., tensor.shape[-1] :]


@pytest.mark.parametrize("S", [16, 20])  # 16 needs no padding, so a packed copy is not always made
@pytest.mark.parametrize("view", [spread, beside, lambda t: t.T.contiguous().T if t.dim() == 2 else t])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_strided_parameters(S: int, view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    x, token, channel = inputs(Case(B=2, S=S, C=32, D=128, E=64, dtype=dtype, scale="vector"))
    with fastmixer.backend("triton"):
        expected = functional.mixer_block(x, token, channel)
        token, channel = (
            MixingParams(*(view(t) if isinstance(t, Tensor) else t for t in params))
            for params in (token, channel)
        )
        assert torch.equal(functional.mixer_block(x, token, channel), expected)


@pytest.mark.parametrize("scale", ["scalar", "vector", "column", "float"])
def test_residual_scale_of_every_kind_scales_each_sample(scale: str) -> None:
    x, token, channel = inputs(Case(B=3, S=5, C=6, D=3, E=7, dtype=torch.float32, scale=scale))
    for name in CALLS[:3]:
        with fastmixer.backend("triton"):
            fused = call(name, x, token, channel)
        eager = call(name, x, token, channel, reference)
        verdict = parity.compare(fused, eager, truth_of(name, x, token, channel))
        assert verdict.ok, f"{name}: {verdict}"


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_decides_the_products_dtype(
    weights: torch.dtype, x_dtype: torch.dtype, launches: list
) -> None:
    """fp32 parameters are used at full precision until autocast's cast, and the result keeps x's dtype."""
    case = Case(B=2, S=20, C=40, D=24, E=72, dtype=weights, x_dtype=x_dtype, norm_dtype=torch.float32)
    x, token, channel = inputs(case)
    with torch.autocast("cpu", torch.bfloat16):
        for name in CALLS[:3]:
            del launches[:]
            with fastmixer.backend("triton"):
                fused = call(name, x, token, channel)
            products = {f.args["w_ptr"].dtype for f in launches if f.kernel is launch.kernels().fc2}
            products |= {
                f.args["w1_ptr"].dtype for f in launches if f.kernel is launch.kernels().token_mixing
            }
            assert fused.dtype == x_dtype and products == {torch.bfloat16}
            eager = call(name, x, token, channel, reference)
            assert eager.dtype == x_dtype
            with torch.autocast("cpu", enabled=False):
                truth = truth_of(name, x, token, channel)
            verdict = parity.compare(fused, eager, truth)
            assert verdict.ok, f"{name}: {verdict}"


def test_autocast_leaves_float64_alone() -> None:
    x, token, channel = inputs(Case(B=2, S=5, C=6, D=3, E=7, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16), fastmixer.backend("triton"):
        fused = functional.mixer_block(x, token, channel)
    eager = reference.mixer_block(x, token, channel)
    verdict = parity.compare(fused, eager, eager, torch.float64)
    assert fused.dtype == torch.float64 and verdict.ok, verdict

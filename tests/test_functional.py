"""The public functions: what they return on either backend, and which half is left to the reference."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import pytest
import torch
from public_calls import CALLS, call, inputs
from support import LAYOUTS, Case, assert_parity, block_inputs, gradients, moved
from torch import Tensor

import fastmixer
from fastmixer import functional, parity, reference
from fastmixer.configs import Library
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import launch
from fastmixer.params import MixingParams


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


@pytest.mark.parametrize("scale", [0, 0.0, torch.tensor(0.0)], ids=["int", "float", "tensor"])
def test_a_scale_of_zero_leaves_x(scale: float | Tensor) -> None:
    x, token, channel = inputs(SMALL)
    halves = (params._replace(residual_scale=scale) for params in (token, channel))
    with fastmixer.backend("triton"):
        assert torch.equal(functional.mixer_block(x, *halves), x)


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


# ---- a half left to the reference ------------------------------------------------------------------------


def left(*to_pytorch: str) -> dict[str, Library | None]:
    """The choice of all four halves, with and without a backward."""
    return {
        f"{of}_half{end}": Library.REFERENCE if of in to_pytorch else None
        for of in ("token", "channel")
        for end in ("", "_training")
    }


HALVES = {
    "token": left("token"),
    "channel": left("channel"),
    "both": left("token", "channel"),
    "neither": left(),
}
PRODUCTS = {"channel_fc1": Library.ATEN, "channel_fc2": Library.ATEN}
SMALL = Case(2, 10, 24, 12, 40, torch.float32, scale="vector")


def block(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    return functional.mixer_block(x, halves["token"], halves["channel"])


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("name", HALVES)
def test_a_half_is_left_to_the_reference(name: str, gradient: bool, choose: Callable) -> None:
    """By choice, so without a warning; the moments of a channel half after it are computed from y."""
    launched = choose(HALVES[name])
    x, halves, g = block_inputs(SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gradients(block, x, halves, g) if gradient else {"y": block(x, halves)}
    expected = gradients(run_reference, x, halves, g) if gradient else {"y": run_reference(x, halves)}
    exact = doubled(x, halves, g)
    truth = gradients(run_reference, *exact) if gradient else {"y": run_reference(*exact[:2])}
    assert_parity({key: parity.compare(found[key], expected[key], truth[key]) for key in found})
    kernels = set(launched)
    assert ("token_mixing" in kernels) == (name in ("channel", "neither"))
    assert ("fc1" in kernels) == (name in ("token", "neither"))
    moments = {"token": 1, "channel": 1, "both": 0, "neither": 1}
    assert launched.count("row_moments") == moments[name]
    assert bool(kernels) == (name != "both")
    if name == "both":
        assert all(torch.equal(value, expected[key]) for key, value in found.items())


def doubled(x: Tensor, halves: dict[str, MixingParams], g: Tensor) -> tuple:
    """The same in float64."""
    of = {
        name: MixingParams(*(t.double() if isinstance(t, Tensor) else t for t in params))
        for name, params in halves.items()
    }
    return x.detach().double(), of, g.double()


def run_reference(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    return reference.mixer_block(x, halves["token"], halves["channel"])


@pytest.mark.parametrize("of", ["token", "channel"])
def test_a_half_by_itself_is_left_to_the_reference(of: str, choose: Callable) -> None:
    launched = choose(HALVES["both"])
    x, halves, _ = block_inputs(dataclasses.replace(SMALL, layout="transposed"))
    mix, expected = (getattr(module, f"{of}_mixing") for module in (functional, reference))
    y = mix(x, **halves[of]._asdict())
    assert torch.equal(y, expected(x, **halves[of]._asdict())) and y.is_contiguous() and not launched


def test_strict_means_the_kernels(choose: Callable) -> None:
    """backend("triton") leaves neither a half to the reference nor a product to a library."""
    launched = choose(HALVES["both"] | PRODUCTS)
    x, halves, _ = block_inputs(SMALL)
    with fastmixer.backend("triton"):
        y = block(x, halves)
    assert launched == ["pack_weights", "row_moments", "token_mixing", "fc1", "fc2"]
    torch.testing.assert_close(y, run_reference(x, halves))


@pytest.mark.parametrize("of", ["token", "channel"])
def test_with_gradients_the_choice_for_training_counts(of: str, choose: Callable) -> None:
    x, halves, _ = block_inputs(SMALL)
    for end, gradient in (("", True), ("_training", False), ("", False), ("_training", True)):
        launched = choose(left() | {f"{of}_half{end}": Library.REFERENCE})
        x.requires_grad_(gradient)
        block(x, halves)
        kernel = {"token": "token_mixing", "channel": "fc1"}[of]
        assert (kernel in launched) == (gradient != (end == "_training"))


@pytest.mark.parametrize("gradient", [False, True])
def test_lean_memory_leaves_no_half_with_gradients_to_the_reference(gradient: bool, choose: Callable) -> None:
    """It would keep what eager keeps."""
    launched = choose(HALVES["both"])
    x, halves, _ = block_inputs(SMALL)
    x.requires_grad_(gradient)
    with fastmixer.memory("lean"):
        y = block(x, halves)
    assert ({"token_mixing", "fc1"} <= set(launched)) == gradient == bool(launched)
    torch.testing.assert_close(y, run_reference(x, halves))

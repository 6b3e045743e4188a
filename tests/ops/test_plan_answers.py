"""What an ordinary call has left must not answer for another kind of call."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from support import block_inputs, gradients
from test_plan import FP32, SMALL, block, planless
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import fastmixer
from fastmixer import dispatch, functional, reference
from fastmixer.ops import mixing, plan, torch_ops
from fastmixer.ops.layouts import Kept
from fastmixer.params import MixingParams


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def warm(x: Tensor, halves: dict[str, MixingParams]) -> None:
    """Leaves plans for calls with these, with gradients and without."""
    block(x, halves)
    y = block(x.clone().requires_grad_(), halves)
    y.backward(x)
    assert len(plan._plans) == 3


def test_a_scale_that_wants_a_gradient() -> None:
    x, halves, _ = block_inputs(dataclasses.replace(SMALL, scale="vector"))
    warm(x, halves)
    scale = halves["token"].residual_scale.clone().requires_grad_()
    halves = halves | {"token": halves["token"]._replace(residual_scale=scale)}
    with pytest.raises(RuntimeError, match="residual_scale requires a gradient"):
        block(x, halves)
    with torch.no_grad():
        assert torch.equal(block(x, halves), planless(x, halves))


def test_a_negated_view() -> None:
    x, halves, _ = block_inputs(SMALL)
    warm(x, halves)
    with pytest.raises(RuntimeError, match="negated"):
        block(torch._neg_view(x), halves)


def test_tangents_and_transforms() -> None:
    x, halves, _ = block_inputs(SMALL)
    warm(x, halves)
    with forward_ad.dual_level():
        y = block(forward_ad.make_dual(x, torch.ones_like(x)), halves)
        assert forward_ad.unpack_dual(y).tangent is not None
        assert torch.equal(block(x, halves), planless(x, halves)), "no tangents"
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda one: block(one[None], halves))(x)


@pytest.mark.parametrize("is_warm", [False, True])
def test_a_trace_of_torch_jit(is_warm: bool) -> None:
    """It takes no plan, which would be a constant in it, and leaves none: it runs the reference."""
    x, halves, _ = block_inputs(SMALL)
    if is_warm:
        warm(x, halves)
    before = dict(plan._plans)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and the checks compare traced sizes
        traced = torch.jit.trace(lambda x: block(x, halves), x, check_trace=False)
    assert torch.equal(traced(x + 1), reference.mixer_block(x + 1, *halves.values()))
    assert plan._plans == before


def test_a_dispatch_mode_sees_an_operator() -> None:
    seen: list[str] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    x, halves, _ = block_inputs(SMALL)
    warm(x, halves)
    with Watching():
        block(x, halves)
    assert "fastmixer.mixing.default" in seen


def test_fake_tensors_outside_of_their_mode() -> None:
    x, halves, _ = block_inputs(SMALL)
    warm(x, halves)
    mode = FakeTensorMode()
    fakes = {
        h: MixingParams(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in p))
        for h, p in halves.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(block(mode.from_tensor(x), fakes), FakeTensor)


def test_another_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x, halves, _ = block_inputs(SMALL)
    warm(x, halves)
    monkeypatch.setattr(plan.Plan, "__call__", lambda *_: pytest.fail("a plan was run"))
    for name in ("auto", "torch"):
        with fastmixer.backend(name), warnings.catch_warnings():
            warnings.simplefilter("ignore", fastmixer.FallbackWarning)
            for _ in range(2):
                assert torch.equal(block(x, halves), reference.mixer_block(x, *halves.values()))


def test_the_backend_torch_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, launched: list) -> None:
    x, halves, _ = block_inputs(SMALL)
    monkeypatch.setattr(dispatch, "use_triton", lambda *_: dispatch.current_backend() != "torch")
    for name in ("torch", "auto", "torch"):
        launched.clear()
        with fastmixer.backend(name):
            block(x, halves)
        assert bool(launched) == (name == "auto")


def test_an_operator_leaves_no_plan_for_an_ordinary_call() -> None:
    """Its halves were chosen in the trace, for another batch; and by whom is not asked."""
    x, halves, _ = block_inputs(SMALL)
    tensors = mixing.tensors_of(x, halves)
    settings = mixing.settings_of(halves, FP32, ())
    torch_ops.call(settings, *tensors)
    (key,) = plan._plans
    assert key[1].traced and functional._signature(x, halves)[0] not in plan._plans
    with fastmixer.backend("auto"), warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmixer.FallbackWarning)
        assert torch.equal(block(x, halves), reference.mixer_block(x, *halves.values()))


def test_packed_weights_are_for_inference() -> None:
    """A call with gradients packs what the weights are then, whatever is kept."""
    x, halves, g = block_inputs(SMALL)
    kept = Kept()
    with torch.no_grad():
        expected = block(x, halves)
        for _ in range(2):
            assert torch.equal(functional.mixer_block(x, *halves.values(), kept=kept), expected)
    assert len(kept.calls) == 1
    for _ in range(2):
        found = gradients(lambda x, own: functional.mixer_block(x, *own.values(), kept=kept), x, halves, g)
    ordinary = gradients(block, x, halves, g)
    assert all(torch.equal(found[name], ordinary[name]) for name in ordinary)

"""The operators that a trace is made of: what they promise PyTorch, and that they are the ordinary calls."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from support import Case, block_inputs, gradients, leaves, moved
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastmixer
from fastmixer import functional
from fastmixer.ops import launch, mixing, torch_ops
from fastmixer.ops.mixing import Settings
from fastmixer.params import MixingParams

OPS = torch.ops.fastmixer
# Hidden sizes that need no padding: opcheck compares every element, and the padding's are nobody's.
SMALL = Case(2, 10, 24, 12, 48, torch.float32)
# fp32 x beside 16-bit products, per-sample scales, no biases: the other dtypes and absences of a signature.
MIXED = Case(
    3, 5, 16, 8, 32, torch.bfloat16, x_dtype=torch.float32, biases=(True, False, False, True), scale="column"
)
# Under autocast: gradients wider than the products that they are.
AUTOCAST = dataclasses.replace(MIXED, weight_dtype=torch.float32)


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def parts(case: Case, device: torch.device) -> tuple[Tensor, dict[str, MixingParams]]:
    x, halves, _ = block_inputs(case)
    return x.to(device), {half: moved(params, device) for half, params in halves.items()}


def trained(x: Tensor, params: MixingParams) -> tuple[Tensor, MixingParams]:
    """With gradients wanted of everything."""
    for tensor in leaves(x, {"half": params}).values():
        tensor.requires_grad_()
    return x, params


def trained_block(x: Tensor, halves: dict[str, MixingParams]) -> tuple[Tensor, dict[str, MixingParams]]:
    for params in halves.values():
        trained(x, params)
    return x, halves


def operands(case: Case, x: Tensor, halves: dict[str, MixingParams]) -> tuple[Settings, Tensor, list]:
    """What an operator is called with."""
    x, *parameters = mixing.tensors_of(x, halves)
    needs = mixing.needs_of([x, *parameters])
    return mixing.settings_of(halves, case.dtype, needs, kernels_only=True), x, parameters


def block(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    return functional.mixer_block(x, halves["token"], halves["channel"])


@pytest.mark.parametrize("case", [SMALL, MIXED], ids=["fp32", "mixed"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_forward_operators_keep_what_they_promise(case: Case, trains: bool, device: torch.device) -> None:
    """Schema, fake kernel, derivative, and tracing with a symbolic batch."""
    x, halves = parts(case, device)
    for of in (["token"], ["channel"], ["token", "channel"]):
        own = {half: trained(x, halves[half])[1] if trains else halves[half] for half in of}
        settings, x, parameters = operands(case, x, own)
        operator = OPS.mixing_training if trains else OPS.mixing
        done = opcheck(operator, (x, *settings.arguments(parameters)))
        assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("case", "lean"),
    [(SMALL, False), (SMALL, True), (MIXED, False), (AUTOCAST, True)],
    ids=["fp32", "fp32, lean", "mixed", "autocast, lean"],
)
def test_the_backward_operator_keeps_what_it_promises(case: Case, lean: bool, device: torch.device) -> None:
    x, halves = parts(case, device)
    for of in (["token"], ["channel"], ["token", "channel"]):
        own = {half: halves[half] for half in of}
        _, _, parameters = operands(case, x, own)
        needs = [True] + [t is not None for i, t in enumerate(parameters) if i % 7 < 6]
        some = [False] * (len(needs) - 6) + [True, False, True, False, False, False]
        some = [wanted and needed for wanted, needed in zip(some, needs, strict=True)]
        for wanted in (needs, some):
            settings = operands(case, x, own)[0]._replace(needs=tuple(wanted), lean=lean)
            kept = OPS.mixing_training(x, *settings.arguments(parameters))[1:]
            saved = [t if t.numel() else None for t in kept]
            g = torch.randn_like(x).expand(x.shape)
            done = opcheck(OPS.mixing_backward, (g, x, *saved, *settings.arguments(parameters)))
            assert set(done.values()) == {"SUCCESS"}


def test_lean_memory_keeps_no_pre_activation(device: torch.device) -> None:
    x, halves = parts(SMALL, device)
    settings, x, parameters = operands(SMALL, *trained_block(x, halves))
    for lean, shape in ((False, (SMALL.B * SMALL.S, SMALL.E)), (True, (0,))):
        *_, p = OPS.mixing_training(x, *settings._replace(lean=lean).arguments(parameters))
        assert p.shape == shape


def test_only_the_output_has_a_gradient(device: torch.device) -> None:
    x, halves = parts(SMALL, device)
    settings, x, parameters = operands(SMALL, *trained_block(x, halves))
    y, *kept = OPS.mixing_training(x, *settings.arguments(parameters))
    assert y.requires_grad and not any(t.requires_grad for t in kept)


@pytest.mark.parametrize("name", ["fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"])
def test_an_operator_keeps_what_an_ordinary_call_keeps(name: str, device: torch.device) -> None:
    x, halves = parts(SMALL, device)
    own = {"channel": halves["channel"]}
    getattr(own["channel"], name).requires_grad_()

    def kept(call: Callable[[], Tensor]) -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, id):
            assert call().requires_grad
        return sorted(shapes)

    settings, x, parameters = operands(SMALL, x, own)
    ordinary = kept(functional.prepared(x, own))
    assert kept(lambda: torch_ops.call(settings, x, *parameters)) == ordinary


def test_operators_give_the_bits_of_an_ordinary_call(device: torch.device) -> None:
    x, halves = parts(SMALL, device)
    g = torch.randn_like(x)
    ordinary = gradients(block, x, halves, g)
    with torch.no_grad():
        output = block(x, halves)

    def in_operators(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
        settings, x, parameters = operands(SMALL, x, halves)
        return torch_ops.call(settings, x, *parameters)

    with torch.no_grad():
        assert torch.equal(in_operators(x, halves), output)
    found = gradients(in_operators, x, halves, g)
    assert all(torch.equal(found[name], ordinary[name]) for name in ordinary)


def test_make_fx_records_operators(device: torch.device) -> None:
    """Of what a kernel writes a trace would know nothing: it would be a constant."""
    x, halves = parts(SMALL, device)
    with torch.no_grad():
        graph = make_fx(lambda x: block(x, halves))(x)
        assert {node.target for node in graph.graph.nodes} >= {OPS.mixing.default}
        other = torch.randn_like(x)
        assert torch.equal(graph(other), block(other, halves))


def test_fake_tensors_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, halves = parts(SMALL, torch.device("cpu"))
    launched = []
    monkeypatch.setattr(launch, "execute", launched.append)
    with FakeTensorMode() as mode:
        fake = {
            of: MixingParams(*(mode.from_tensor(t) if isinstance(t, Tensor) else t for t in h))
            for of, h in halves.items()
        }
        found = gradients(block, mode.from_tensor(x), fake, mode.from_tensor(x))
    shapes = {name: tensor.shape for name, tensor in leaves(x, halves).items()}
    assert {name: tensor.shape for name, tensor in found.items()} == shapes and not launched

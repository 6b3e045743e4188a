"""The operators that a trace is made of: what they promise PyTorch, and that they are the ordinary calls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import Case, block_inputs, gradients, leaves, moved
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck

import fastmixer
from fastmixer import functional
from fastmixer.ops import launch, torch_ops
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import MixingParams

OPS = torch.ops.fastmixer
# Hidden sizes that need no padding: opcheck compares every element, and the padding's are nobody's.
SMALL = Case(2, 10, 24, 12, 48, torch.float32)
# fp32 x beside 16-bit products, per-sample scales, no biases: the other dtypes and absences of a signature.
MIXED = Case(
    3, 5, 16, 8, 32, torch.bfloat16, x_dtype=torch.float32, biases=(True, False, False, True), scale="column"
)
KERNELS_ONLY = True


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


def block(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    return functional.mixer_block(x, halves["token"], halves["channel"])


@pytest.mark.parametrize("case", [SMALL, MIXED], ids=["fp32", "mixed"])
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_forward_operators_keep_what_they_promise(case: Case, trains: bool, device: torch.device) -> None:
    """Schema, fake kernel, derivative, and tracing with a symbolic batch."""
    x, halves = parts(case, device)
    for of, params in halves.items():
        x, params = trained(x, params) if trains else (x, params)
        for given in (None, row_moments(x.detach(), launch.context_of(x.device))):
            extra = (given is None,) if of == "token" else (given, trains)
            operator = getattr(OPS, f"{of}_mixing")
            done = opcheck(operator, (x, *params.arguments(), case.dtype, *extra, KERNELS_ONLY))
            assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [SMALL, MIXED], ids=["fp32", "mixed"])
def test_the_block_operator_keeps_what_it_promises(case: Case, device: torch.device) -> None:
    x, halves = parts(case, device)
    arguments = [argument for params in halves.values() for argument in params.arguments()]
    done = opcheck(OPS.mixer_block, (x, *arguments, case.dtype, KERNELS_ONLY))
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [SMALL, MIXED], ids=["fp32", "mixed"])
@pytest.mark.parametrize("keeps_p", [True, False])
def test_backward_operators_keep_what_they_promise(case: Case, keeps_p: bool, device: torch.device) -> None:
    x, halves = parts(case, device)
    context = launch.context_of(x.device)
    moments = row_moments(x, context)
    g = torch.randn_like(x).expand(x.shape)
    for of, params in halves.items():
        p = None
        if of == "channel" and keeps_p:
            arguments = *params.arguments(), case.dtype, None, True, KERNELS_ONLY
            p = OPS.channel_mixing(x, *arguments)[2]
        needs = [tensor is not None for tensor in (x, *params[:6])]
        for wanted in (needs, [False, *needs[1:4], False, False, False]):
            arguments = g, x, moments, p, *params.arguments(), case.dtype, wanted, KERNELS_ONLY
            done = opcheck(getattr(OPS, f"{of}_mixing_backward"), arguments)
            assert set(done.values()) == {"SUCCESS"}


def test_operators_give_the_bits_of_an_ordinary_call(device: torch.device) -> None:
    x, halves = parts(SMALL, device)
    g = torch.randn_like(x)
    ordinary = gradients(block, x, halves, g)
    with torch.no_grad():
        output = block(x, halves)

    def in_operators(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
        return torch_ops.call(
            x, halves, SMALL.dtype, torch.is_grad_enabled(), lean=False, kernels_only=KERNELS_ONLY
        )

    with torch.no_grad():
        assert torch.equal(in_operators(x, halves), output)
    found = gradients(in_operators, x, halves, g)
    assert all(torch.equal(found[name], ordinary[name]) for name in ordinary)


def test_make_fx_records_operators(device: torch.device) -> None:
    """Of what a kernel writes a trace would know nothing: it would be a constant."""
    x, halves = parts(SMALL, device)
    with torch.no_grad():
        graph = make_fx(lambda x: block(x, halves))(x)
        assert {node.target for node in graph.graph.nodes} >= {OPS.mixer_block.default}
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

"""What the autograd Functions keep, compute and refuse: memory, gating, checkpoints, autocast."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from support import (
    HALVES,
    Case,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    laid_out,
    leaves,
    moved,
    run_eager,
)
from timm.models.mlp_mixer import MixerBlock as TimmBlock
from torch import Tensor

import fastmixer
from fastmixer import configs, functional
from fastmixer.aot.catalogue import MODEL_BLOCKS
from fastmixer.configs import TARGETS, cdiv
from fastmixer.ops import launch
from fastmixer.params import MixingParams

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SMALL = Case(2, 10, 24, 12, 40, FP32)


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def on_meta(case: Case) -> tuple[Tensor, dict[str, MixingParams]]:
    """x and both halves without memory, for a batch of any size."""
    meta = torch.device("meta")
    _, halves, _ = block_inputs(dataclasses.replace(case, B=1))
    x = torch.empty(case.B, case.S, case.C, dtype=case.x_dtype or case.dtype, device=meta)
    return x, {half: moved(params, meta) for half, params in halves.items()}


def block(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    return functional.mixer_block(x, halves["token"], halves["channel"])


# ---- bytes kept for backward -----------------------------------------------------------------------------


def kept_bytes(case: Case, arch: str = "sm_90") -> int:
    """Bytes that a block keeps besides its parameters, every storage once; nothing runs."""
    context = launch.Context(TARGETS[arch], execute=lambda recorded: None)
    x, halves = on_meta(case)
    asked = leaves(x, halves)
    for tensor in asked.values():
        tensor.requires_grad_()
    ours = {t.untyped_storage()._cdata for name, t in asked.items() if name != "x"}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in ours:
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        fused_run(case, context)(x, halves)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "model, options, copies",
    [
        ("B/16", {"lean": True}, 2.1),
        ("B/16", {}, 6.2),
        ("B/32", {"lean": True}, 2.1),
        ("H/14", {"lean": True}, 2.1),
        ("B/16", {"x_dtype": FP32, "weight_dtype": FP32, "lean": True}, 4.2),
        ("B/16", {"x_dtype": FP32, "weight_dtype": FP32}, 8.2),
    ],
)
def test_bytes_kept_for_backward(model: str, options: dict, copies: float) -> None:
    """As multiples of one bf16 activation; x of the block counts."""
    case = Case(64, *MODEL_BLOCKS[model], BF16, **options)
    activation = case.B * case.S * case.C * BF16.itemsize
    kept = kept_bytes(case) / activation
    inputs = int(copies)
    assert inputs < kept <= copies
    # Moments, two numbers per row: of x in one block, of y in one per channel block of the tile that made it.
    x, halves = on_meta(case)
    problem = launch.problem_of(x, halves["token"], case.dtype)
    blocks = 1 + cdiv(case.C, configs.choose("token_mixing", problem, TARGETS["sm_90"]).block_m)
    assert kept - inputs == pytest.approx(blocks * 8 / (case.C * 2))


def test_what_eager_keeps() -> None:
    """The README's yardstick: timm's block in bf16."""
    case = Case(1, *MODEL_BLOCKS["B/16"], BF16)
    eager = TimmBlock(case.C, case.S, mlp_ratio=(case.D / case.C, case.E / case.C)).bfloat16()
    ours = {p.untyped_storage()._cdata for p in eager.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        eager(torch.randn(case.B, case.S, case.C, dtype=BF16, requires_grad=True))
    copies = sum(size for key, size in kept.items() if key not in ours) / (case.S * case.C * 2)
    assert copies == pytest.approx(15.9, abs=0.1)


def test_the_hooks_see_the_same_tensors_when_the_kernels_run() -> None:
    """What the test above counts on meta tensors is what real calls keep."""
    x, halves, _ = block_inputs(SMALL)
    kept: list[tuple] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    for tensor in leaves(x, halves).values():
        tensor.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with fastmixer.memory("lean"):
            block(x, halves)
        lean, kept = kept, []
        block(x, halves)
    E = SMALL.E
    assert kept.count((SMALL.B * SMALL.S, launch.round_up(E, 16))) == 1 and len(kept) == len(lean) + 1
    assert lean.count(tuple(x.shape)) == 2


# ---- again, twice, and of the second order ---------------------------------------------------------------


def test_a_second_backward_gives_the_same_bits() -> None:
    x, halves, g = block_inputs(SMALL)
    asked = leaves(x, halves)
    for tensor in asked.values():
        tensor.requires_grad_()
    out = block(x, halves)
    first = torch.autograd.grad(out, list(asked.values()), g, retain_graph=True)
    second = torch.autograd.grad(out, list(asked.values()), g)
    third = torch.autograd.grad(block(x, halves), list(asked.values()), g)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, list(asked.values()), g)


@pytest.mark.parametrize("half", ["token", "channel"])
def test_second_derivatives_are_refused_by_name_and_torch_gives_them(half: str) -> None:
    x, halves, _ = block_inputs(dataclasses.replace(SMALL, dtype=FP64))
    x.requires_grad_()
    mix = functional.token_mixing if half == "token" else functional.channel_mixing

    def penalty() -> Tensor:
        (gradient,) = torch.autograd.grad(mix(x, **halves[half]._asdict()).sum(), x, create_graph=True)
        return gradient.square().sum()

    loss = penalty()
    with pytest.raises(RuntimeError, match=r'differentiated once only.*fastmixer\.backend\("torch"\)'):
        loss.backward()
    with fastmixer.backend("torch"):
        expected = penalty()
        expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach())
    assert x.grad.abs().max() > 0


def test_no_way_of_asking_for_second_derivatives_gives_a_wrong_one() -> None:
    """What torch adds up along other paths must not hide that the fused gradient's part is missing."""
    x, halves, _ = block_inputs(dataclasses.replace(SMALL, dtype=FP64))
    half = halves["channel"]
    weight = half.fc1_weight.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        return functional.channel_mixing(x, **half._asdict()).square().sum()

    def penalised(x: Tensor) -> Tensor:
        value = loss(x)
        return value + torch.autograd.grad(value, x, create_graph=True)[0].square().sum()

    given = torch.ones_like(x)
    for ask in (
        lambda: torch.autograd.functional.hvp(loss, x, given),
        lambda: torch.autograd.functional.jvp(loss, x, given),
        lambda: torch.autograd.functional.hessian(loss, x),
        lambda: torch.autograd.grad(penalised(x.requires_grad_()), weight),
        lambda: penalised(x.requires_grad_()).backward(inputs=[weight]),
    ):
        with pytest.raises(RuntimeError, match="differentiated once only"):
            ask()


def test_batched_gradients_are_refused_by_name() -> None:
    x, halves, g = block_inputs(SMALL)
    out = block(x.requires_grad_(), halves)
    several = torch.stack([g, g])
    for ask in (
        lambda: torch.autograd.grad(out, x, several, is_grads_batched=True, retain_graph=True),
        lambda: torch.vmap(lambda g: torch.autograd.grad(out, x, g, retain_graph=True))(several),
    ):
        with pytest.raises(RuntimeError, match=r'one gradient at a time.*fastmixer\.backend\("torch"\)'):
            ask()


def test_a_gradient_of_zeros_without_memory() -> None:
    x, halves, g = block_inputs(SMALL)
    out = block(x.requires_grad_(), halves)
    (gradient,) = torch.autograd.grad(out, x, torch._efficientzerotensor(g.shape, dtype=g.dtype))
    assert not gradient.any()


@pytest.mark.parametrize("part", ["token", "channel", "block"])
def test_a_gradient_that_is_a_negated_view(part: str) -> None:
    """As behind a lazily conjugated tensor: its memory holds the opposite of its values."""
    x, halves, g = block_inputs(dataclasses.replace(SMALL, dtype=FP64))
    halves = {half: halves[half] for half in HALVES[part]}
    arrived: list[bool] = []

    def found(run: Callable) -> list[Tensor]:
        asked = list(leaves(x, halves).values())
        y = run(x, halves)
        y.register_hook(lambda g: arrived.append(g.is_neg()))
        z = torch.complex(torch.zeros_like(y), y).conj() * g
        return torch.autograd.grad(z.imag.sum(), asked)

    for tensor in leaves(x, halves).values():
        tensor.requires_grad_()
    fused = found(lambda x, halves: functional.prepared(x, halves)())
    torch.testing.assert_close(fused, found(run_eager))
    assert arrived == [True, True] and all(gradient.any() for gradient in fused)


def test_what_was_kept_must_not_change_before_the_backward() -> None:
    x, halves, g = block_inputs(SMALL)
    weight = halves["token"].fc1_weight.requires_grad_()
    out = block(x, halves)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(g)


@pytest.mark.parametrize("half", ["token", "channel"])
@pytest.mark.parametrize("options", [{}, {"approximate": "tanh", "lean": True, "one_pass": False}])
def test_gradcheck(half: str, options: dict) -> None:
    case = dataclasses.replace(Case(1, 3, 4, 2, 3, FP64, scale="vector"), **options)
    x, halves, _ = block_inputs(case)
    mine = halves[half]
    run = fused_run(case, context_of(case, x.device))

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        return run(x, {half: MixingParams(*parameters, *mine[6:])})

    inputs = [t.requires_grad_() for t in (x, *mine[:6])]
    assert torch.autograd.gradcheck(call, inputs)


# ---- strides of the gradient, and empty batches ----------------------------------------------------------


@pytest.mark.parametrize("layout", ["expanded everywhere", "transposed", "channel slice", "batch last"])
def test_a_strided_gradient_gives_the_bits_of_a_dense_one(layout: str) -> None:
    x, halves, g = block_inputs(SMALL)
    g = laid_out(g, layout)
    strided, dense = (gradients(block, x.clone(), halves, grad) for grad in (g, g.contiguous()))
    assert not g.is_contiguous()
    for name, gradient in strided.items():
        assert torch.equal(gradient, dense[name]), name


def test_an_empty_batch_has_gradients_of_zero() -> None:
    x, halves, g = block_inputs(dataclasses.replace(SMALL, B=0))
    for name, gradient in gradients(block, x, halves, g).items():
        assert not gradient.any(), name

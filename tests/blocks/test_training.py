"""Training whole modules: activation checkpointing, drop path, autocast, GradScaler, optimizers."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from timm.models.mlp_mixer import MixerBlock as TimmBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastmixer
from fastmixer import demo, parity

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def timm_block(drop_path: float = 0.0, dim: int = 24, seq_len: int = 10) -> nn.Module:
    torch.manual_seed(0)
    made = TimmBlock(dim, seq_len, mlp_ratio=(0.5, 2.0), drop_path=drop_path)
    demo.randomise(made)
    return made


def training_gradients(model: Callable[[Tensor], Tensor], of: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    out = model(x)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *of.parameters()])]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", ["balanced", "lean"])
def test_activation_checkpointing_changes_nothing(reentrant: bool, mode: str) -> None:
    fused = timm_block(drop_path=0.4).train()
    fastmixer.fuse(fused, strict=True)
    x = torch.randn(6, 10, 24)
    with fastmixer.memory(mode):
        plain = training_gradients(fused, fused, x)
        x = x.requires_grad_()

        def checkpointed(x: Tensor) -> Tensor:
            return checkpoint(fused, x, use_reentrant=reentrant)

        torch.manual_seed(3)
        out = checkpointed(x)
        out.square().sum().backward()
    again = [out.detach(), x.grad, *(p.grad for p in fused.parameters())]
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_with_a_choice_where_the_backward_is_another_thread() -> None:
    """On a GPU autograd's threads repeat the forward: ``memory`` says how a choice gets there."""
    fused = timm_block().train()
    fastmixer.fuse(fused, strict=True)
    x = torch.randn(2, 10, 24)
    with fastmixer.memory("lean"):
        plain = training_gradients(fused, fused, x)

    @contextlib.contextmanager
    def choice() -> Iterator[None]:
        with fastmixer.backend("triton"), fastmixer.memory("lean"):
            yield

    x = x.requires_grad_()
    out = checkpoint(fused, x, use_reentrant=False, context_fn=lambda: (choice(), choice()))
    thread = threading.Thread(target=out.backward, args=(2 * out.detach(),))
    thread.start()
    thread.join(60)
    for a, b in zip(plain[1:], [x.grad, *(p.grad for p in fused.parameters())], strict=True):
        assert torch.equal(a, b)


def test_timm_gradient_checkpointing() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.models.mlp_mixer.MlpMixer(
        num_classes=5, img_size=32, patch_size=8, num_blocks=2, embed_dim=24, drop_path_rate=0.2
    )
    demo.randomise(model)
    fastmixer.fuse(model, strict=True)
    images = torch.randn(3, 3, 32, 32)
    plain = training_gradients(model.train(), model, images)
    model.set_grad_checkpointing(True)
    for a, b in zip(plain, training_gradients(model, model, images), strict=True):
        assert torch.equal(a, b)


def test_drop_path_draws_what_timm_draws() -> None:
    plain = timm_block(drop_path=0.5).train()
    fused = copy.deepcopy(plain)
    fastmixer.fuse(fused, strict=True)
    x = torch.randn(16, 10, 24)
    truth = copy.deepcopy(plain).double()
    torch.manual_seed(3)
    plain(x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    out = fused(x)
    assert torch.equal(torch.get_rng_state(), state)
    dropped = (out == x).flatten(1).all(1)
    assert 0 < int(dropped.sum()) < 16, "drops some samples in both halves"
    results = [training_gradients(m, m, x) for m in (fused, plain)]
    exact = training_gradients(truth, truth, x.double())
    for a, b, c in zip(*results, exact, strict=True):
        compared = parity.compare(a, b, c, FP32)
        assert compared.ok, compared


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_trains_like_eager(dtype: torch.dtype) -> None:
    """fp32 parameters and residual stream, 16-bit products, fp32 gradients."""
    plain = timm_block(dim=128, seq_len=49).train()
    fused = copy.deepcopy(plain)
    fastmixer.fuse(fused, strict=True)
    x = torch.randn(4, 49, 128)
    truth = copy.deepcopy(plain).double()
    exact = training_gradients(truth, truth, x.double())
    with torch.autocast("cpu", dtype):
        results = [training_gradients(m, m, x) for m in (fused, plain)]
    for a, b, c in zip(*results, exact, strict=True):
        assert a.dtype == b.dtype == FP32
        compared = parity.compare(a, b, c, FP32)
        assert compared.ok, compared


def test_an_autocast_around_the_backward_changes_nothing() -> None:
    fused = timm_block().train()
    fastmixer.fuse(fused, strict=True)
    x = torch.randn(4, 10, 24)
    plain = training_gradients(fused, fused, x)
    x = x.requires_grad_()
    out = fused(x)
    with torch.autocast("cpu", BF16):
        out.backward(2 * out.detach())
    for a, b in zip(plain[1:], [x.grad, *(p.grad for p in fused.parameters())], strict=True):
        assert torch.equal(a, b)


def test_grad_scaler_skips_overflows_and_steps_otherwise() -> None:
    fused = timm_block().train()
    fastmixer.fuse(fused, strict=True)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-30, growth_interval=10**6)
    x = torch.randn(4, 10, 24)
    stepped = []
    for _ in range(2):
        before = [p.detach().clone() for p in fused.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", FP16):
            loss = fused(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        stepped.append(any(not torch.equal(a, b) for a, b in zip(before, fused.parameters(), strict=True)))
    assert stepped == [False, True] and scaler.get_scale() == 2.0**10


def test_training_uses_the_new_weights_at_once() -> None:
    """Packed weights are redone after every step, of fused optimizers too."""
    for options in ({}, {"fused": True}):
        models = [timm_block().train() for _ in range(2)]
        fastmixer.fuse(models[0], strict=True)
        losses = []
        for model in models:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, **options)
            torch.manual_seed(1)
            for _ in range(4):
                optimizer.zero_grad()
                loss = (model(torch.randn(2, 10, 24)) - 1).square().mean()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        assert losses[:4] == pytest.approx(losses[4:], rel=1e-4) and losses[3] < losses[0]

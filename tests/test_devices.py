"""Launches are made on the device of x, wherever the current one is; stubs stand for GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support import Case, leaves, make_half, make_x
from torch import Tensor

import fastmixer
from fastmixer import configs, functional
from fastmixer.ops import launch, torch_ops


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def test_the_current_device_becomes_that_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or contextlib.nullcontext())
    second = torch.device("cuda", 1)
    with launch.device_of(SimpleNamespace(device=second, is_cuda=True)), launch.device_of(torch.empty(0)):
        assert made == [second]


def test_every_gpu_has_its_own_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles for an sm_80 do not fit an sm_120."""
    capabilities = {8: (8, 0), 9: (12, 0)}

    def properties(device: torch.device) -> SimpleNamespace:
        major, minor = capabilities[device.index]
        return SimpleNamespace(
            name="A GPU", major=major, minor=minor, multi_processor_count=100, gcnArchName="gfx942",
            shared_memory_per_block_optin=100 * 1024,
        )  # fmt: skip

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.version, "hip", None)
    configs.target_of.cache_clear()
    try:
        assert [launch.context_of(torch.device("cuda", i)).target.arch for i in (8, 9)] == [80, 120]
    finally:
        configs.target_of.cache_clear()


SMALL = Case(2, 10, 24, 12, 48, torch.float32)


def in_operators(x: Tensor, halves: dict) -> Tensor:
    return torch_ops.call(x, halves, x.dtype, torch.is_grad_enabled(), lean=False, kernels_only=True)


CALLS = {
    "token": lambda x, halves: functional.token_mixing(x, *halves["token"][:6]),
    "channel": lambda x, halves: functional.channel_mixing(x, *halves["channel"][:6]),
    "block": lambda x, halves: functional.mixer_block(x, *halves.values()),
    "operators": in_operators,
}


@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", CALLS)
def test_every_launch_is_made_on_the_device_of_x(
    name: str, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current device. In an ordinary backward autograd sets it, elsewhere we do."""
    generator, entered, launched = torch.Generator().manual_seed(0), [], []
    original = launch.Launch

    @contextlib.contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x.shape)
        yield
        entered.pop()

    def record(*args: object) -> launch.Launch:
        launched.append(entered == [(SMALL.B, SMALL.S, SMALL.C)])
        return original(*args)

    monkeypatch.setattr(launch, "device_of", device_of)
    monkeypatch.setattr(launch, "Launch", record)
    x = make_x(SMALL, generator)
    halves = {of: make_half(SMALL, f"{of}s", generator) for of in ("token", "channel")}
    for tensor in leaves(x, halves).values():
        tensor.requires_grad_(trains)
    with contextlib.nullcontext() if trains else torch.no_grad():
        y = CALLS[name](x, halves)
    assert launched and all(launched)
    if trains and name == "operators":
        launched.clear()
        y.sum().backward()
        assert launched and all(launched)

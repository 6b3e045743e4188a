"""What the launchers allocate and launch, and on which device: the promises that no parity test can see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support import Case, block_inputs, context_of, leaves
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastmixer
from fastmixer import configs, functional
from fastmixer.ops import channel_mixing, launch, mixing, token_mixing, torch_ops
from fastmixer.ops.layouts import Kept


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that torch makes, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in given:
            self.shapes.append(tuple(out.shape))
        return out


CASE = Case(2, 196, 96, 80, 160)


def allocations(layout: str) -> list[tuple[int, ...]]:
    """What a block with kept weights allocates for x in the given layout."""
    case = Case(**{**vars(CASE), "layout": layout})
    x, halves, _ = block_inputs(case)
    # Nothing is run: the interpreter makes tensors of its own.
    context = launch.Context(context_of(case, x.device).target, Kept(), execute=lambda _: None)

    def block() -> None:
        y, moments = token_mixing.forward(x, halves["token"], case.dtype, context)
        channel_mixing.forward(y, halves["channel"], case.dtype, context, moments)

    block()  # packs the weights
    with Allocations() as made:
        block()
    return made.shapes


@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "token slice", "strided channels", "expanded"]
)
def test_a_block_allocates_its_outputs_and_the_channel_hidden_only(layout: str) -> None:
    """No hidden of the token MLP (2 * 96 * 80 elements) and no copy of x, transposed or not."""
    B, S, C, E = CASE.B, CASE.S, CASE.C, CASE.E
    moments = (1, 2, B * S)
    assert allocations(layout) == [moments, (B, S, C), moments, (B * S, E), (B, S, C)]


@pytest.mark.parametrize(
    ("dtype", "terms"),
    [(torch.bfloat16, 7), (torch.float16, 9), (torch.float32, 0), (torch.float64, 0)],
)
def test_gelu_is_a_polynomial_where_it_is_rounded_to_16_bits(dtype: torch.dtype, terms: int) -> None:
    case = Case(1, 10, 16, 8, 24, dtype)
    x, halves, _ = block_inputs(case)
    call = launch.call_of("channel", x, halves["channel"], dtype, context_of(case, x.device))
    assert call.gelu_constants()["POLYNOMIAL"] == terms


@pytest.mark.parametrize("case", [Case(0, 5, 8, 4, 4), Case(0, 300, 8, 4, 4)], ids=["short", "long"])
def test_an_empty_batch_launches_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    x, halves, _ = block_inputs(case)
    monkeypatch.setattr(launch, "execute", lambda item: pytest.fail("launched"))
    with torch.no_grad():
        assert functional.mixer_block(x, *halves.values()).shape == x.shape


# ---- the device of a launch: stubs stand for GPUs --------------------------------------------------------


def test_the_current_device_becomes_that_of_x(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device) or contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    second = torch.device("cuda", 1)
    first = torch.device("cuda", 0)
    for device in (first, second):
        with launch.device_of(SimpleNamespace(device=device, is_cuda=True)), launch.device_of(torch.empty(0)):
            assert made == [second] * (device == second)


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
    tensors = mixing.tensors_of(x, halves)
    settings = mixing.settings_of(halves, x.dtype, mixing.needs_of(tensors), kernels_only=True)
    return torch_ops.call(settings, *tensors)


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
    """Triton launches on the current device."""
    entered, launched = [], []
    original = launch.execute

    @contextlib.contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        entered.append(x.shape)
        yield
        entered.pop()

    def record(item: launch.Launch) -> None:
        launched.append(set(entered) == {(SMALL.B, SMALL.S, SMALL.C)})
        original(item)

    monkeypatch.setattr(launch, "device_of", device_of)
    monkeypatch.setattr(launch, "execute", record)
    x, halves, _ = block_inputs(SMALL)
    for tensor in leaves(x, halves).values():
        tensor.requires_grad_(trains)
    with contextlib.nullcontext() if trains else torch.no_grad():
        y = CALLS[name](x, halves)
    assert launched and all(launched)
    if trains:
        launched.clear()
        y.sum().backward()
        assert launched and all(launched)

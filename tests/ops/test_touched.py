"""What kernels touch: nothing outside the tensors they were given, and every output element once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import (
    Case,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    leaves,
    with_library,
    with_sms,
)
from torch import Tensor

from fastmixer.configs import Library, Target, TileConfig
from fastmixer.ops import channel_mixing, launch, token_mixing

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Bounds:
    """Checks every address that the interpreter reads or writes against the tensors of the running launch.

    One access stays in one tensor, and no launch writes an element twice: on a GPU that would be a race.
    """

    def __init__(self) -> None:
        self.extents = np.empty((0, 2), dtype=np.int64)
        self.stored: list[np.ndarray] = []
        self.checked: dict[str, int] = {}  # addresses, by kernel
        self.kernel = ""

    def __call__(self, recorded: launch.Launch) -> None:
        tensors = list(recorded.tensors())
        self.extents = np.array([extent(t) for t in tensors])
        self.stored.clear()
        self.kernel = recorded.kernel_name
        launch.execute(recorded)
        stored = np.concatenate(self.stored)
        assert np.unique(stored).size == stored.size > 0, f"{self.kernel} writes elements twice, or none"

    def check(self, pointers: np.ndarray, mask: np.ndarray) -> np.ndarray:
        used = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.int64)
        self.checked[self.kernel] = self.checked.get(self.kernel, 0) + used.size
        inside = [((used >= first) & (used < end)).sum() for first, end in self.extents]
        assert max(inside) == used.size, f"{self.kernel}: {used.size - max(inside)} addresses of {used.size}"
        return used


def extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor and that behind its last element."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bounds]:
    launch.kernels()
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    watch, load, store = Bounds(), Builder.create_masked_load, Builder.create_masked_store

    def checked_load(self, ptrs, mask, *rest):
        watch.check(ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        watch.stored.append(watch.check(ptrs.data, mask.data))
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(Builder, "create_masked_load", checked_load)
    monkeypatch.setattr(Builder, "create_masked_store", checked_store)
    yield watch


TILES = TileConfig(32, 32, 16)
DEEP = TileConfig(32, 32, 32)  # deeper than what rows are padded to
TOUCHED = {
    "ragged": Case(2, 21, 37, 19, 35, BF16, scale="vector", tiles=TILES),
    "ragged, two passes": Case(2, 21, 37, 19, 35, BF16, scale="vector", tiles=DEEP, one_pass=False),
    "ragged, fp32": Case(2, 21, 37, 19, 35, FP32, tiles=TILES),
    "autocast": Case(3, 21, 37, 19, 35, FP16, x_dtype=FP32, tiles=TILES),
    "three pieces": Case(1, 100, 20, 19, 35, FP16, tiles=TILES),
    "three channel blocks": Case(2, 21, 70, 19, 35, BF16, tiles=TILES),
    "transposed": Case(2, 21, 37, 19, 35, BF16, layout="transposed", tiles=TILES, one_pass=False),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_kernels_touch_their_arguments_only(name: str, bounds: Bounds) -> None:
    case = TOUCHED[name]
    x, halves, _ = block_inputs(case)
    token, channel = halves["token"], halves["channel"]
    context = dataclasses.replace(context_of(case, x.device), execute=bounds)
    y, moments = token_mixing.forward(x, token, case.dtype, context)
    channel_mixing.forward(y, channel, case.dtype, context, moments)
    channel_mixing.forward(x, channel, case.dtype, context)
    added = with_library(context, {"channel_fc2": Library.ADDMM})  # fc1 writes ones behind the hidden
    channel_mixing.forward(x, channel._replace(residual_scale=None), case.dtype, added)
    assert {"row_moments", "fc1", "fc2"} < bounds.checked.keys()
    assert ("token_mixing" in bounds.checked) == (case.one_pass is None)


@pytest.mark.parametrize("lean", [False, True])
@pytest.mark.parametrize("name", TOUCHED)
def test_passes_around_library_products_touch_their_arguments_only(
    name: str, lean: bool, bounds: Bounds
) -> None:
    case = dataclasses.replace(TOUCHED[name], lean=lean)
    x, halves, g = block_inputs(case)
    context = dataclasses.replace(context_of(case, x.device), execute=bounds)
    context = with_library(context, {"channel_fc1": Library.ATEN, "channel_fc2": Library.ATEN})
    gradients(fused_run(case, context), x, {"channel": halves["channel"]}, g)
    rows = case.B * case.S
    assert bounds.checked["gelu_fwd"] == 2 * rows * case.E
    assert bounds.checked["residual_fwd"] >= 3 * rows * case.C


RAGGED = Case(2, 21, 37, 19, 35, BF16, scale="vector", tiles=TILES)
WIDE = {"x_dtype": FP32, "g_layout": "expanded everywhere", "lean": True}
A100 = Target("cuda", 80, 2, 163 * 1024)  # dW1 and dW2 take a launch each
BACKWARD = {
    "balanced": (RAGGED, with_sms(1)),
    "lean": (dataclasses.replace(RAGGED, lean=True, tiles=DEEP), with_sms(3)),
    "two passes": (dataclasses.replace(RAGGED, one_pass=False, lean=True), with_sms(1)),
    "transposed, two passes": (dataclasses.replace(RAGGED, layout="transposed", one_pass=False), with_sms(3)),
    "fp32": (Case(2, 21, 37, 19, 35, FP32, tiles=TILES, g_layout="transposed"), with_sms(3)),
    "autocast": (Case(3, 21, 37, 19, 35, FP16, tiles=TILES, **WIDE), with_sms(1)),
    "even": (Case(2, 32, 64, 32, 32, BF16, tiles=TILES, g_layout="channel slice", lean=True), with_sms(1)),
    "last share empty": (Case(5, 21, 20, 19, 35, BF16, tiles=TILES, g_layout="batch last"), with_sms(2)),
    "three pieces": (Case(1, 100, 37, 70, 8, FP16, tiles=TILES), A100),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_backward_kernels_touch_their_arguments_only(name: str, bounds: Bounds) -> None:
    case, target = BACKWARD[name]
    x, halves, g = block_inputs(case)
    context = dataclasses.replace(context_of(case, x.device), target=target, execute=bounds)
    run, biases = fused_run(case, context), [params.fc2_bias for params in halves.values()]
    gradients(run, x, halves, g)
    for tensor in leaves(x, halves).values():
        tensor.requires_grad_(any(tensor is bias for bias in biases))
    torch.autograd.grad(run(x, halves), biases, g)
    one_pass = {"token_dgrad", "token_wgrad"} if case.one_pass is None else set()
    backward = {"layer_norm_fwd", "layer_norm_bwd", "mlp_hidden_bwd"} | one_pass
    assert bounds.checked.keys() >= backward
    assert all(bounds.checked[kernel] > x.numel() for kernel in backward)

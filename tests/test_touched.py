"""What kernels touch: nothing outside the tensors they were given, and every output element once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support import Case, context_of, make_half, make_x

from fastmixer import launch, launch_forward
from fastmixer.configs import TileConfig

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Bounds:
    """Checks every address that the interpreter reads or writes against the tensors of the running launch."""

    def __init__(self) -> None:
        self.extents = np.empty((0, 2), dtype=np.int64)
        self.checked = 0

    def __call__(self, recorded: launch.Launch) -> None:
        tensors = [t for t in recorded.args.values() if isinstance(t, torch.Tensor)]
        self.extents = np.array(
            [
                (
                    t.data_ptr(),
                    t.data_ptr()
                    + (sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1)
                    * t.element_size(),
                )
                for t in tensors
            ]
        )
        launch.execute(recorded)

    def check(self, pointers: np.ndarray, mask: np.ndarray) -> None:
        used = pointers[np.broadcast_to(mask, pointers.shape).astype(bool)].astype(np.int64)
        self.checked += used.size
        inside = np.zeros(used.shape, dtype=bool)
        for first, end in self.extents:
            inside |= (used >= first) & (used < end)
        assert inside.all(), f"{(~inside).sum()} of {used.size} addresses lie outside every argument"


@pytest.fixture
def bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bounds]:
    launch.kernels()
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    watch, load, store = Bounds(), Builder.create_masked_load, Builder.create_masked_store

    def checked_load(self, ptrs, mask, *rest):
        watch.check(ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest)

    def checked_store(self, ptrs, value, mask, *rest):
        watch.check(ptrs.data, mask.data)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(Builder, "create_masked_load", checked_load)
    monkeypatch.setattr(Builder, "create_masked_store", checked_store)
    yield watch


TILES = TileConfig(32, 32, 16)
TOUCHED = {
    "ragged": Case(2, 21, 37, 19, 35, BF16, scale="vector", tiles=TILES),
    "ragged, two passes": Case(2, 21, 37, 19, 35, BF16, scale="vector", tiles=TILES, one_pass=False),
    "ragged, fp32": Case(2, 21, 37, 19, 35, FP32, tiles=TILES),
    "autocast": Case(3, 21, 37, 19, 35, FP16, x_dtype=FP32, tiles=TILES),
    "three pieces": Case(1, 100, 20, 19, 35, FP16, tiles=TILES),
    "three channel blocks": Case(2, 21, 70, 19, 35, BF16, tiles=TILES),
    "transposed": Case(2, 21, 37, 19, 35, BF16, layout="transposed", tiles=TILES, one_pass=False),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_kernels_touch_their_arguments_only(name: str, bounds: Bounds) -> None:
    case = TOUCHED[name]
    generator = torch.Generator().manual_seed(0)
    x, token, channel = (
        make_x(case, generator),
        *(make_half(case, m, generator) for m in ("tokens", "channels")),
    )
    context = dataclasses.replace(context_of(case, x.device), execute=bounds)
    y, moments = launch_forward.token_mixing(x, token, case.dtype, context)
    launch_forward.channel_mixing(y, channel, case.dtype, context, moments)
    launch_forward.channel_mixing(x, channel, case.dtype, context)
    assert bounds.checked > x.numel()

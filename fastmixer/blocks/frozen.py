"""What a frozen block keeps: its packed weights, and what tells that the block has other weights by now."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastmixer import dispatch
from fastmixer.blocks.structure import Structure
from fastmixer.dtypes import product_dtype
from fastmixer.ops import launch, packing
from fastmixer.ops.launch import Context
from fastmixer.ops.layouts import Kept, Layout, PackedLinear
from fastmixer.params import MixingParams

_BATCH = 64  # packed for at first: one that needs another layout has it packed, and kept, at its first call


class Frozen(Kept):
    """What a frozen block keeps: its packed weights, and which parameters they were made of.

    At first they are packed for an input in the weights' dtype, if kernels run there at all.
    """

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self._parameters = [(name, p, _state(p)) for name, p in _parameters(structure)]
        halves = _halves(structure)
        weight = halves["token"].fc1_weight
        dtype = product_dtype(weight.device, weight.dtype)
        if dispatch.why_not_triton(weight.device, weight.dtype, dtype) is None:
            x = torch.empty((_BATCH, *structure.size), dtype=weight.dtype, device="meta")
            with torch.no_grad(), launch.device_of(weight):
                packing.pack_forward(x, halves, dtype, _context_of(weight.device, self))

    def broken(self, structure: Structure) -> str | None:
        """What happened to the parameters since, as far as PyTorch shows it; None if nothing."""
        for (name, then, state), (_, now) in zip(self._parameters, _parameters(structure), strict=True):
            if now is not then:
                return f"{name} was replaced"
            if _state(now) != state:
                return f"{name} was written or moved"
        return None

    def keep(self, role: str, layout: Layout, packed: PackedLinear) -> None:
        """Keeps what a call had to pack; not what is a CUDA graph's, whose replays make it anew."""
        if packed.weight.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            torch.cuda.current_stream(packed.weight.device).synchronize()  # other streams may read it next
        super().keep(role, layout, packed)

    def keep_call(self, key: tuple, plan: Any, layers: list[Tensor | None]) -> None:
        """Keeps what a call like this one needs, but in a CUDA graph's capture: see ``keep``."""
        if not (layers[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            super().keep_call(key, plan, layers)

    def is_stale(self, structure: Structure) -> bool:
        """Whether packing the weights as they are now gives other bits."""
        halves = _halves(structure)
        weight = halves["token"].fc1_weight
        with launch.device_of(weight):
            for (role, _), (layout, kept) in self._packed.items():
                context = _context_of(weight.device)
                now = layout.renewed(role, launch.dense_vectors(halves[role.partition("_")[0]], context))
                fresh = packing.pack({role: now}, context)[role]
                if not all(map(_equal, kept, fresh)):
                    return True
        return False


def _halves(structure: Structure) -> dict[str, MixingParams]:
    return {"token": structure.token.params(), "channel": structure.channel.params()}


def _context_of(device: torch.device, kept: Frozen | None = None) -> Context:
    """How to pack on ``device``, and where to keep it."""
    return launch.context_of(device, kept, kernels_only=dispatch.current_backend() == "triton")


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and torch.equal(one, other)


def _parameters(structure: Structure) -> Iterator[tuple[str, Tensor | None]]:
    for half_name, half in (("token", structure.token), ("channel", structure.channel)):
        for name, parameter in zip(MixingParams._fields[:6], half.parameters(), strict=True):
            yield f"{name} of the {half_name} half", parameter


def _state(parameter: Tensor | None) -> tuple | None:
    """What PyTorch shows of a parameter's contents: where they are, and how often they were written."""
    if parameter is None:
        return None
    version = None if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype

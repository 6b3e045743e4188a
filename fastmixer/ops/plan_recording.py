"""How a plan is recorded: the launchers run on tensors without data, and what they do is kept.

Every launch and every call of PyTorch's is a step, every tensor that they allocate gets its place.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmixer.ops import launch
from fastmixer.ops.launch import Descriptor, Launch
from fastmixer.ops.plan import (
    Allocation,
    Native,
    Plan,
    Release,
    Seen,
    TorchCall,
    View,
    found,
    mapped,
)

ALIGNMENT = 256  # bytes: of whatever lies in the workspace
LARGE = 8 << 20  # bytes: what is larger is allocated by itself, and freed behind its last use


def record(
    function: Callable[..., Sequence[Tensor | None]], context: launch.Context, inputs: Sequence[tuple | None]
) -> Plan:
    """The plan of ``function(context, *tensors)`` for tensors that look like ``inputs`` (``Seen``).

    Must be called where the launches will be made, on their device: kernels are compiled and loaded here.
    """
    looks = [None if look is None else Seen._make(look) for look in inputs]
    metas = [look and _meta(look) for look in looks]
    steps: list[Launch | TorchCall] = []

    def call(called: Callable, *args: Any, **outputs: Tensor) -> None:
        steps.append(TorchCall(called, args, outputs))

    with torch.no_grad():
        results = function(replace(context, execute=steps.append, call=call), *metas)
    memory = _Memory(metas, results, steps)
    alignments = [look.alignment if look else 0 for look in looks]
    lowered: list[Native | Launch | TorchCall | Allocation | Release] = []
    for index, step in enumerate(steps):
        lowered += memory.before[index]
        if isinstance(step, TorchCall):
            lowered.append(TorchCall(step.function, *mapped(Tensor, memory.view, (step.args, step.outputs))))
        else:
            step = replace(step, args=mapped(Tensor, memory.view, step.args))
            lowered.append(step if launch.kernels().interpreted else _native(step, alignments))
        lowered += memory.behind[index]
    return Plan(tuple(lowered), memory.results, memory.workspace)


def _meta(look: Seen) -> Tensor:
    """A tensor without data that looks like it: its address is the offset into its storage."""
    offset = look.alignment // look.dtype.itemsize
    size = offset + 1 + sum((size - 1) * stride for size, stride in zip(look.shape, look.stride, strict=True))
    whole = torch.empty(max(size, 0), dtype=look.dtype, device="meta")
    return whole.as_strided(look.shape, look.stride, offset)


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks of a tensor to specialise a kernel for it."""

    view: View
    alignment: int  # of the memory that it lies in

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

    @property
    def shape(self) -> torch.Size:
        return self.view.shape

    def stride(self) -> tuple[int, ...]:
        return self.view.stride

    def data_ptr(self) -> int:
        return self.alignment + self.view.offset

    def ptr_range(self) -> int:
        """Bytes from its address to its end: on AMD up to 2 GiB are addressed by 32 bits."""
        sizes = zip(self.view.shape, self.view.stride, strict=True)
        return (1 + sum((size - 1) * stride for size, stride in sizes)) * self.dtype.itemsize


def _native(step: Launch, alignments: list[int]) -> Native | Launch:
    """The launch with its kernel compiled and loaded; as it is where this Triton does not tell how to."""

    def pointer(view: View) -> _Pointer:  # what a plan allocates is aligned
        return _Pointer(view, alignments[view.memory] if view.memory < len(alignments) else 0)

    hooks = getattr(step.kernel, "pre_run_hooks", ())
    warmup = getattr(step.kernel, "warmup", None)
    if warmup is None or hooks:
        return step
    described = replace(step, args=mapped(View, pointer, step.args)).arguments()
    compiled = warmup(grid=step.grid, **described, **step.options)
    if not hasattr(compiled, "__getitem__"):
        return step
    named = [step.args[name] for name in step.kernel.arg_names]
    pointers = [(i, arg.memory, arg.offset) for i, arg in enumerate(named) if isinstance(arg, View)]
    tuples = [(i, arg) for i, arg in enumerate(named) if isinstance(arg, tuple) and found(View, arg)]
    descriptors = [
        (i, arg.base.memory, arg.base.offset, _relocated(described[name]))
        for i, (name, arg) in enumerate(zip(step.kernel.arg_names, named, strict=True))
        if isinstance(arg, Descriptor)
    ]
    values = tuple(None if isinstance(arg, (View, Descriptor)) else arg for arg in named)
    bound = tuple(pointers), tuple(tuples), tuple(descriptors)
    return Native(step, hooks, compiled[(*step.grid, 1, 1)[:3]], values, *bound)


class _Address(NamedTuple):
    """What Triton's launch asks of a descriptor's base."""

    address: int

    def data_ptr(self) -> int:
        return self.address


def _relocated(descriptor: Any) -> Callable[[int], Any]:
    """Gives Triton's descriptor of a matrix that looks the same and lies at another address.

    The last ones are kept: PyTorch's allocator gives the same addresses again and again.
    """

    @functools.lru_cache(maxsize=8)
    def at(address: int) -> Any:
        bound = copy.copy(descriptor)
        bound.base = _Address(address)
        return bound

    return at


class _Memory:
    """Where the tensors of a recording lie.

    Every result has a memory of its own, and so has what is large, from the first step that uses it to the
    last; what is small lies in the workspace, where two overlap only if their lives do not. before, behind:
    what is allocated and released around each step.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor | None],
        results: Sequence[Tensor | None],
        steps: Sequence[Launch | TorchCall],
    ) -> None:
        # The address of an input is that of its first element.
        self._places = {
            _storage(t): (i, -t.storage_offset() * t.element_size())
            for i, t in enumerate(inputs)
            if t is not None
        }
        made = {_storage(t): t for t in results if t is not None}
        lives: dict[int, list[int]] = {}  # of each memory: bytes, first and last step; in order of their use
        for index, step in enumerate(steps):
            for tensor in found(Tensor, step.args if isinstance(step, Launch) else tuple(step)):
                if (key := _storage(tensor)) not in self._places:
                    size = launch.round_up(tensor.untyped_storage().nbytes(), ALIGNMENT)
                    lives.setdefault(key, [size, index, index])[2] = index
        whole = all(t.untyped_storage().nbytes() == t.nbytes for t in made.values())
        if not whole or made.keys() - lives.keys() or len(made) < sum(t is not None for t in results):
            raise ValueError("a plan returns whole tensors of its own: a result is a view or an input")
        self.before: list[list[Allocation]] = [[] for _ in steps]
        self.behind: list[list[Release]] = [[] for _ in steps]
        number, small = len(inputs) + 1, []
        for key, (size, first, last) in lives.items():
            if key not in made and size <= LARGE:
                small.append(key)
                continue
            if key in made:
                t = made[key]
                self.before[first].append(Allocation(t.shape, t.stride(), t.dtype))
            else:
                self.before[first].append(Allocation((size,), (1,), torch.uint8))
                self.behind[last].append(Release(number))
            self._places[key] = number, 0
            number += 1
        offsets, self.workspace = _arranged([tuple(lives[key]) for key in small])
        self._places |= {key: (len(inputs), offset) for key, offset in zip(small, offsets, strict=True)}
        self.results = tuple(None if t is None else self._places[_storage(t)][0] for t in results)

    def view(self, tensor: Tensor) -> View:
        memory, start = self._places[_storage(tensor)]
        offset = start + tensor.storage_offset() * tensor.element_size()
        return View(memory, offset, tensor.shape, tensor.stride(), tensor.dtype)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _arranged(lives: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets for (bytes, first step, last step) each, and the bytes of all; the largest is placed first."""
    offsets: dict[int, int] = {}
    for index in sorted(range(len(lives)), key=lambda i: -lives[i][0]):
        size, first, last = lives[index]
        beside = sorted(
            (offset, offset + lives[other][0])
            for other, offset in offsets.items()
            if lives[other][1] <= last and first <= lives[other][2]
        )
        offset = 0
        for start, end in beside:
            if offset + size <= start:
                break
            offset = max(offset, end)
        offsets[index] = offset
    total = max((offset + lives[index][0] for index, offset in offsets.items()), default=0)
    return [offsets[index] for index in range(len(lives))], total

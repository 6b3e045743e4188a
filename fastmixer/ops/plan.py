"""Plans: what a call does, recorded once and then repeated.

The launchers (``token_mixing.py`` and its like) decide: tiles, constants, grids, buffers, order. A plan is
made by running them on meta tensors: every launch and every call of PyTorch's is kept, every tensor that they
allocate gets its place. Running the plan is allocating, binding pointers and launching; nothing is decided.

A plan holds no tensor and belongs to nobody: it depends on what its key says alone, ``key_of``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmixer.ops import launch
from fastmixer.ops.launch import Descriptor, Launch

MOST_PLANS = 512  # of the process, about 25 KB each: the oldest goes first


# ---- keys ------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a plan depends on of a tensor: all but its values and its address.

    alignment: the address modulo 16, by which Triton specialises; keys: PyTorch's dispatch keys, which tell
    tensors apart that keep their values in another way (a batched, a negated, a distributed one). Whether it
    needs a gradient is not among them: whoever makes a key says what is asked for.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    alignment: int
    keys: int


_keys = torch._C._dispatch_keys


def seen(tensors: Iterable[Tensor | None]) -> tuple[tuple | None, ...]:
    """The fields of ``Seen`` of each tensor. Raises RuntimeError for one that has no memory or no strides."""
    return tuple([
        t if t is None else
        (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15, _keys(t).raw_repr())
        for t in tensors
    ])  # fmt: skip


_plans: dict[tuple, Any] = {}
_lock = threading.Lock()


def find(key: tuple) -> Any:
    """What was kept under ``key``: a plan, or what else was decided for such a call; None for nothing."""
    return _plans.get(key)


def keep(key: tuple, decision: Any) -> Any:
    """Keeps and returns it, until ``MOST_PLANS`` younger ones are kept."""
    with _lock:
        while len(_plans) >= MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = decision
    return decision


def clear() -> None:
    """Forgets all plans."""
    with _lock:
        _plans.clear()


# ---- plans -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of a plan: in which memory, and at which byte of it.

    Memories are numbered: the inputs, the workspace, and what is allocated on the way.
    """

    memory: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, memories: Sequence[Tensor]) -> Tensor:
        """The tensor, in the memories of a call."""
        memory = memories[self.memory]
        if memory.dtype != self.dtype:  # in bytes
            memory, offset = memory.view(self.dtype), 0
        else:
            offset = memory.storage_offset()
        return memory.as_strided(self.shape, self.stride, offset + self.offset // self.dtype.itemsize)


@dataclass(frozen=True)
class Native:
    """A launch of a compiled kernel.

    launch: the same with a ``View`` in place of every tensor. hooks: the kernel's ``pre_run_hooks``, which
    only Triton's JIT calls. runner: Triton's, with the grid. args: of the kernel, in its order, None in place
    of pointers. pointers: position, memory and offset of each; tuples: position and content of arguments that
    are tuples; descriptors: position, memory and offset of each, and what makes Triton's of an address.
    """

    launch: Launch
    hooks: Sequence[Callable]
    runner: Callable[..., None]
    args: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]
    tuples: tuple[tuple[int, tuple], ...]
    descriptors: tuple[tuple[int, int, int, Callable[[int], Any]], ...]


class TorchCall(NamedTuple):
    """A call of a function of PyTorch's."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    outputs: dict[str, Any]  # by keyword, "out"


class Allocation(NamedTuple):
    """The allocation of the next memory, before the first step that uses it: of a result, or of bytes."""

    shape: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype


class Release(NamedTuple):
    """The end of a memory, behind the last step that uses it."""

    memory: int


@dataclass(frozen=True)
class Plan:
    """What a call does. Called with the tensors it was recorded for, or others that look the same.

    steps: what is done, with a ``View`` in place of every tensor: a ``Native`` launch; a ``Launch`` where
    kernels are interpreted, or this Triton lacks what a native one takes; a ``TorchCall``; an ``Allocation``
    or ``Release``. results: the memory of each result, None for none. workspace: bytes of the one tensor for
    all that is small and lives inside a call only.
    """

    steps: tuple[Native | Launch | TorchCall | Allocation | Release, ...]
    results: tuple[int | None, ...]
    workspace: int

    def __call__(self, *tensors: Tensor | None) -> list[Tensor | None]:
        """The results."""
        x = tensors[0]
        device = x.device
        memories = [*tensors, torch.empty(self.workspace, dtype=torch.uint8, device=device)]
        addresses = [0 if memory is None else memory.data_ptr() for memory in memories]
        with launch.device_of(x):
            stream = launch.kernels().stream()
            for step in self.steps:
                if isinstance(step, Native) and not step.hooks:
                    args = list(step.args)
                    for position, memory, offset in step.pointers:
                        args[position] = addresses[memory] + offset
                    for position, content in step.tuples:
                        args[position] = _bound(content, addresses)
                    for position, memory, offset, at in step.descriptors:
                        args[position] = at(addresses[memory] + offset)
                    step.runner(*args, stream=stream)
                elif isinstance(step, Allocation):
                    shape, stride, dtype = step
                    memories.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
                    addresses.append(memories[-1].data_ptr())
                elif isinstance(step, Release):
                    memories[step.memory] = None
                else:
                    _run(step, memories)
        return [None if index is None else memories[index] for index in self.results]

    def first(self, *tensors: Tensor | None) -> Tensor:
        """The first result."""
        return self(*tensors)[0]


def _bound(content: tuple, addresses: list[int]) -> tuple:
    """A tuple of arguments with the addresses of this call."""
    bound = []
    for item in content:
        if isinstance(item, View):
            item = addresses[item.memory] + item.offset
        elif isinstance(item, tuple):
            item = _bound(item, addresses)
        bound.append(item)
    return tuple(bound)


def _run(step: Native | Launch | TorchCall, memories: Sequence[Tensor]) -> None:
    """Runs what takes tensors."""
    step = step.launch if isinstance(step, Native) else step
    if isinstance(step, Launch):
        launch.execute(replace(step, args=mapped(View, lambda view: view.tensor(memories), step.args)))
    else:
        args = [item.tensor(memories) if isinstance(item, View) else item for item in step.args]
        step.function(*args, **{name: view.tensor(memories) for name, view in step.outputs.items()})


def mapped(kind: type, function: Callable[[Any], object], tree: Any) -> Any:
    """Arguments, which may be in tuples and descriptors, with ``function`` of every one of that kind."""
    if isinstance(tree, dict):
        return {name: mapped(kind, function, item) for name, item in tree.items()}
    if isinstance(tree, tuple):
        return tuple([mapped(kind, function, item) for item in tree])
    if isinstance(tree, Descriptor):
        return replace(tree, base=mapped(kind, function, tree.base))
    return function(tree) if isinstance(tree, kind) else tree


def found(kind: type, tree: Any) -> list:
    """The arguments of that kind."""
    found: list = []
    mapped(kind, found.append, tree)
    return found

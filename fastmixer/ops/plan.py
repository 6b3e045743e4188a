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
from torch.utils._pytree import tree_leaves, tree_map

from fastmixer.ops import launch
from fastmixer.ops.launch import Launch

MOST_PLANS = 512  # of the process, about 30 KB each: the oldest goes first
ALIGNMENT = 256  # bytes: of whatever lies in the workspace


# ---- keys ------------------------------------------------------------------------------------------------


class Seen(NamedTuple):
    """What a plan depends on of a tensor: all but its values and its address.

    alignment: the address modulo 16, by which Triton specialises; keys: PyTorch's dispatch keys, which tell
    tensors apart that keep their values in another way (a batched, a negated, a distributed one).
    """

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool
    alignment: int
    keys: int


_keys = torch._C._dispatch_keys


def seen(tensors: Iterable[Tensor | None]) -> tuple[tuple | None, ...]:
    """The fields of ``Seen`` of each tensor. Raises RuntimeError for one that has no memory or no strides."""
    return tuple([
        t if t is None else
        (t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.data_ptr() & 15, _keys(t).raw_repr())
        for t in tensors
    ])  # fmt: skip


_plans: dict[tuple, Plan] = {}
_lock = threading.Lock()


def find(key: tuple) -> Plan | None:
    """The plan that was kept under ``key``."""
    return _plans.get(key)


def keep(key: tuple, plan: Plan) -> Plan:
    """Keeps a plan until ``MOST_PLANS`` younger ones are kept."""
    with _lock:
        while len(_plans) >= MOST_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan
    return plan


def clear() -> None:
    """Forgets all plans."""
    with _lock:
        _plans.clear()


# ---- plans -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class View:
    """A tensor of a plan: in which memory (inputs, workspace, outputs), and at which byte of it."""

    memory: int
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def tensor(self, memories: Sequence[Tensor]) -> Tensor:
        """The tensor, in the memories of a call."""
        memory = memories[self.memory]
        if memory.dtype != self.dtype:  # the workspace, in bytes
            memory, offset = memory.view(self.dtype), 0
        else:
            offset = memory.storage_offset()
        return memory.as_strided(self.shape, self.stride, offset + self.offset // self.dtype.itemsize)


@dataclass(frozen=True)
class Native:
    """A launch of a compiled kernel.

    launch: what it is made of. runner: Triton's, with the grid. args: of the kernel, in its order, None in
    place of pointers. pointers: position, memory and offset of each; tuples: position and content of
    arguments that are tuples.
    """

    launch: Launch
    runner: Callable[..., None]
    args: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]
    tuples: tuple[tuple[int, tuple], ...]


class Call(NamedTuple):
    """A call of a function of PyTorch's."""

    function: Callable[..., object]
    args: tuple[Any, ...]
    outputs: dict[str, Any]  # by keyword, "out"


class Output(NamedTuple):
    """The allocation of a result, before the first step that writes it: not sooner, so that memory lasts."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Plan:
    """What a call does. Called with the tensors it was recorded for, or others that look the same.

    steps: what is run, with a ``View`` in place of every tensor: a ``Native`` launch; a ``Launch`` where
    kernels are interpreted, or this Triton lacks what a native one takes; a ``Call``; an ``Output``. results:
    the memory of each result, None for none. workspace: bytes for everything that lives inside a call only.
    """

    steps: tuple[Native | Launch | Call | Output, ...]
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
                if isinstance(step, Native):
                    args = list(step.args)
                    for position, memory, offset in step.pointers:
                        args[position] = addresses[memory] + offset
                    for position, content in step.tuples:
                        args[position] = _bound(content, addresses)
                    step.runner(*args, stream=stream)
                elif isinstance(step, Output):
                    shape, stride, dtype = step
                    memories.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
                    addresses.append(memories[-1].data_ptr())
                else:
                    _run(step, memories)
        return [None if index is None else memories[index] for index in self.results]

    @property
    def launches(self) -> list[Launch]:
        """Its launches of kernels, in order, with a ``View`` in place of every tensor."""
        launches = [step.launch if isinstance(step, Native) else step for step in self.steps]
        return [item for item in launches if isinstance(item, Launch)]

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


def _run(step: Launch | Call, memories: Sequence[Tensor]) -> None:
    """Runs what takes tensors."""
    if isinstance(step, Launch):
        launch.execute(replace(step, args=_mapped(View, lambda view: view.tensor(memories), step.args)))
    else:
        args = [item.tensor(memories) if isinstance(item, View) else item for item in step.args]
        step.function(*args, **{name: view.tensor(memories) for name, view in step.outputs.items()})


def _mapped(kind: type, function: Callable[[Any], object], tree: Any) -> Any:
    """The tree of arguments with ``function`` of every leaf of that kind."""
    return tree_map(lambda leaf: function(leaf) if isinstance(leaf, kind) else leaf, tree)


# ---- recording -------------------------------------------------------------------------------------------


def record(
    function: Callable[..., Sequence[Tensor | None]], context: launch.Context, inputs: Sequence[tuple | None]
) -> Plan:
    """The plan of ``function(context, *tensors)`` for tensors that look like ``inputs`` (``Seen``).

    Must be called where the launches will be made, on their device: kernels are compiled and loaded here.
    """
    looks = [None if look is None else Seen._make(look) for look in inputs]
    metas = [
        None
        if look is None
        else torch.empty_strided(look.shape, look.stride, dtype=look.dtype, device="meta")
        for look in looks
    ]
    steps: list[Launch | Call] = []

    def call(function: Callable, *args: Any, **outputs: Tensor) -> None:
        steps.append(Call(function, args, outputs))

    with torch.no_grad():
        results = function(replace(context, execute=steps.append, call=call), *metas)
    memory = _Memory(metas, results, steps)
    alignments = [look.alignment if look else 0 for look in looks]
    lowered: list[Native | Launch | Call | Output] = []
    for index, step in enumerate(steps):
        lowered += memory.outputs[index]
        if isinstance(step, Call):
            lowered.append(Call(step.function, *_mapped(Tensor, memory.view, (step.args, step.outputs))))
        else:
            step = replace(step, args=_mapped(Tensor, memory.view, step.args))
            lowered.append(step if launch.kernels().interpreted else _native(step, alignments))
    return Plan(tuple(lowered), memory.results, memory.workspace)


@dataclass(frozen=True)
class _Pointer:
    """What Triton asks of a tensor to specialise a kernel for it."""

    view: View
    alignment: int  # of the memory that it lies in

    @property
    def dtype(self) -> torch.dtype:
        return self.view.dtype

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

    args = _mapped(View, pointer, step.args)
    warmup = getattr(step.kernel, "warmup", None)
    compiled = warmup and warmup(grid=step.grid, **args, **step.options)
    if not hasattr(compiled, "__getitem__"):
        return step
    named = [step.args[name] for name in step.kernel.arg_names]
    pointers = [(i, arg.memory, arg.offset) for i, arg in enumerate(named) if isinstance(arg, View)]
    views = [any(isinstance(leaf, View) for leaf in tree_leaves(arg)) for arg in named]
    tuples = [(i, arg) for i, arg in enumerate(named) if isinstance(arg, tuple) and views[i]]
    values = tuple(None if isinstance(arg, View) else arg for arg in named)
    return Native(step, compiled[(*step.grid, 1, 1)[:3]], values, tuple(pointers), tuple(tuples))


class _Memory:
    """Where the tensors of a recording lie: in inputs, in the workspace, or in outputs, one of each result.

    Two of the workspace overlap only if the last step of one is before the first step of the other. outputs:
    those that each step is the first to use.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor | None],
        results: Sequence[Tensor | None],
        steps: Sequence[Launch | Call],
    ) -> None:
        self._places = {_storage(t): (i, 0) for i, t in enumerate(inputs) if t is not None}
        made = {_storage(t): t for t in results if t is not None}
        whole = [t.untyped_storage().nbytes() == t.nbytes for t in made.values()]
        if not all(whole) or made.keys() & self._places or len(made) < sum(t is not None for t in results):
            raise ValueError("a plan returns whole tensors of its own: a result is a view or an input")
        self.outputs: list[list[Output]] = [[] for _ in steps]
        count, lives = len(inputs) + 1, {}  # of what lies in the workspace: bytes, first and last step
        for index, step in enumerate(steps):
            for tensor in tree_leaves(step.args if isinstance(step, Launch) else (step.args, step.outputs)):
                if not isinstance(tensor, Tensor) or (key := _storage(tensor)) in self._places:
                    continue
                if key in made:
                    result = made[key]
                    self.outputs[index].append(Output(result.shape, result.stride(), result.dtype))
                    self._places[key] = count, 0
                    count += 1
                else:
                    size = launch.round_up(tensor.untyped_storage().nbytes(), ALIGNMENT)
                    lives.setdefault(key, [size, index, index])[2] = index
        self.results = tuple(None if t is None else self._places[_storage(t)][0] for t in results)
        offsets, self.workspace = _arranged([tuple(life) for life in lives.values()])
        self._places |= {key: (len(inputs), offset) for key, offset in zip(lives, offsets, strict=True)}

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

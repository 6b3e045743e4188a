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
from fastmixer.ops.launch import Launch

MOST_PLANS = 512  # of the process, about 25 KB each: the oldest goes first
ALIGNMENT = 256  # bytes: of whatever lies in the workspace
LARGE = 8 << 20  # bytes: what is larger is allocated by itself, and freed behind its last use


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
    are tuples.
    """

    launch: Launch
    hooks: Sequence[Callable]
    runner: Callable[..., None]
    args: tuple[Any, ...]
    pointers: tuple[tuple[int, int, int], ...]
    tuples: tuple[tuple[int, tuple], ...]


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
        launch.execute(replace(step, args=_mapped(View, lambda view: view.tensor(memories), step.args)))
    else:
        args = [item.tensor(memories) if isinstance(item, View) else item for item in step.args]
        step.function(*args, **{name: view.tensor(memories) for name, view in step.outputs.items()})


def _mapped(kind: type, function: Callable[[Any], object], tree: Any) -> Any:
    """Arguments, which may be in tuples, with ``function`` of every one of that kind."""
    if isinstance(tree, dict):
        return {name: _mapped(kind, function, item) for name, item in tree.items()}
    if isinstance(tree, tuple):
        return tuple([_mapped(kind, function, item) for item in tree])
    return function(tree) if isinstance(tree, kind) else tree


def _found(kind: type, tree: Any) -> list:
    """The arguments of that kind."""
    found: list = []
    _mapped(kind, found.append, tree)
    return found


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
            lowered.append(TorchCall(step.function, *_mapped(Tensor, memory.view, (step.args, step.outputs))))
        else:
            step = replace(step, args=_mapped(Tensor, memory.view, step.args))
            lowered.append(step if launch.kernels().interpreted else _native(step, alignments))
        lowered += memory.behind[index]
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

    hooks = getattr(step.kernel, "pre_run_hooks", ())
    warmup = getattr(step.kernel, "warmup", None)
    if warmup is None or hooks:
        return step
    compiled = warmup(grid=step.grid, **_mapped(View, pointer, step.args), **step.options)
    if not hasattr(compiled, "__getitem__"):
        return step
    named = [step.args[name] for name in step.kernel.arg_names]
    pointers = [(i, arg.memory, arg.offset) for i, arg in enumerate(named) if isinstance(arg, View)]
    tuples = [(i, arg) for i, arg in enumerate(named) if isinstance(arg, tuple) and _found(View, arg)]
    values = tuple(None if isinstance(arg, View) else arg for arg in named)
    return Native(step, hooks, compiled[(*step.grid, 1, 1)[:3]], values, tuple(pointers), tuple(tuples))


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
        self._places = {_storage(t): (i, 0) for i, t in enumerate(inputs) if t is not None}
        made = {_storage(t): t for t in results if t is not None}
        lives: dict[int, list[int]] = {}  # of each memory: bytes, first and last step; in order of their use
        for index, step in enumerate(steps):
            for tensor in _found(Tensor, step.args if isinstance(step, Launch) else tuple(step)):
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

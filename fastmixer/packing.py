"""The cache of packed weights that a fused block carries."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle


class PackedLinear(NamedTuple):
    """A linear layer as the kernels read it.

    weight: (N_PAD, K_PAD) compute dtype, zeros beyond (N, K); bias: (N_PAD,) or None; rank1: (N_PAD,) row
    sums of the folded weight, or None where LayerNorm is not folded in.
    """

    weight: Tensor
    bias: Tensor | None
    rank1: Tensor | None = None


class _Source:
    """Identity of a tensor's contents: the same storage, place and version.

    The weak reference keeps the storage's identity, not its memory, from being reused, so a freed and
    reallocated weight is never mistaken for the old one.
    """

    def __init__(self, tensor: Tensor):
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._place = self._place_of(tensor)

    @staticmethod
    def _place_of(tensor: Tensor) -> tuple:
        return tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device, tensor.shape, tensor.stride()

    def matches(self, tensor: Tensor) -> bool:
        same_storage = self._storage.cdata == tensor.untyped_storage()._cdata
        return same_storage and self._place == self._place_of(tensor)


class _OptimizerSteps:
    """Counts the steps of all optimizers: fused ones (``AdamW(fused=True)``) leave the version as it was."""

    def __init__(self) -> None:
        self._count = 0
        self._lock = threading.Lock()
        self._hook: RemovableHandle | None = None

    def count(self) -> int:
        """The steps since the first call, which starts the counting."""
        if self._hook is None:
            with self._lock:
                self._hook = self._hook or register_optimizer_step_post_hook(self._add)
        return self._count

    def _add(self, *_: object) -> None:
        with self._lock:
            self._count += 1


_STEPS = _OptimizerSteps()


class _Entry(NamedTuple):
    """Packed weights, what they were made of, and when they are ready to be read."""

    settings: tuple
    sources: list[_Source | None]
    packed: PackedLinear
    ready: tuple[torch.cuda.Stream, torch.cuda.Event] | None


class WeightCache:
    """Packed weights of one block, rebuilt when a source tensor is replaced or changes its version.

    Every in-place operation that autograd can see bumps the version (``load_state_dict``, ``copy_`` under
    ``no_grad``), and a step of any ``torch.optim.Optimizer`` counts too. Writing in place through
    ``tensor.data`` or NumPy, or by replaying a CUDA graph, shows nowhere: call ``clear()`` after that. Copies
    and pickles of a cache are empty.
    """

    def __init__(self) -> None:
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()
        self.number = next(_numbers)  # names it in an operator's call: see ``cache_of``
        _caches[self.number] = self

    def get(
        self,
        role: str,
        settings: tuple,
        sources: tuple[Tensor | None, ...],
        build: Callable[[], PackedLinear],
    ) -> PackedLinear:
        """The entry of ``role`` if ``settings`` and ``sources`` are those it was built from, else a new one.

        Inference tensors have no version, so nothing tells when they change: they are packed every time. So
        are weights while a CUDA graph is captured: its replays must pack what the weights are then, and the
        packed memory must be the graph's.
        """
        if any(t is not None and t.is_inference() for t in sources) or _capturing(sources):
            return build()
        settings = (*settings, _STEPS.count())
        with self._lock:
            entry = self._entries.get(role)
        if entry is not None and entry.settings == settings and _all_match(entry.sources, sources):
            _await(entry)
            return entry.packed
        # Before build: what changes meanwhile counts as new.
        known = [None if t is None else _Source(t) for t in sources]
        packed = build()
        with self._lock:
            self._entries[role] = _Entry(settings, known, packed, _mark(packed))
        return packed

    def clear(self) -> None:
        """Drops all entries: the next call packs anew."""
        with self._lock:
            self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def __deepcopy__(self, memo: dict) -> WeightCache:
        return WeightCache()

    def __reduce__(self) -> tuple:
        return WeightCache, ()


# Operators take numbers, not objects.
_numbers = itertools.count(1)
_caches: weakref.WeakValueDictionary[int, WeightCache] = weakref.WeakValueDictionary()


def cache_of(number: int) -> WeightCache | None:
    """The living cache with that number, if there is one; 0 is none's.

    In compiled code that another process left on disk a number may be another block's by now. That costs
    packing, not correctness: a cache compares what its entries were made of.
    """
    return _caches.get(number)


def _capturing(sources: tuple[Tensor | None, ...]) -> bool:
    """Whether what is launched now is recorded into a CUDA graph."""
    on_gpu = any(t is not None and t.is_cuda for t in sources)
    return on_gpu and torch.cuda.is_current_stream_capturing()


def _mark(packed: PackedLinear) -> tuple[torch.cuda.Stream, torch.cuda.Event] | None:
    """The stream that packs, and an event after it; None on a CPU."""
    if not packed.weight.is_cuda:
        return None
    stream = torch.cuda.current_stream(packed.weight.device)
    return stream, stream.record_event()


def _await(entry: _Entry) -> None:
    """Orders the current stream after the packing, if another stream packed."""
    if entry.ready is None:
        return
    stream, event = entry.ready
    current = torch.cuda.current_stream(entry.packed.weight.device)
    if current != stream:
        current.wait_event(event)
        for tensor in entry.packed:
            if tensor is not None:
                tensor.record_stream(current)


def _all_match(known: list[_Source | None], tensors: tuple[Tensor | None, ...]) -> bool:
    return all(
        t is None if s is None else t is not None and s.matches(t)
        for s, t in zip(known, tensors, strict=True)
    )

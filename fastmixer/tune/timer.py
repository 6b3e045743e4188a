"""How the tuner times: two contenders in alternation, between CUDA events, in graphs or as a caller would."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastmixer.configs import Target, cdiv, device_data

Call = Callable[[], object]


@dataclass(frozen=True)
class CudaTimer:
    """Milliseconds a call, one figure a burst of calls; contenders take turns, in another order each round.

    A burst lasts about ``burst_ms`` and goes through all of a contender's calls, which differ in their
    inputs: what one left in L2 is gone when its turn comes again. With graphs a burst is one CUDA graph,
    which has the GPU's own time; without, calls are enqueued without waiting, and take the GPU's time or the
    host's to launch them, whichever is longer: what a caller sees in a steady loop.
    """

    rounds: int = 20
    burst_ms: float = 0.5

    def __call__(self, contenders: Sequence[Sequence[Call]], *, graphs: bool) -> list[list[float]]:
        """The times of each contender's calls."""
        bursts = []
        for calls in contenders:
            for call in calls:  # compiles, loads and packs
                call()
            count = self._length(calls)
            bursts.append((_graphed(calls, count) if graphs else _loop(calls, count), count))
        times: list[list[float]] = [[] for _ in bursts]
        order = list(range(len(bursts)))
        for turn in range(self.rounds + 1):
            for index in order if turn % 2 else reversed(order):
                burst, count = bursts[index]
                milliseconds = _elapsed(burst) / count
                if turn:  # the first round warms up
                    times[index].append(milliseconds)
        return times

    def _length(self, calls: Sequence[Call]) -> int:
        """How many calls make a burst: at least each of them once."""
        one_round = _elapsed(_loop(calls, len(calls)))
        rounds = max(1, min(100, round(self.burst_ms / max(one_round, 1e-3))))
        return rounds * len(calls)


def _elapsed(burst: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    burst()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _loop(calls: Sequence[Call], count: int) -> Call:
    def burst() -> None:
        for call in itertools.islice(itertools.cycle(calls), count):
            call()

    return burst


def _graphed(calls: Sequence[Call], count: int) -> Call:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _loop(calls, count)()
    return graph.replay


def cold_copies(bytes_each: int, device: torch.device, target: Target, most: int = 128) -> int:
    """How many inputs to rotate through so that none is cached when its turn comes again; 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    if known := device_data(target):  # MI300X reports 4 MB of L2 and has 256 MB of Infinity Cache behind it
        cache = max(cache, known.l2)
    return min(most, max(2, cdiv(2 * cache, max(bytes_each, 1))))

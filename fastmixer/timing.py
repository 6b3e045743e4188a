"""How calls are timed on a GPU: by CUDA events, in turn, on inputs that are not in L2; and statistics.

``benchmarks`` rests on it, and the tuner and ``verify`` can. Nothing here knows what is timed: a call takes
no argument. L2 is not flushed: who times goes through so many inputs that none is cached when its turn comes
again, which ``cold_copies`` counts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch

Call = Callable[[], Any]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Stats:
    """Median and quantiles of the milliseconds of so many calls."""

    median: float
    p20: float
    p80: float
    calls: int

    def within(self, spread: float) -> bool:
        """Whether p20 and p80 are no further apart than this share of the median."""
        return self.p80 - self.p20 <= spread * self.median


def summarise(milliseconds: Sequence[float]) -> Stats:
    """The statistics of at least one time; ValueError without any. Quantiles are interpolated linearly."""
    if not milliseconds:
        raise ValueError("milliseconds must hold at least one time, got none")
    p20, median, p80 = np.quantile(milliseconds, (0.2, 0.5, 0.8)).tolist()
    return Stats(median, p20, p80, len(milliseconds))


def event_times(calls: Sequence[Call], untimed: int = 0) -> list[float]:
    """Milliseconds of each call between two CUDA events; the first ``untimed`` ones only warm up.

    Calls are enqueued without waiting, so one takes the GPU's time or the host's to launch it, whichever is
    longer: what a caller sees in a steady loop.
    """
    for call in calls[:untimed]:
        call()
    timed = calls[untimed:]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in timed]
    for (start, end), call in zip(events, timed, strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def wall_times(calls: Sequence[Call], untimed: int = 0) -> list[float]:
    """As ``event_times``, by the clock on the wall: of calls that return when their work is done."""
    for call in calls[:untimed]:
        call()
    times = []
    for call in calls[untimed:]:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def alternate(
    bursts: Mapping[Name, Callable[[], list[float]]],
    *,
    rounds: int,
    min_rounds: int | None = None,
    spread: float = 0.0,
    seconds: float = math.inf,
) -> dict[Name, list[float]]:
    """The times that bursts return, taken in turn, in another order each round: a drift of clocks meets all.

    Args:
        bursts: each makes some calls and returns their milliseconds.
        rounds: how many at most.
        min_rounds: how many at least; by default all. Beyond them rounds go on until every burst's
            (p80 - p20) / median is at most ``spread``.
        seconds: no burst begins after them, but for those of the first round.
    """
    times: dict[Name, list[float]] = {name: [] for name in bursts}
    names, end = list(bursts), time.monotonic() + seconds
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if turn and time.monotonic() > end:
                return times
            times[name] += bursts[name]()
        enough = turn + 1 >= (rounds if min_rounds is None else min_rounds)
        if enough and all(summarise(values).within(spread) for values in times.values()):
            break
    return times


def capture(calls: Iterable[Call]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """One CUDA graph of all calls, and what the last of them returned, which a replay overwrites.

    The calls must have been made before: what compiles or allocates for good cannot be captured.
    """
    graph, answer = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph):
        for call in calls:
            answer = call()
    return graph, answer


def cold_copies(bytes_each: int, device: torch.device, cache: int = 0) -> int:
    """How many inputs to rotate through so that none is cached when its turn comes again; 1 on a CPU.

    Twice the L2's size together; weights, which all calls share, may stay in it. ``cache``: bytes of the last
    cache where that is known to be more than the device reports as its L2.
    """
    if device.type != "cuda":
        return 1
    cache = max(cache, torch.cuda.get_device_properties(device).L2_cache_size)
    return max(2, math.ceil(2 * cache / max(bytes_each, 1)))

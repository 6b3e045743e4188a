"""How the tuner times: two contenders in alternation, between CUDA events, in graphs or as a caller would."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fastmixer import timing
from fastmixer.configs import Target, device_data
from fastmixer.timing import Call


@dataclass(frozen=True)
class CudaTimer:
    """Milliseconds per call, one figure per burst; contenders take turns, in another order each round.

    A burst lasts about ``burst_ms`` and goes through all of a contender's calls, which differ in their
    inputs: what one left in L2 is gone when its turn comes again. With graphs a burst is one CUDA graph,
    which has the GPU's own time; without, calls are enqueued without waiting, and take the GPU's time or the
    host's to launch them, whichever is longer: what a caller sees in a steady loop.
    """

    rounds: int = 20
    burst_ms: float = 0.5

    def __call__(self, contenders: Sequence[Sequence[Call]], *, graphs: bool) -> list[list[float]]:
        """The times of each contender's calls."""
        bursts = {}
        for index, calls in enumerate(contenders):
            for call in calls:  # compiles, loads and packs
                call()
            count = self._length(calls)
            repeated = list(itertools.islice(itertools.cycle(calls), count))
            run = timing.capture(repeated)[0].replay if graphs else lambda repeated=repeated: _run(repeated)
            bursts[index] = lambda run=run, count=count: [_elapsed(run) / count]
        times = timing.alternate(bursts, rounds=self.rounds + 1)
        return [milliseconds[1:] for milliseconds in times.values()]  # the first round warms up

    def _length(self, calls: Sequence[Call]) -> int:
        """How many calls make a burst: at least each of them once."""
        one_round = _elapsed(lambda: _run(calls))
        return max(1, min(100, round(self.burst_ms / max(one_round, 1e-3)))) * len(calls)


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _elapsed(burst: Call) -> float:
    """Milliseconds of a burst on a device that has nothing else to do."""
    torch.cuda.synchronize()
    return timing.event_times([burst])[0]


def cold_copies(bytes_each: int, device: torch.device, target: Target, most: int = 128) -> int:
    """``timing.cold_copies``, at most ``most``."""
    known = device_data(target)  # MI300X reports 4 MB of L2 and has 256 MB of Infinity Cache behind it
    return min(most, timing.cold_copies(bytes_each, device, known.l2 if known else 0))

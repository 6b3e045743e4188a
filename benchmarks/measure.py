"""How things are timed, weighed and counted: the timers, CUDA graphs, memory, launches, ceilings.

Nothing here knows what is timed. A timer is any callable ``(calls, items) -> milliseconds``, so that tests
can pass a stub where there is no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastmixer import timing

from . import files

Item = Any  # what a call is given: a tensor, a pair (x, gradient of the output), a recorded launch
Call = Callable[[Item], Any]
# Calls by name, and items to rotate through -> milliseconds of every call, by name.
Timer = Callable[[dict[str, Call], Sequence[Item]], dict[str, list[float]]]

CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
GRAPH_CALLS = 512  # in one CUDA graph at most
GRAPH_MS = 20.0  # of longer calls there is no graph: what a launch costs does not show in them
SLOW_MS = 100.0  # longer calls are timed one at a time, so that one case does not take hours


# ---- timers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocking:
    """A call that returns when its work is done, wherever that ran: timed by the clock on the wall."""

    call: Call

    def __call__(self, item: Item) -> Any:
        return self.call(item)


@dataclass(frozen=True)
class CudaTimer:
    """Times opponents in turn by CUDA events, in bursts, by the rules of ``timing.alternate``.

    A call before every burst is not timed: the first after a wait takes the host's launch too. Calls longer
    than ``SLOW_MS`` have two warm-ups and bursts of one, without that call.
    """

    min_rounds: int = 5
    max_rounds: int = 60
    burst: int = 5
    warm_up: int = 3
    spread: float = 0.02
    seconds: float = 10.0

    def __call__(self, calls: dict[str, Call], items: Sequence[Item]) -> dict[str, list[float]]:
        """Milliseconds of every timed call. Each call gets the next of the items, cyclically."""
        order = itertools.cycle(items)
        slow = {name for name, call in calls.items() if self._warm_up(call, order)}

        def burst(name: str) -> list[float]:
            if name in slow:
                return self._times(calls[name], order, 1)
            return self._times(calls[name], order, 1 + self.burst, untimed=1)

        return timing.alternate(
            {name: partial(burst, name) for name in calls},
            rounds=self.max_rounds,
            min_rounds=self.min_rounds,
            spread=self.spread,
            seconds=self.seconds,
        )

    def _warm_up(self, call: Call, order: Iterator[Item]) -> bool:
        """Calls as often as asked, a slow call twice at most; whether it is slow."""
        slow = False
        for index in range(self.warm_up):
            slow = self._times(call, order, 1)[0] > SLOW_MS
            if slow and index:  # the first may be so because torch.compile records its CUDA graph in it
                break
        return slow

    def _times(self, call: Call, order: Iterator[Item], count: int, untimed: int = 0) -> list[float]:
        times = timing.wall_times if isinstance(call, Blocking) else self._clock
        return times([partial(call, next(order)) for _ in range(count)], untimed)

    _clock = staticmethod(timing.event_times)


class CpuTimer(CudaTimer):
    """The same by the clock on the wall."""

    _clock = staticmethod(timing.wall_times)


# ---- CUDA graphs -----------------------------------------------------------------------------------------


class Replay:
    """A CUDA graph of ``call`` on each of the items, which a replay reads where they lie: no copies.

    One replay is ``calls`` calls, on other inputs each, and no launch of it costs the host anything.
    """

    def __init__(self, call: Call, items: Sequence[Item]) -> None:
        items = items[:GRAPH_CALLS]
        self.calls, self._last = len(items), items[-1]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call(self._last)
        torch.cuda.current_stream().wait_stream(side)
        self._graph, self._answer = timing.capture(partial(call, item) for item in items)

    def __call__(self, _: Item = None) -> None:
        self._graph.replay()

    def answer(self, item: Item) -> Any:
        """What the last call of a replay gives for ``item``, whose values overwrite those it has had."""
        for own, given in zip(as_tuple(self._last), as_tuple(item), strict=True):
            own.copy_(given)
        self()
        return self._answer


def as_tuple(item: Item) -> tuple:
    return item if isinstance(item, tuple) else (item,)


def graph_times(replays: dict[str, Replay], timer: Timer) -> dict[str, list[float]]:
    """Milliseconds of one call, of every replay."""
    times = timer(dict(replays), [None]) if replays else {}
    return {name: [value / replays[name].calls for value in values] for name, values in times.items()}


# ---- memory, launches, ceilings --------------------------------------------------------------------------


def peak_bytes(call: Call, item: Item, device: torch.device) -> int | None:
    """What one call allocates at its peak, beyond what is allocated before it; None on a CPU.

    After a warm-up, so that libraries' workspaces and the like count as there before.
    """
    if device.type != "cuda":
        return None
    for _ in range(2):
        call(item)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call(item)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(device) - before


def launches(call: Call, item: Item, device: torch.device) -> int | None:
    """How many kernels one call launches, as the profiler sees it; None on a CPU."""
    if device.type != "cuda":
        return None
    call(item)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call(item)
        torch.cuda.synchronize()
    on_device = [e.name for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_device)


def ceilings(device: torch.device, dtypes: dict[str, torch.dtype]) -> dict[str, Any] | None:
    """What this GPU reaches at best: GB/s of a large copy (read + write), TFLOP/s of an 8192^3 product.

    The yardstick for "share of the roofline": measured here and now, unlike a data sheet's figure. None on a
    CPU.

    Args:
        dtypes: the products' dtype, by the name that the result gets.
    """
    if device.type != "cuda":
        return None
    source = torch.randn(2**30 // 4, device=device)
    target = torch.empty_like(source)
    timer = CudaTimer(min_rounds=3, max_rounds=8, burst=4, seconds=3.0)

    def median(call: Call) -> float:
        return timing.summarise(timer({"ceiling": call}, [None])["ceiling"]).median

    reached: dict[str, Any] = {
        "copy_gb_per_s": 2 * source.nbytes / median(lambda _: target.copy_(source)) / 1e6
    }
    for name, dtype in dtypes.items():
        a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
        reached[name] = {"product_tflop_per_s": 2 * 8192**3 / median(lambda _, a=a, b=b: a @ b) / 1e9}
    return reached


def clocks(device: torch.device) -> dict[str, str] | None:
    """The GPU's clocks, temperature and power draw at this moment; None on a CPU."""
    return files.nvidia_smi(device, *CLOCK_FIELDS)

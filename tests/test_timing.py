"""What times calls, for whoever does: rounds, warm-ups, graphs, cold inputs. Fake events; no GPU."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastmixer import timing


def bursts(order: list[str]) -> dict:
    """Two of two milliseconds each, that note their turn."""
    return {name: lambda name=name: order.append(name) or [1.0, 1.0] for name in "ab"}


def test_bursts_take_turns_for_as_many_rounds_as_asked() -> None:
    order: list[str] = []
    assert timing.alternate(bursts(order), rounds=3) == {"a": [1.0] * 6, "b": [1.0] * 6}
    assert "".join(order) == "ab" + "ba" + "ab"


def test_rounds_end_early_only_where_a_minimum_is_named() -> None:
    assert len(timing.alternate(bursts([]), rounds=9, min_rounds=2)["a"]) == 4
    assert len(timing.alternate(bursts([]), rounds=9, seconds=0.0)["a"]) == 2


@pytest.mark.parametrize("times", [timing.wall_times, timing.event_times])
def test_the_first_calls_warm_up(times, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, made, enqueued = [0.0], [], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]
            enqueued.append(self)

        def elapsed_time(self, end: Event) -> float:
            assert not enqueued, "the GPU is not done"
            return end.at - self.at

    def call() -> None:
        made.append(clock[0])
        clock[0] += 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", enqueued.clear)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0] / 1e3)
    assert times([call] * 5, untimed=2) == pytest.approx([2.0] * 3)
    assert len(made) == 5


def test_a_graph_has_every_call_and_the_last_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    @contextlib.contextmanager
    def graph(into: object):
        captured.append(into)
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    made, answer = timing.capture(lambda i=i: i for i in range(3))
    assert captured == [made] and answer == 2


def test_a_cache_that_is_known_to_be_larger_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    of_gpu, device = SimpleNamespace(L2_cache_size=1000), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_gpu)
    assert timing.cold_copies(100, device) == timing.cold_copies(100, device, cache=10) == 20
    assert timing.cold_copies(100, device, cache=2000) == 40

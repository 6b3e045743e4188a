"""How the benchmark times and weighs: no GPU, fake CUDA events and graphs."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmark_stubs import HEADER, TINY, bench

import fastmixer
from benchmarks import cells, levels, measure, opponents, runs, schema
from fastmixer import timing

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_statistics():
    assert timing.summarise([3.0, 1.0, 2.0]) == timing.Stats(2.0, pytest.approx(1.4), pytest.approx(2.6), 3)
    # One slow call in five moves neither the median nor p20.
    skewed = timing.summarise([2.0, 1.0, 3.0, 100.0, 4.0])
    assert skewed == timing.Stats(3.0, pytest.approx(1.8), pytest.approx(23.2), 5)
    assert timing.summarise([5.0]) == timing.Stats(5.0, 5.0, 5.0, 1)
    assert timing.summarise([1.0, 2.0, 3.0]).within(0.61)
    assert not timing.summarise([1.0, 2.0, 3.0]).within(0.59)
    with pytest.raises(ValueError, match="milliseconds"):
        timing.summarise([])


# ---- timers ----------------------------------------------------------------------------------------------


@pytest.fixture
def fake_events(monkeypatch):
    """CUDA events without CUDA: a clock that the calls move, in milliseconds."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return clock


def test_opponents_take_turns_in_bursts_and_inputs_rotate(fake_events):
    calls, items_seen = [], []

    def opponent(name, cost):
        def call(item):
            fake_events[0] += cost
            calls.append(name)
            items_seen.append(item)

        return call

    timer = measure.CudaTimer(min_rounds=2, max_rounds=9, burst=3, warm_up=1)
    times = timer({"a": opponent("a", 1.0), "b": opponent("b", 2.5)}, range(5))
    assert times == {"a": [1.0] * 6, "b": [2.5] * 6}
    assert "".join(calls) == "ab" + "aaaabbbb" + "bbbbaaaa", "one of each burst is not timed"
    assert items_seen == [i % 5 for i in range(18)]


def test_the_first_call_after_a_wait_is_not_timed(fake_events, monkeypatch):
    idle = [True]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: idle.__setitem__(0, True))

    def call(item):
        fake_events[0] += 7.0 if idle[0] else 1.0
        idle[0] = False

    times = measure.CudaTimer(min_rounds=2, max_rounds=2, burst=5)({"a": call}, [None])["a"]
    assert times == [1.0] * 10


def test_long_calls_cannot_take_hours(fake_events, monkeypatch):
    """Two opponents that take 30 s a call: two warm-ups and a burst of one each, and the time is up."""
    monkeypatch.setattr(timing.time, "monotonic", lambda: fake_events[0] / 1e3)
    made = []

    def opponent(name):
        def call(item):
            fake_events[0] += 30_000.0
            made.append(name)

        return call

    times = measure.CudaTimer()({"a": opponent("a"), "b": opponent("b")}, [None])
    assert "".join(made) == "aabb" + "ab" and times == {"a": [30_000.0], "b": [30_000.0]}


def test_a_call_that_is_slow_only_at_first_is_timed_in_bursts(fake_events):
    costs = iter([500.0])

    def call(item):
        fake_events[0] += next(costs, 1.0)

    times = measure.CudaTimer(min_rounds=1, max_rounds=1, burst=5)({"a": call}, [None])["a"]
    assert times == [1.0] * 5


def test_the_clock_is_looked_at_after_every_burst(fake_events, monkeypatch):
    monkeypatch.setattr(timing.time, "monotonic", lambda: fake_events[0] / 1e3)

    def call(item):
        fake_events[0] += 90.0

    timer = measure.CudaTimer(burst=5, warm_up=1, seconds=2.0)  # a burst takes 0.54 s
    times = timer({name: call for name in "abc"}, [None])
    assert [len(times[name]) for name in "abc"] == [5, 10, 5]


def test_rounds_go_on_until_the_spread_is_small_or_the_cap_is_reached(fake_events):
    def wavering(costs):
        costs = iter(costs)

        def call(item):
            fake_events[0] += next(costs, 1.0)

        return call

    timer = measure.CudaTimer(min_rounds=2, max_rounds=50, burst=1, warm_up=0, spread=0.02)
    times = timer({"a": wavering([1.0, 9.0])}, [None])["a"]  # every other call is timed
    assert timing.summarise(times).within(0.02) and not timing.summarise(times[:-1]).within(0.02)
    assert len(timer({"a": wavering([1.0, 1.0, 1.0, 2.0] * 100)}, [None])["a"]) == 50
    assert len(measure.CudaTimer(burst=2, warm_up=0, seconds=0.0)({"a": wavering([])}, [None])["a"]) == 2


def test_on_a_cpu_and_for_calls_that_block_the_wall_decides(fake_events, monkeypatch):
    clock = [0.0]

    def call(item):
        clock[0] += 0.002

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    timer = measure.CpuTimer(min_rounds=1, burst=2, warm_up=0)
    assert timer({"a": call}, [None])["a"] == pytest.approx([2.0, 2.0])
    timer = measure.CudaTimer(min_rounds=1, burst=2, warm_up=0, seconds=0.0)
    found = timer({"a": call, "b": measure.Blocking(call)}, [None])
    assert found["a"] == [0.0, 0.0]  # no event saw it
    assert found["b"] == pytest.approx([2.0, 2.0])


# ---- CUDA graphs, memory, launches -----------------------------------------------------------------------


class FakeGraph:
    """Remembers the calls of its capture, and makes them again."""

    capturing = None

    def replay(self):
        for call in self.calls:
            call()


@pytest.fixture
def fake_graphs(monkeypatch):
    @contextlib.contextmanager
    def graph(into):
        into.calls = FakeGraph.capturing = []
        yield
        FakeGraph.capturing = None

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)


def doubling(seen):
    def call(x):
        out = torch.empty_like(x)

        def work():
            seen.append(float(x[0]))
            out.copy_(2 * x)

        (FakeGraph.capturing.append if FakeGraph.capturing is not None else lambda f: f())(work)
        return out

    return call


def test_a_replay_makes_one_call_on_every_input_and_answers_for_a_fresh_one(fake_graphs, monkeypatch):
    seen = []
    replay = measure.Replay(doubling(seen), [torch.full((1,), float(i)) for i in range(3)])
    assert seen == [2.0] * 3, "warmed up on the last"
    seen.clear()
    replay()
    assert replay.calls == 3 and seen == [0.0, 1.0, 2.0]
    assert replay.answer(torch.tensor([7.0])).tolist() == [14.0]
    times = measure.graph_times({"a": replay}, lambda calls, items: {name: [6.0, 3.0] for name in calls})
    assert times == {"a": [2.0, 1.0]}
    assert measure.graph_times({}, None) == {}
    monkeypatch.setattr(measure, "GRAPH_CALLS", 2)
    assert measure.Replay(doubling([]), [torch.zeros(1)] * 3).calls == 2


def test_the_peak_is_that_of_one_warm_call_beyond_what_was_there(monkeypatch):
    state = {"allocated": 100, "peak": 0, "calls": 0}

    def call(item):
        state["calls"] += 1
        if state["calls"] == 1:
            state["allocated"] += 50  # a workspace, for good
        state["peak"] = max(state["peak"], state["allocated"] + 1000 * (2 if state["calls"] == 1 else 1))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(peak=0))
    assert measure.peak_bytes(call, None, CUDA) == 1000
    assert measure.peak_bytes(call, None, CPU) is None


def test_launches_are_kernels_and_neither_copies_nor_fills(monkeypatch):
    from torch.autograd import DeviceType

    class Profiler:
        def __init__(self, activities):
            self.names = ["fc1", "Memcpy DtoD", "Memset (Device)", "fc2"]

        def __enter__(self):
            return self

        def __exit__(self, *args):
            return None

        def events(self):
            of_host = SimpleNamespace(name="aten::mm", device_type=DeviceType.CPU)
            return [of_host] + [SimpleNamespace(name=n, device_type=DeviceType.CUDA) for n in self.names]

    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert measure.launches(lambda item: None, None, CUDA) == 2
    assert measure.launches(lambda item: None, None, CPU) is None


def test_enough_inputs_for_twice_the_l2_cache(monkeypatch):
    of_gpu = SimpleNamespace(L2_cache_size=50_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: of_gpu)
    assert timing.cold_copies(1000, CUDA) == 100
    assert timing.cold_copies(30_000, CUDA) == 4
    assert timing.cold_copies(10**6, CUDA) == 2
    assert timing.cold_copies(1000, CPU) == 1


def test_ceilings_count_what_a_copy_reads_and_writes_and_a_products_flops(monkeypatch):
    """The median decides: one call in five is slow."""
    randn = torch.randn

    class Timer:
        def __init__(self, **options):
            pass

        def __call__(self, calls, items):
            ((name, call),) = calls.items()
            answers.append(call(items[0]))
            return {name: [2.0, 2.0, 2.0, 1.0, 50.0]}

    answers = []
    monkeypatch.setattr(
        torch, "randn", lambda *shape, **options: randn(*shape, **options | {"device": "meta"})
    )
    monkeypatch.setattr(measure, "CudaTimer", Timer)
    found = measure.ceilings(CUDA, {"autocast": torch.bfloat16})
    copied, product = answers
    assert found == {
        "copy_gb_per_s": 2 * copied.nbytes / 2.0 / 1e6,
        "autocast": {"product_tflop_per_s": 2 * 8192**3 / 2.0 / 1e9},
    }
    assert (copied.nbytes, product.shape, product.dtype) == (2**30, (8192, 8192), torch.bfloat16)


def test_nothing_is_asked_of_a_gpu_on_a_cpu():
    assert measure.ceilings(CPU, {"float32": torch.float32}) is None
    assert measure.clocks(CPU) is None


def test_on_a_gpu_a_cell_has_graphs_memory_launches_and_clocks(monkeypatch):
    """The plumbing, with a fake of everything that needs the GPU: tensors are on the CPU."""
    monkeypatch.setattr(measure, "clocks", lambda device: {"clocks.sm": "1000"})
    monkeypatch.setattr(measure, "peak_bytes", lambda call, item, device: 10)
    monkeypatch.setattr(measure, "launches", lambda call, item, device: 4)

    class Graph:
        calls = 2

        def __init__(self, call, items):
            self.call = call

        def answer(self, item):
            return self.call(item)

        def __call__(self, item):
            pass

    monkeypatch.setattr(measure, "Replay", Graph)
    on_gpu = replace(bench(), device=CUDA)
    with torch.no_grad(), fastmixer.backend("triton"):
        subject = levels.make_subject(TINY, CPU)
        calls = {name: levels.make_call(subject.fused, TINY) for name in ("fused", "eager")}
        racers = {name: cells.Racer(call, call, opponents.SAME_COUNTS) for name, call in calls.items()}
        cell = cells.empty_cell(TINY, CUDA)
        cells._time(cell, racers, subject, on_gpu)
    schema.validate({**runs.new_report(HEADER), "cells": [cell]})
    assert cell["errors"] == {}
    assert cell["parity"]["fused_graph"]["ok"] is True
    assert cell["clocks"] == {"before": {"clocks.sm": "1000"}, "after": {"clocks.sm": "1000"}}
    fused, eager = cell["opponents"]["fused"], cell["opponents"]["eager"]
    assert (fused["graph_ms"]["median"], eager["graph_ms"]["median"]) == (0.5, 2.0)
    assert (fused["peak_bytes"], fused["launches"]) == (10, 4)
    assert fused["gb_per_s"] == cell["bytes"] / 0.5 / 1e6, "rates are of graphs where there are any"
    assert cell["ratio_to_best"] == 4.0

    # What a launch costs does not show in a call of over 20 ms.
    monkeypatch.setattr(measure, "GRAPH_MS", 3.0)
    with torch.no_grad(), fastmixer.backend("triton"):
        cells._time(cell, racers, subject, on_gpu)
    assert cell["opponents"]["eager"]["graph_ms"] is None
    assert cell["opponents"]["fused"]["graph_ms"]["median"] == 0.5

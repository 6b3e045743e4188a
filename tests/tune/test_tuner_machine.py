"""The tuner's launches and gate in the interpreter; its timer and compiler with the GPU replaced."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tuner_stubs
from tuner_stubs import JOBS, SLUG, TARGET, Silent, done

from fastmixer.aot import compile
from fastmixer.configs import DEVICES, INTERPRETER, TARGETS, Library, Problem, TileConfig
from fastmixer.configs.tables import Entry
from fastmixer.ops import launch
from fastmixer.tune import command, machine, trial
from fastmixer.tune.command import DeviceLost, tune
from fastmixer.tune.jobs import Job, describe
from fastmixer.tune.machine import Compiler, MachineTools, cold_copies, time_in_turn
from fastmixer.tune.trial import Rejected


@pytest.fixture(autouse=True)
def table_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No shipped table, and a user's folder of its own; the user's file."""
    with tuner_stubs.own_tables(tmp_path, monkeypatch) as path:
        yield path


# ---- with the real launchers and the real gate, in the interpreter ----------------------------------------

TINY = Problem(2, 18, 32, 64, torch.float16, torch.float16)
SMALL, LARGE = TileConfig(16, 16, 16), TileConfig(32, 32, 16)


def known_timer(contenders, *, graphs):
    """Runs every call once; what comes first takes 1 ms and what comes second 2 ms."""
    for calls in contenders:
        for call in calls:
            call()
    return [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> MachineTools:
    """Those of the interpreter; the candidates are SMALL and LARGE."""
    monkeypatch.setattr(machine, "candidates", lambda *_: [SMALL, LARGE])
    target = replace(INTERPRETER, name=SLUG)
    monkeypatch.setattr(machine, "time_in_turn", known_timer)
    return MachineTools(target, torch.device("cpu"), lambda *_: done(None))


def test_the_real_gate_judges_real_launches(tools: MachineTools) -> None:
    todo = [Job("channel_fc1", TINY), Job("channel_half", TINY)]
    report = Silent()
    summary = tune(todo, tools, report)
    assert summary.ok and report.lines == [], "all candidates pass the gate"
    assert [entry.op for entry in summary.recorded] == ["channel_fc1", "channel_half"]
    product, half = summary.recorded
    assert product.choice is Library.ATEN and half.choice is Library.REFERENCE, "who comes first takes 1 ms"
    assert 0 < product.parity < 1.25 and half.parity == 1.0
    assert product.timed == half.timed == "half" and (half.ms, half.default_ms) == (1.0, 2.0)


@pytest.mark.parametrize("op", ["token_mixing", "channel_mlp_hidden_bwd", "token_dgrad"])
def test_the_real_gate_has_every_family_of_ops(op: str, tools: MachineTools, monkeypatch) -> None:
    problem = TINY._replace(hidden=24) if op.startswith("token") else TINY
    monkeypatch.setattr(machine, "candidates", lambda *_: [TileConfig(16, 32, 16)])
    report = Silent()
    summary = tune([Job(op, problem)], tools, report)
    assert summary.ok and report.lines == []
    assert summary.recorded[0].choice == TileConfig(16, 32, 16) and summary.recorded[0].timed == "kernel"


def test_a_candidate_that_leaves_elements_unwritten_fails_the_real_gate(tools, monkeypatch) -> None:
    execute, raced, report = launch.execute, [], Silent()

    def skipping(item: launch.Launch) -> None:
        if item.args.get("BLOCK_N") != SMALL.block_n:
            execute(item)

    monkeypatch.setattr(launch, "execute", skipping)
    race = tools.race
    tools.race = lambda job, choice, against: raced.append(choice) or race(job, choice, against)
    summary = tune([Job("channel_fc2", TINY)], tools, report)
    assert summary.ok and SMALL not in raced and LARGE in raced
    assert f"channel_fc2 batch 2 float16: {describe(SMALL)}: fails parity" in report.lines[0]
    assert "NaN or inf" in report.lines[0]


def test_a_right_answer_that_an_earlier_choice_left_in_memory_does_not_pass(tools, monkeypatch) -> None:
    execute, empty, memory = launch.execute, torch.empty, {}

    def skipping(item: launch.Launch) -> None:
        if item.args.get("BLOCK_N") != SMALL.block_n:
            execute(item)

    def reused(*shape: object, **options: object) -> torch.Tensor:
        fresh = empty(*shape, **options)
        return memory.setdefault("output", fresh) if fresh.shape == TINY[:3] else fresh

    monkeypatch.setattr(launch, "execute", skipping)
    job = Job("channel_fc2", TINY)
    assert tools._trial_of(job).device.type == "cpu", "its inputs are not in the memory that is reused"
    monkeypatch.setattr(torch, "empty", reused)
    assert tools.check(job, LARGE) < 1.25
    with pytest.raises(Rejected, match="NaN or inf"):
        tools.check(job, SMALL)


def test_a_race_is_of_the_jobs_own_trial_the_candidate_first(tools: MachineTools, monkeypatch) -> None:
    monkeypatch.setattr(machine, "time_in_turn", lambda contenders, *, graphs: contenders)
    monkeypatch.setattr(trial.Trial, "calls", lambda self, choice, timed: (self.op, self.problem, choice))
    for op, problem in (
        ("channel_fc1", TINY),
        ("channel_fc1", TINY._replace(batch=1)),
        ("channel_fc2", TINY),
    ):
        raced = tools.race(Job(op, problem), LARGE, SMALL)
        assert raced == [(op, problem, LARGE), (op, problem, SMALL)]


def test_what_the_passes_beside_a_library_write_is_poisoned_unless_it_is_their_input() -> None:
    def poisoned(kernel: str, written: str, **tensors: torch.Tensor) -> bool:
        trial.poison(launch.Launch(getattr(launch.kernels(), kernel), (1,), tensors, {}))
        assert not any(tensor.isnan().any() for name, tensor in tensors.items() if name != written)
        return bool(tensors[written].isnan().all())

    one, other, x = (torch.zeros(4, 4) for _ in range(3))
    assert poisoned("gelu_fwd", "hidden_ptr", p_ptr=one, hidden_ptr=other)
    assert poisoned("residual_fwd", "y_ptr", x_ptr=x, o_ptr=one, y_ptr=torch.zeros(4, 4))
    assert not poisoned("gelu_fwd", "hidden_ptr", p_ptr=one, hidden_ptr=one)
    assert not poisoned("residual_fwd", "y_ptr", x_ptr=x, o_ptr=one, y_ptr=one)


def test_a_library_whose_pass_is_skipped_fails_the_real_gate(tools: MachineTools, monkeypatch) -> None:
    execute = launch.execute

    def skipping(item: launch.Launch) -> None:
        if item.kernel is not launch.kernels().residual_fwd:
            execute(item)

    monkeypatch.setattr(launch, "execute", skipping)
    with pytest.raises(Rejected, match="fails parity.*NaN or inf"):
        tools.check(Job("channel_fc2", TINY._replace(x_dtype=torch.float32)), Library.ATEN)


# ---- timing, and a GPU that is lost ------------------------------------------------------------------------


class FakeGpu:
    """CUDA's events and graphs over a clock that calls advance; a replay takes ``shorter`` as long."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, shorter: float = 0.5) -> None:
        self.now, self.log, self.shorter, self.recording = 0.0, [], shorter, None
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def elapsed_time(self, end) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                for name, milliseconds in self.calls:
                    gpu.now += milliseconds * gpu.shorter
                    gpu.log.append(name)

        @contextlib.contextmanager
        def capture(graph):
            gpu.recording = graph.calls = []
            yield
            gpu.recording = None

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def call(self, name: str, milliseconds: float):
        def run() -> None:
            if self.recording is not None:
                self.recording.append((name, milliseconds))
                return
            self.now += milliseconds
            self.log.append(name)

        return run


@pytest.mark.parametrize(("graphs", "expected"), [(False, [0.1, 2.0]), (True, [0.05, 1.0])])
def test_the_timer_divides_bursts_by_their_calls(graphs: bool, expected: list, monkeypatch) -> None:
    gpu = FakeGpu(monkeypatch)
    contenders = [[gpu.call("a0", 0.1), gpu.call("a1", 0.1)], [gpu.call("b0", 2.0)]]
    times = time_in_turn(contenders, graphs=graphs, rounds=4)
    assert [len(found) for found in times] == [4, 4], "the round that warms up does not count"
    assert [sum(found) / 4 for found in times] == pytest.approx(expected)


def test_the_timer_alternates_and_rotates_the_inputs(monkeypatch) -> None:
    gpu = FakeGpu(monkeypatch)
    contenders = [[gpu.call("a0", 1.0), gpu.call("a1", 1.0)], [gpu.call("b0", 1.0), gpu.call("b1", 1.0)]]
    time_in_turn(contenders, graphs=False, rounds=3)
    a, b = ["a0", "a1"], ["b0", "b1"]
    prepared = 2 * a + 2 * b  # warmed up, and measured for the length of a burst
    assert gpu.log == [*prepared, *a, *b, *b, *a, *a, *b, *b, *a]


def test_inputs_to_rotate_through_are_beyond_twice_the_l2(monkeypatch) -> None:
    properties = type("Properties", (), {"L2_cache_size": 60 << 20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda", 0)
    sizes = 10 << 20, 1 << 30, 1
    unknown, h200, mi300x = (
        replace(TARGET, arch=1),
        *(DEVICES[slug].target for slug in ("nvidia-h200", "amd-instinct-mi300x")),
    )
    for target in (unknown, h200):
        assert [cold_copies(size, gpu, target) for size in sizes] == [12, 2, 128]
    properties.L2_cache_size = 4 << 20
    assert cold_copies(10 << 20, gpu, mi300x) == 52, "256 MB of Infinity Cache, twice"
    assert cold_copies(1, torch.device("cpu"), INTERPRETER) == 1


@pytest.fixture
def blamed() -> Callable:
    """The loop's guard around a choice on a GPU."""
    tools = MachineTools(TARGET, torch.device("cuda", 0), None)
    return lambda: command._blamed(TILES, "timed", tools)


def test_a_failure_after_which_the_gpu_answers_is_the_candidates_own(blamed, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    with pytest.raises(Rejected, match="cannot be timed: ValueError: mine"), blamed():
        raise ValueError("mine")


def test_a_failure_after_which_the_gpu_does_not_answer_is_its_loss(blamed, monkeypatch) -> None:
    def lost(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match="mine"), blamed():
        raise RuntimeError("mine")
    with pytest.raises(KeyboardInterrupt), blamed():
        raise KeyboardInterrupt


# ---- compiling -------------------------------------------------------------------------------------------

OP, PROBLEM, _ = JOBS[0]
TILES = TileConfig(64, 64, 64)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list:
    """Compilers that run in threads; the pools that were made."""
    pools = []

    def threads(*_: object, **options: object) -> ThreadPoolExecutor:
        pools.append(ThreadPoolExecutor(1))
        return pools[-1]

    monkeypatch.setattr(machine, "worker_pool", threads)
    return pools


def test_what_the_compiler_says_is_the_result(threads: list, monkeypatch) -> None:
    monkeypatch.setattr(machine, "compile_choice", lambda *work: f"{work[2].block_m} wide: too large")
    compiler = Compiler(TARGET)
    assert compiler.start(OP, PROBLEM, TILES).result(10) == "64 wide: too large"
    for choice in (None, Library.ATEN, Library.REFERENCE):
        assert compiler.start(OP, PROBLEM, choice).result(0) is None, "there is nothing to compile"
    compiler.close()


def test_a_compiler_process_that_dies_costs_its_own_candidate_alone(monkeypatch) -> None:
    monkeypatch.setattr(machine, "compile_choice", tuner_stubs.compile_or_abort)
    compiler = Compiler(TARGET, 1)
    widths = [tuner_stubs.ABORTS, 32, 64, 128, 256, 512]
    futures = [compiler.start(OP, PROBLEM, TileConfig(width, 64, 64)) for width in widths]
    found = [future.result(120) for future in futures]
    assert found[1:] == [None, None, None, None, "too large"], "they died with the first, and were not it"
    assert "a compiler process died twice" in found[0]
    compiler.close()


def test_a_pool_that_has_broken_is_replaced(threads: list, monkeypatch) -> None:
    def die(*work: object) -> None:
        raise BrokenProcessPool("aborted")

    monkeypatch.setattr(machine, "compile_choice", lambda *work: died.pop()(*work) if died else None)
    died: list = []
    compiler = Compiler(TARGET, 1)
    assert compiler.start(OP, PROBLEM, TILES).result(10) is None and len(threads) == 1
    threads[0].submit = die  # as a broken pool does from then on
    assert compiler.start(OP, PROBLEM, TILES).result(10) is None and len(threads) == 2
    died += [die]  # in the middle of its work
    assert compiler.start(OP, PROBLEM, TILES).result(10) is None and len(threads) == 3
    died += [die, die]
    assert "died twice" in compiler.start(OP, PROBLEM, TILES).result(10) and len(threads) == 5
    assert compiler.start(OP, PROBLEM, TILES).result(10) is None and len(threads) == 5
    compiler.close()


def test_a_closed_compiler_starts_no_process_again(threads: list, monkeypatch) -> None:
    def interrupted(*work: object) -> None:
        compiler.close()
        raise BrokenProcessPool("Ctrl-C while the process started")

    monkeypatch.setattr(machine, "compile_choice", interrupted)
    compiler = Compiler(TARGET, 1)
    with pytest.raises(BrokenProcessPool):
        compiler.start(OP, PROBLEM, TILES).result(10)
    assert len(threads) == 1


def test_what_says_nothing_about_a_candidate_is_no_result(threads: list, monkeypatch) -> None:
    started, go_on = threading.Event(), threading.Event()

    def full(*work: object) -> None:
        started.set()
        go_on.wait(10)
        raise OSError("no space left on device")

    monkeypatch.setattr(machine, "compile_choice", full)
    compiler = Compiler(TARGET, 1)
    fails, waits = (compiler.start(OP, PROBLEM, TILES) for _ in range(2))
    started.wait(10)
    compiler.close()
    go_on.set()
    assert waits.cancelled()
    with pytest.raises(OSError, match="no space left"):
        fails.result(10)


@pytest.mark.parametrize("error", [OSError("no space left on device"), MemoryError()])
def test_a_worker_without_disk_or_memory_does_not_blame_the_candidate(error, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(machine, "Trial", fail)
    with pytest.raises(type(error)):
        machine.compile_choice(OP, PROBLEM, TILES, TARGET)


@pytest.mark.parametrize(("backend", "arch"), [("cuda", 103), ("cuda", 121), ("cuda", 87), ("hip", "gfx950")])
def test_for_an_arch_that_is_not_known_ahead_of_time_nothing_is_compiled_before_it_runs(
    backend: str, arch: int | str, threads: list, monkeypatch
) -> None:
    monkeypatch.setattr(machine, "compile_choice", lambda *work: "not to be asked")
    target = replace(TARGET, backend=backend, arch=arch)
    with pytest.raises(ValueError, match="expected an arch in"):
        compile.gpu_target(target)
    compiler = Compiler(target)
    assert compiler.start(OP, PROBLEM, TILES).result(0) is None and not compiler.compiles_ahead
    compiler.close()
    for known in TARGETS.values():
        compiler = Compiler(known)
        assert compiler.compiles_ahead
        compiler.close()
    assert machine.contenders(JOBS[0], target), "there are choices without a prediction"


@pytest.mark.slow
def test_candidates_compile_in_worker_processes() -> None:
    compiler = Compiler(TARGET, 1)
    fits = compiler.start(OP, PROBLEM, TileConfig(64, 64, 64, num_stages=4))
    large = compiler.start(OP, PROBLEM, TileConfig(256, 256, 128, num_stages=4))
    assert fits.result(300) is None
    assert "does not fit" in large.result(300)
    compiler.close()


def test_a_machine_is_told_from_another_by_its_name_alone() -> None:
    tools = [
        machine.MachineTools(replace(TARGET, name=name), torch.device("cpu"), None)
        for name in ("sample-gpu", "another-gpu")
    ]
    tools[0].record(Entry(OP, PROBLEM, TILES))
    assert [tool.recorded(JOBS[0]) for tool in tools] == ["user", None]

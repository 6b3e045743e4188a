"""What is done in which order: the stages of the two plans, and of the dry run that drives both on a CPU.

The most informative comes first, because time may end. The limits fill ``MINUTES``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

MINUTES = 9.0
RESERVE = 15.0  # seconds of them, for ending the last stage and for the last summary
TO_END = 8.0  # seconds of its limit that a bench or a tuner keeps for what it began last
PLANS = ("first", "second")
STAGES = ("-m", "fastmixer.benchmarks.evidence.stages")

# Options of bench. What a stage's own options repeat, they replace.
BENCH = (
    "--models B/16 --dtype bf16 --direction forward --seconds 2 --opponents fused eager compile cublas copy"
)
TRAINING = "--levels block model --batch 64 --direction forward_backward --opponents fused fused_lean eager"
SLOWEST = "--levels block --batch 256 --opponents fused eager compile compile_max_autotune"
DRY_BENCH = ("--device cpu --models S/32 --dtype fp32 --direction forward --levels block --batch 1 "
             "--opponents fused eager --seconds 0.1")  # fmt: skip
TUNE = "--model mixer_b16_224 --batch 256 --op token_mixing channel_fc1 channel_fc2 token_dgrad"
PYTEST = "-n auto --dist worksteal --tb short -rfE --maxfail 60"
DRY_SECONDS = 600.0  # for a slow or busy machine
# Of the dry run: ends by no polite signal, and has a child that would outlive it.
HANG = """
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(600)
"""
# Of the dry run: dies as a process does whose compiler aborts.
CRASH = "import os; print('the planned crash', flush=True); os.abort()"


@dataclass(frozen=True)
class Stage:
    """One process.

    seconds: its limit. command: the arguments of Python; ``{seconds}`` in them is the limit that it really
    gets, less ``TO_END``. background: the next stages begin beside it. timed: begins when nothing is left in
    the background. needs_tests: of the folder ``tests``, which only a checkout has. environment: variables
    that it has besides. expected: its state if it does what it should.
    """

    name: str
    seconds: float
    command: tuple[str, ...]
    background: bool = False
    timed: bool = False
    needs_tests: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    expected: str = "ok"

    def arguments(self, seconds: float) -> list[str]:
        """The command line, when it gets so many seconds."""
        left = f"{max(2.0, seconds - TO_END):.0f}"
        return [sys.executable, "-u", *(word.replace("{seconds}", left) for word in self.command)]


def stages(plan: str, out: Path, gpu: str, commit: str | None = None) -> list[Stage]:
    """The stages of a plan.

    Args:
        plan: "first", "second", or "dry run": both on a CPU, as small as can be, and two that go wrong, which
            must cost the others nothing.
        out: the folder of the results.
        gpu: the name of this GPU's folder in it.
        commit: what bench records where git cannot say which commit this is.
    """
    make = _Maker(out, gpu, commit, dry=plan == "dry run")
    if plan == "first":
        return first(make)
    if plan == "second":
        return second(make)
    *early, last = {stage.name: stage for stage in (*first(make), *second(make))}.values()
    hang = Stage("hang", 5.0, ("-c", HANG), expected="timed out")
    crash = Stage("crash", DRY_SECONDS, ("-c", CRASH), expected="signal 6")
    return [*early, hang, crash, last]


def first(make: _Maker) -> list[Stage]:
    """Is it right, how fast is it, what does it keep: then what the tuner gains, and the slowest rival."""
    return [
        make.own("environment", 60, background=True),
        make.own("warm", 100, background=True),
        make.own("inductor", 110, background=True),
        make.own("smoke", 95, kernels=True),
        make.bench("batch-256", 110, "--levels block kernel channel token model --batch 256"),
        make.bench("batch-64-and-1", 45, "--levels block --batch 64 1"),
        make.bench("training", 60, TRAINING),
        make.own("api", 45, kernels=True, timed=True),
        make.tune("tune", 45),
        make.bench("tuned", 35, "--levels block --batch 256 --opponents fused eager", tuned=True),
        make.bench("training-compiled", 40, f"{TRAINING} compile"),
        make.bench("max-autotune", 50, SLOWEST),
    ]


def second(make: _Maker) -> list[Stage]:
    """The tools that look inside, correctness in breadth, more models, and the rest of the tests."""
    return [
        make.own("environment", 60, background=True),
        make.own("ncu", 60, kernels=True, timed=True),
        make.own("sanitizer", 35, kernels=True, needs_tests=True),
        make.own("memcheck", 110, kernels=True, needs_tests=True, background=True),
        make.own("racecheck", 110, kernels=True, needs_tests=True, background=True),
        make.pytest("tests-smoke", 110, "gpu and smoke"),
        make.bench("models", 100, "--levels block --batch 256 --models S/16 B/32 L/16"),
        make.bench("batch-1024", 50, "--levels block model --batch 1024"),
        make.pytest("tests", 170, "gpu and not smoke"),
    ]


@dataclass(frozen=True)
class _Maker:
    """Makes stages; ``dry``: of each the smallest that its process can do without a GPU."""

    out: Path
    gpu: str
    commit: str | None
    dry: bool

    def own(self, name: str, seconds: float, *, kernels: bool = False, **options: bool) -> Stage:
        """A stage of ``stages.py``. kernels: it runs them, and so in a dry run needs the interpreter."""
        command = (*STAGES, name, str(self.out), *["--dry-run"] * self.dry)
        environment = {"TRITON_INTERPRET": "1"} if self.dry and kernels else {}
        return self._stage(name, seconds, command, environment, **options)

    def bench(self, name: str, seconds: float, options: str, *, tuned: bool = False) -> Stage:
        words = f"{BENCH} {options} {DRY_BENCH if self.dry else ''}".split()
        words += ["--time-limit", "{seconds}s", "--output", f"{self.out}/bench/{self.gpu}/{name}.json"]
        words += ["--commit", self.commit] if self.commit else []
        command = ("-m", "fastmixer", "bench", "--final", *words)
        return self._stage(name, seconds, command, self._tuned if tuned else {}, timed=True)

    def tune(self, name: str, seconds: float) -> Stage:
        words = ["--help"] if self.dry else [*TUNE.split(), "--budget", "{seconds}s"]
        return self._stage(name, seconds, ("-m", "fastmixer", "tune", *words), self._tuned, timed=True)

    def pytest(self, name: str, seconds: float, marks: str) -> Stage:
        words = ["tests/test_parity_rule.py"] if self.dry else ["-m", marks, *PYTEST.split()]
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *words)
        return self._stage(name, seconds, command, {}, needs_tests=True)

    @property
    def _tuned(self) -> dict[str, str]:
        """So that nothing but what says so runs with the tuner's choices."""
        return {"FASTMIXER_CACHE_DIR": str(self.out / "tuned")}

    def _stage(
        self, name: str, seconds: float, command: tuple, environment: Mapping[str, str], **options: bool
    ) -> Stage:
        return Stage(name, DRY_SECONDS if self.dry else seconds, command, environment=environment, **options)

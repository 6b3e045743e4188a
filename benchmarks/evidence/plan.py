"""What is done in which order: the stages of the two plans, and of the dry run that drives both on a CPU.

The most informative comes first, because time may end. The limits fill ``MINUTES``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

MINUTES = 9.0
RESERVE = 15.0  # seconds of them, for ending the last stage and for the last summary
TO_END = 8.0  # seconds of its limit that a bench or a tuner keeps for what it began last
PLANS = ("first", "second")
STAGES = ("-m", "fastmixer.benchmarks.evidence.stages")

FAST = ("fused", "eager", "compile", "cublas", "copy")
TRAINING = ("fused", "fused_lean", "eager")
SLOWEST = ("fused", "eager", "compile", "compile_max_autotune")
B16 = {"models": ("B/16",), "dtype": ("bf16",), "direction": ("forward",)}

INTERPRETED = {"TRITON_INTERPRET": "1"}
DRY_SECONDS = 600.0  # for a slow or busy machine
DRY_BENCH = {"models": ("S/32",), "dtype": ("fp32",), "direction": ("forward",), "levels": ("block",),
             "batch": ("1",), "opponents": ("fused", "eager"), "seconds": ("0.1",),
             "device": ("cpu",)}  # fmt: skip


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
    real = {stage.name: stage for stage in (*first(make), *second(make))}
    hang = replace(make.own("hang", 5), seconds=5.0, expected="timed out")
    crash = replace(make.own("crash", 60), expected="signal 6")
    *early, last = real.values()
    return [*early, hang, crash, last]


def first(make: _Maker) -> list[Stage]:
    """Is it right, how fast is it, what does it keep: then what the tuner gains, and the slowest rival."""
    return [
        make.own("environment", 60, background=True),
        make.own("warm", 100, background=True),
        make.own("inductor", 110, background=True),
        make.own("smoke", 95, interpreted=True),
        make.bench("batch-256", 110, levels="block kernel channel token model", batch="256"),
        make.bench("batch-64-and-1", 45, levels="block", batch="64 1"),
        make.training("training", 60),
        make.own("api", 45, timed=True, interpreted=True),
        make.tune("tune", 45),
        make.bench("tuned", 35, levels="block", batch="256", opponents=("fused", "eager"), tuned=True),
        make.training("training-compiled", 40, "compile"),
        make.bench("max-autotune", 50, levels="block", batch="256", opponents=SLOWEST),
    ]


def second(make: _Maker) -> list[Stage]:
    """The tools that look inside, correctness in breadth, more models, and the rest of the tests."""
    return [
        make.own("environment", 60, background=True),
        make.own("ncu", 60, timed=True, interpreted=True),
        make.own("sanitizer", 35, needs_tests=True, interpreted=True),
        make.own("memcheck", 110, background=True, needs_tests=True, interpreted=True),
        make.own("racecheck", 110, background=True, needs_tests=True, interpreted=True),
        make.pytest("tests-smoke", 110, "gpu and smoke"),
        make.bench("models", 100, levels="block", batch="256", models=("S/16", "B/32", "L/16")),
        make.bench("batch-1024", 50, levels="block model", batch="1024"),
        make.pytest("tests", 170, "gpu and not smoke"),
    ]


@dataclass(frozen=True)
class _Maker:
    """Makes stages; ``dry``: of each the smallest that its process can do without a GPU."""

    out: Path
    gpu: str
    commit: str | None
    dry: bool

    def own(self, name: str, seconds: float, *, interpreted: bool = False, **how: bool) -> Stage:
        """A stage of ``stages.py``. interpreted: that runs kernels, and so in a dry run the interpreter."""
        command = (*STAGES, name, str(self.out), *["--dry-run"] * self.dry)
        return self._stage(name, seconds, command, INTERPRETED if self.dry and interpreted else {}, **how)

    def bench(
        self, name: str, seconds: float, *, levels: str, batch: str,
        opponents: tuple[str, ...] = FAST, tuned: bool = False, **options: tuple[str, ...],
    ) -> Stage:  # fmt: skip
        asked = {**B16, "levels": levels.split(), "batch": batch.split(), "opponents": opponents}
        asked |= {"seconds": ("2",), **options, **(DRY_BENCH if self.dry else {})}
        asked |= {"commit": (self.commit,)} if self.commit else {}
        asked |= {"time-limit": ("{seconds}s",), "output": (f"{self.out}/bench/{self.gpu}/{name}.json",)}
        words = [word for option, values in asked.items() for word in (f"--{option}", *values)]
        command = ("-m", "fastmixer", "bench", "--final", *words)
        return self._stage(name, seconds, command, self._tuned if tuned else {}, timed=True)

    def training(self, name: str, seconds: float, *more: str) -> Stage:
        opponents, direction = (*TRAINING, *more), ("forward_backward",)
        return self.bench(
            name, seconds, levels="block model", batch="64", opponents=opponents, direction=direction
        )

    def tune(self, name: str, seconds: float) -> Stage:
        asked = ("--model", "mixer_b16_224", "--batch", "256", "--budget", "{seconds}s")
        asked += ("--op", "token_mixing", "channel_fc1", "channel_fc2", "token_dgrad")
        command = ("-m", "fastmixer", "tune", *(("--help",) if self.dry else asked))
        return self._stage(name, seconds, command, self._tuned, timed=True)

    def pytest(self, name: str, seconds: float, marks: str) -> Stage:
        asked = ("-m", marks, "-n", "auto", "--dist", "worksteal", "--tb", "short", "-rfE", "--maxfail", "60")
        asked = ("tests/test_parity_rule.py",) if self.dry else asked
        command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *asked)
        return self._stage(name, seconds, command, {}, needs_tests=True)

    @property
    def _tuned(self) -> dict[str, str]:
        """So that nothing but what says so runs with the tuner's choices."""
        return {"FASTMIXER_CACHE_DIR": str(self.out / "tuned")}

    def _stage(
        self, name: str, seconds: float, command: tuple, environment: Mapping[str, str], **how: bool
    ) -> Stage:
        return Stage(name, DRY_SECONDS if self.dry else seconds, command, environment=environment, **how)

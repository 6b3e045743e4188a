"""What is done in which order: the stages of the two plans, and of the dry run that drives both on a CPU.

The most informative comes first, because time may end. The limits fill ``MINUTES``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

MINUTES = 9.0
RESERVE = 15.0  # seconds of them, for ending the last stage and for the last summary
TO_END = 8.0  # seconds of its limit that a bench or a tuner keeps for what it began last
DRY_SECONDS = 600.0  # the limits of a dry run, for a slow or busy machine
PLANS = ("first", "second", "race")

# What Python runs. Of an option that is repeated the last one counts.
STAGES = ("-m", "fastmixer.benchmarks.evidence.stages")
BENCH = (
    "-m fastmixer bench --final --models B/16 --dtype bf16 --direction forward --seconds 2 "
    "--opponents fused eager compile cublas copy --time-limit {seconds}s"
)
DRY_BENCH = (
    "--device cpu --models S/32 --dtype fp32 --direction forward --levels block --batch 1 "
    "--opponents fused eager --seconds 0.1 --designs"  # none: they are of a GPU
)
WARM = "--opponents fused compile"
TRAINING = "--levels block model --batch 64 --direction forward_backward --opponents fused fused_lean eager"
RACE = (
    "--levels block --models B/16 S/16 L/16 --batch 256 64 --designs channel_fc1 channel_fc2 "
    "channel_fc1=tma_128x128,channel_fc2=addmm channel_fc1=tma_128x256,channel_fc2=addmm "
    "--opponents fused eager"
)
SLOWEST = "--levels block --batch 256 --opponents fused eager compile compile_max_autotune"
TUNE = (
    "-m fastmixer tune --model mixer_b16_224 --batch 256 "
    "--op token_mixing channel_fc1 channel_fc2 token_dgrad --budget {seconds}s"
)
PYTEST = "-m pytest -q -p no:cacheprovider -n auto --dist worksteal --tb short -rfE --maxfail 60"
DRY_PYTEST = ("-n", "0", "-m", "not gpu and not slow", "tests/test_parity_rule.py")
# Of the dry run: ends by no polite signal, and has a child that would outlive it.
HANG = """
import signal, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGINT, signal.SIG_IGN)
time.sleep(600)
"""
# Of the dry run: dies as a process does whose compiler aborts.
CRASH = "import os; print('the planned crash', flush=True); os.abort()"

# What runs Python: NVIDIA's tools, by ``env``, which says so where there is none.
# ncu looks at the four kernels of a block in its second call. Its default would lock the clocks.
NCU = (
    "env ncu --clock-control none --kernel-name regex:_(row_moments|token_mixing|fc1|fc2)_kernel "
    "--launch-skip 4 --launch-count 4 --csv --page details --section SpeedOfLight --section LaunchStats "
    "--section Occupancy --section SchedulerStats --section WarpStateStats "
    "--section ComputeWorkloadAnalysis --section MemoryWorkloadAnalysis"
)
SANITIZER = "env compute-sanitizer --error-exitcode 9 --print-limit 20 --tool"


@dataclass(frozen=True)
class Stage:
    """One process.

    seconds: its limit. command: the arguments of Python; ``{seconds}`` in them is the limit that it really
    gets, less ``TO_END``. tool: what runs Python. dry: further arguments in a dry run. background: the next
    stages begin beside it. timed: begins when nothing is left in the background. needs_tests: of the folder
    ``tests``, which only a checkout has. environment: variables that it has besides. expected: its state if
    it does what it should.
    """

    name: str
    seconds: float
    command: Sequence[str]
    tool: Sequence[str] = ()
    dry: Sequence[str] = ()
    background: bool = False
    timed: bool = False
    needs_tests: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    expected: str = "ok"

    def arguments(self, seconds: float) -> list[str]:
        """The command line, when it gets so many seconds."""
        left = f"{max(2.0, seconds - TO_END):.0f}"
        words = (*self.tool, sys.executable, "-u", *self.command)
        return [word.replace("{seconds}", left) for word in words]


def stages(plan: str, out: Path, gpu: str, commit: str | None = None) -> list[Stage]:
    """The stages of a plan.

    Args:
        plan: of ``PLANS``, or "dry run": both on a CPU, as small as can be, and two that go wrong, which
            must cost the others nothing.
        out: the folder of the results.
        gpu: the name of this GPU's folder in it.
        commit: what bench records where git cannot say which commit this is.
    """
    recorded = ["--commit", commit] if commit else []
    tuned = {"FASTMIXER_CACHE_DIR": f"{out}/tuned"}  # nothing else runs with the tuner's choices
    # Uncached, every tensor is an allocation of its own, beyond which an access shows.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitized = {"needs_tests": True, "background": True, "environment": uncached}

    def own(name: str, seconds: float, tool: str = "", **options: object) -> Stage:
        return Stage(name, seconds, (*STAGES, name, str(out)), tool=tool.split(), **options)

    def bench(name: str, seconds: float, words: str, **options: object) -> Stage:
        folder = "warm" if options.get("background") else f"bench/{gpu}"
        command = [*BENCH.split(), *words.split(), "--output", f"{out}/{folder}/{name}.json", *recorded]
        return Stage(name, seconds, command, dry=DRY_BENCH.split(), timed=folder != "warm", **options)

    def warm(name: str, seconds: float, words: str) -> Stage:
        """Compiles what a later bench times: does the same in short, beside the checks, for no result."""
        few = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}  # the checks want CPUs too
        return bench(name, seconds, f"{words} --seconds 0.1", background=True, environment=few)

    def pytest(name: str, seconds: float, marks: str) -> Stage:
        return Stage(name, seconds, (*PYTEST.split(), "-m", marks), dry=DRY_PYTEST, needs_tests=True)

    # Is it right, how fast is it, what does it keep: then what the tuner gains, and the slowest rival.
    first = [
        own("environment", 60, background=True),
        warm("warm", 110, f"--levels block --batch 256 64 1 {WARM}"),
        warm("inductor", 110, f"--levels channel token model --batch 256 {WARM}"),
        warm("warm-training", 110, f"{TRAINING} compile"),
        own("smoke", 95),
        bench("batch-256", 110, "--levels block kernel channel token model --batch 256"),
        bench("batch-64-and-1", 45, "--levels block --batch 64 1"),
        bench("training", 60, TRAINING),
        own("api", 45, timed=True),
        Stage("tune", 45, TUNE.split(), dry=("--help",), timed=True, environment=tuned),
        bench("tuned", 35, "--levels block --batch 256 --opponents fused eager", environment=tuned),
        bench("training-compiled", 40, f"{TRAINING} compile"),
        bench("max-autotune", 50, SLOWEST),
    ]
    # The tools that look inside, correctness in breadth, more models, and the rest of the tests.
    second = [
        own("environment", 60, background=True),
        own("ncu", 60, NCU, timed=True),
        own("sanitizer", 35, needs_tests=True),
        own("memcheck", 110, f"{SANITIZER} memcheck", **sanitized),
        own("racecheck", 110, f"{SANITIZER} racecheck", **sanitized),
        pytest("tests-smoke", 110, "gpu and smoke"),
        bench("models", 100, "--levels block --batch 256 --models S/16 B/32 L/16"),
        bench("batch-1024", 50, "--levels block model --batch 1024"),
        pytest("tests", 170, "gpu and not smoke"),
    ]
    # Which design is the fastest, and what the fastest rival takes beside it.
    race = [
        own("environment", 60, background=True),
        bench("designs", 150, RACE),
        bench("rival", 60, SLOWEST),
    ]
    plans = {"first": first, "second": second, "race": race}
    if plan in plans:
        return plans[plan]
    everything = {stage.name: stage for stage in first + second + race}
    *early, last = map(_dry, everything.values())
    hang = Stage("hang", 5.0, ("-c", HANG), expected="timed out")
    return [*early, hang, Stage("crash", DRY_SECONDS, ("-c", CRASH), expected="signal 6"), last]


def _dry(stage: Stage) -> Stage:
    """The smallest that its process can do without a GPU; that of ``stages.py`` in the interpreter."""
    own = tuple(stage.command[:2]) == STAGES
    environment = {**stage.environment, **({"TRITON_INTERPRET": "1"} if own else {})}
    command = (*stage.command, *stage.dry)
    return replace(stage, seconds=DRY_SECONDS, command=command, tool=(), environment=environment)

"""``python -m fastmixer tune``: the tuner's loop with a real GPU, and what it needs of the machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from fastmixer import configs, dispatch
from fastmixer.aot.compile import compiles_ahead
from fastmixer.configs import Library, Target, TileConfig, tables
from fastmixer.configs.candidates import candidates
from fastmixer.configs.ops import HALVES
from fastmixer.configs.predict import cost
from fastmixer.configs.problem import Choice
from fastmixer.configs.tables import Entry
from fastmixer.tune import progress
from fastmixer.tune.compiler import Compiler
from fastmixer.tune.jobs import DTYPES, Job, check_names, jobs
from fastmixer.tune.loop import Contender, DeviceLost, Tools, Verdict, timed_as, tune
from fastmixer.tune.timer import CudaTimer, cold_copies
from fastmixer.tune.trial import Trial
from fastmixer.usage import UsageError

PRUNE = 2.0  # what is predicted to take longer than so many times the best is not tried
MOST = 8  # candidates besides the default

Timer = Callable[..., list[list[float]]]


def run(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    backward: bool = False,
    ops: Sequence[str] = (),
    budget: float = math.inf,
    workers: int | None = None,
    force: bool = False,
) -> int:
    """Tunes on the current GPU and writes the user's table.

    Args:
        models, batches, dtypes, backward, ops: as for ``jobs.jobs``.
        budget: seconds.
        workers: compiler processes; by default one a CPU, up to ``compiler.MAX_WORKERS``.
        force: make recorded choices again.

    Returns:
        The exit code: 1 if a default fails, a choice could not be made, the GPU is lost or the run was
        interrupted; 0 otherwise, also when the budget ends first.

    Raises:
        UsageError: an unknown model or op, no GPU that runs the kernels, or a table that cannot be written.
    """
    check_names(models, ops)
    if not torch.cuda.is_available():
        raise UsageError("tune needs a CUDA or ROCm GPU, and torch sees none: nothing was tuned")
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in dtypes:
        if reason := dispatch.why_not_triton(device, *DTYPES[dtype]):
            raise UsageError(f"tune needs a GPU that runs the kernels in {dtype}: {reason}")
    target = configs.target_of(device)
    todo = jobs(models, batches, dtypes, target, backward=backward, ops=ops)
    try:
        path = tables.user_path(target.name)
        with tables.locked(path):  # before anything is measured in vain
            pass
    except OSError as error:
        raise UsageError(f"tune cannot write its table: {error}; set FASTMIXER_CACHE_DIR") from error
    compiler = Compiler(target, workers)
    try:
        with progress.report() as report, torch.cuda.device(device):
            if not compiles_ahead(target):
                report.say(
                    f"arch {target.arch}: unknown ahead of time, so candidates compile when they first run"
                )
            tools = MachineTools(target, device, compiler.start, CudaTimer())
            summary = tune(todo, tools, report, budget=budget, force=force)
    finally:
        compiler.close()
    print("\n".join([*summary.lines(), f"table: {path}"]))
    return 0 if summary.ok else 1


class MachineTools(Tools):
    """The loop's tools on one device.

    Args:
        target: its ``name`` is the table's slug.
        device: where things run: a GPU, or in tests the CPU of Triton's interpreter.
        start_compiling: op, problem, choice -> a future as in ``Contender``.
        timer: contenders' calls, ``graphs=`` -> milliseconds of each.
        find_candidates: as ``configs.candidates.candidates``.
    """

    def __init__(
        self,
        target: Target,
        device: torch.device,
        start_compiling: Callable,
        timer: Timer,
        find_candidates: Callable[..., Sequence[TileConfig]] = candidates,
    ) -> None:
        self.target, self.device = target, device
        self._start_compiling, self._timer, self._candidates = start_compiling, timer, find_candidates
        self._trial: tuple[Job, Trial] | None = None

    def recorded(self, job: Job) -> str | None:
        """As the files are now: another process may be tuning too."""
        return tables.source(tables.key_of(job.op, job.problem), self.target)

    def prepare(self, job: Job) -> list[Contender]:
        choices = contenders(job, self.target, self._candidates)
        return [Contender(c, self._start_compiling(job.op, job.problem, c)) for c in choices]

    def check(self, job: Job, choice: Choice) -> Verdict:
        with _watched(self.device):
            return self._trial_of(job).check(choice)

    def race(self, job: Job, choice: Choice, against: Choice) -> tuple[list[float], list[float]]:
        timed = timed_as(job.op, choice, against)
        with _watched(self.device):
            trial = self._trial_of(job)
            calls = [trial.calls(one, timed) for one in (choice, against)]
            # Whole halves as a caller without graphs sees them: PyTorch launches faster than Triton does.
            mine, theirs = self._timer(calls, graphs=job.op not in HALVES)
            return mine, theirs

    def record(self, entry: Entry) -> None:
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.target.name
        tables.record(self.target.name, entry, name)

    def _trial_of(self, job: Job) -> Trial:
        """One at a time: its tensors may be a good part of the GPU's memory."""
        if self._trial is None or self._trial[0] != job:
            self._trial = None
            problem = job.problem
            bytes_each = 2 * math.prod(problem[:3]) * problem.x_dtype.itemsize  # x and the output
            copies = cold_copies(bytes_each, self.device, self.target)
            # A kernel among the defaults it was compiled beside; a half of what is tuned by now.
            select = configs.chooser(self.target) if job.op in HALVES else configs.select
            self._trial = job, Trial(job.op, problem, self.target, self.device, select, copies)
        return self._trial[1]


class _watched:
    """Tells a candidate's failure from a device that is lost: on that one every later call would fail."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception) or self._device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self._device)
        except RuntimeError:
            raise DeviceLost(f"the GPU is lost: {error}") from error


def contenders(
    job: Job, target: Target, find_candidates: Callable[..., Sequence[TileConfig]] = candidates
) -> list[Choice]:
    """The default, the candidates that the cost model does not rule out, and PyTorch where it is a choice."""
    op, problem = job.op, job.problem
    default = configs.select(op, problem, target)
    if op in HALVES:
        other = None if default is Library.REFERENCE else Library.REFERENCE
        return [default, other]
    others: list[Choice] = [tiles for tiles in find_candidates(op, problem, target) if tiles != default]
    others = _pruned(op, problem, target, default, others)
    if op in ("channel_fc1", "channel_fc2") and default is not Library.ATEN:
        others.append(Library.ATEN)
    return [default, *others]


def _pruned(
    op: str, problem: configs.Problem, target: Target, default: Choice, others: list[Choice]
) -> list[Choice]:
    """The likeliest first. What nothing is predicted of is kept, behind the others."""
    seconds = {choice: _predicted(op, problem, choice, target) for choice in (default, *others)}
    best = min((s for s in seconds.values() if s is not None), default=math.inf)
    kept = [choice for choice in others if seconds[choice] is None or seconds[choice] <= PRUNE * best]
    return sorted(kept, key=lambda c: math.inf if seconds[c] is None else seconds[c])[:MOST]


def _predicted(op: str, problem: configs.Problem, choice: Choice, target: Target) -> float | None:
    prediction = cost.predict_launch(op, problem, choice, target)
    return None if prediction is None else prediction.seconds

"""``python -m fastmixer tune``: for every op and problem, which choice is right and faster than the default.

How choices are compiled, checked and timed is up to ``machine.MachineTools``. Each choice is recorded as soon
as it is made: a killed run loses the op that it was at, and the next one goes on there.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

import torch

from fastmixer import configs, dispatch
from fastmixer.configs import Choice, Library, TileConfig, tables
from fastmixer.configs.designs import VARIABLE, forced_names
from fastmixer.configs.ops import HALVES
from fastmixer.configs.tables import Entry
from fastmixer.tune.jobs import DTYPES, Job, check_names, describe, first_line, jobs
from fastmixer.tune.machine import Compiler, Compiling, MachineTools, timed_as
from fastmixer.tune.trial import Rejected
from fastmixer.usage import UsageError, progress_bar


class DeviceLost(RuntimeError):
    """The GPU answers no more: nothing that is measured in this process from here on would mean anything."""


class Inconclusive(RuntimeError):
    """A choice fails for a reason that is not its own: what wins without it must not win for good."""


class Report:
    """What the run says on stderr; the job and its best choice so far in a bar, where there is one."""

    def __init__(self, bar: Callable[..., None] | None = None) -> None:
        self._bar, self._job = bar, ""

    def job(self, job: Job, place: int, total: int) -> None:
        """The run begins with a job: the place-th, from 0."""
        self._job = str(job)
        if self._bar:
            self._bar(description=self._job, completed=place, total=total, refresh=True)
        else:
            self.say(f"[{place + 1}/{total}] {job}")

    def best(self, text: str) -> None:
        """The best choice so far of that job, when there is another."""
        if self._bar:
            self._bar(description=f"{self._job}: {text}", refresh=True)
        else:
            self.say(f"  best so far: {text}")

    def say(self, text: str) -> None:
        """A line to stay, above the bar."""
        print(text, file=sys.stderr, flush=True)


@dataclass
class Summary:
    """What a run came to.

    recorded: what was kept, in order. unfinished: jobs for the next run, a choice of which failed for a
    reason that is not its own. left: jobs that the run did not get to.
    """

    recorded: list[Entry] = field(default_factory=list)
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    unfinished: list[str] = field(default_factory=list)
    left: int = 0
    interrupted: bool = False

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong; a budget that ends is no fault."""
        return not self.failed and not self.unfinished and not self.interrupted

    def lines(self) -> list[str]:
        changed = sum(entry.ms is not None and entry.ms < entry.default_ms for entry in self.recorded)
        text = f"{len(self.recorded)} choices recorded, {changed} of them faster than the default"
        lines = [text + f"; {self.skipped} were there before or have no alternative" * bool(self.skipped)]
        lines += [f"FAILED {text}" for text in self.failed]
        lines += [f"NOT RECORDED {text}; the next run tries it again" for text in self.unfinished]
        if self.left:
            why = "interrupted" if self.interrupted else "stopped" if self.failed else "out of budget"
            lines.append(f"{why}: {self.left} choices left; what is recorded is kept, run again to go on")
        return lines


def run(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    gelu: str = "none",
    backward: bool = False,
    ops: Sequence[str] = (),
    budget: float = math.inf,
    workers: int | None = None,
    force: bool = False,
) -> int:
    """Tunes on the current GPU and writes the user's table.

    Args:
        models, batches, dtypes, gelu, backward, ops: as for ``jobs.jobs``.
        budget: seconds.
        workers: compiler processes; by default one per CPU, up to ``workers.MAX_WORKERS``.
        force: make recorded choices again.

    Returns:
        The exit code: 1 if a default fails, a choice could not be made, the GPU is lost or the run was
        interrupted; 0 otherwise, also when the budget ends first.

    Raises:
        UsageError: an unknown model or op, no GPU that runs the kernels, a table that cannot be written, or
            designs that are forced.
    """
    check_names(models, ops)
    if forced := forced_names():
        raise UsageError(f"tune compares all designs: {forced} may not be forced, unset {VARIABLE}")
    if not torch.cuda.is_available():
        raise UsageError("tune needs a CUDA or ROCm GPU, and torch sees none: nothing was tuned")
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in dtypes:
        if reason := dispatch.why_not_triton(device, *DTYPES[dtype]):
            raise UsageError(f"tune needs a GPU that runs the kernels in {dtype}: {reason}")
    target = configs.target_of(device)
    todo = jobs(models, batches, dtypes, target, gelu=gelu, backward=backward, ops=ops)
    try:
        path = tables.user_path(target.name)
        with tables.locked(path):  # before anything is measured in vain
            pass
    except OSError as error:
        raise UsageError(f"tune cannot write its table: {error}; set FASTMIXER_CACHE_DIR") from error
    with contextlib.closing(Compiler(target, workers)) as compiler, progress_bar("tuning") as bar:
        report = Report(bar)
        if not compiler.compiles_ahead:
            until = "so candidates compile when they first run"
            report.say(f"arch {target.arch}: unknown ahead of time, {until}")
        tools = MachineTools(target, device, compiler.start)
        with torch.cuda.device(device):
            summary = tune(todo, tools, report, budget=budget, force=force)
    print("\n".join([*summary.lines(), f"table: {path}"]))
    return 0 if summary.ok else 1


def tune(
    todo: Sequence[Job],
    tools: MachineTools,
    report: Report,
    *,
    budget: float = math.inf,
    clock: Callable[[], float] = time.monotonic,
    force: bool = False,
) -> Summary:
    """Makes every choice that is not recorded yet, in order, and records each at once.

    Ends early when the budget (seconds, by ``clock``) is used up, at KeyboardInterrupt, when the device is
    lost and when a choice cannot be written; the choice in work is then dropped, for a later run. So is one
    that is inconclusive, and the run goes on. ``force``: makes recorded choices again.
    """
    summary = Summary()
    end = clock() + budget
    prepared: dict[Job, Compiling] = {}
    try:
        for place, job in enumerate(todo):
            summary.left = len(todo) - place
            if clock() >= end:
                return summary
            report.job(job, place, len(todo))
            recorded = tools.recorded(job)
            if recorded == "shipped":
                forced = ": tuned because of --force; what is measured here goes before it"
                ending = forced if force else "; --force tunes it anyway"
                report.say(f"{job}: the shipped table has it{ending}")
            if recorded and not force:
                summary.skipped += 1
                continue
            # The next op's candidates compile while this one's are timed, but not beside a half: its time is
            # the host's too.
            for ahead in (job, *todo[place + 1 : place + 2]):
                if ahead is job or not (job.op in HALVES or (tools.recorded(ahead) and not force)):
                    prepared[ahead] = prepared.get(ahead) or tools.prepare(ahead)
            compiled = prepared.pop(job)
            if len(compiled) == 1:
                summary.skipped += 1
                continue
            try:
                entry = _choose(job, compiled, tools, report, lambda: clock() >= end)
            except Rejected as error:
                summary.failed.append(f"{job}: the default, {describe(next(iter(compiled)))}: {error}")
                report.say(summary.failed[-1])
            except Inconclusive as error:
                summary.unfinished.append(f"{job}: {error}")
                report.say(f"{job}: left for the next run: {error}")
            else:
                if entry is None:
                    return summary
                tools.record(entry)
                summary.recorded.append(entry)
        summary.left = 0
    except KeyboardInterrupt:
        summary.interrupted = True
    except (DeviceLost, OSError) as error:
        summary.failed.append(f"{job}: {error}")
    return summary


def _choose(
    job: Job, compiled: Compiling, tools: MachineTools, report: Report, expired: Callable[[], bool]
) -> Entry | None:
    """The best of a job's choices, the first of which is the default; None if the budget ends before.

    Raises Rejected if the default is not right, and Inconclusive.
    """
    default, *others = compiled
    best = Entry(job.op, job.problem, default, parity=_checked(job, default, compiled[default], tools))
    # Libraries last: what they replace is timed as a part of its half, against the best tiles.
    for choice in sorted(others, key=lambda choice: not isinstance(choice, TileConfig)):
        if expired():
            return None
        is_library = isinstance(choice, Library)
        against = best.choice if is_library else default
        try:
            parity = _checked(job, choice, compiled[choice], tools)
            with _blamed(choice, "timed", tools):
                times, baseline = tools.race(job, choice, against)
                faster = statistics.median(times) < statistics.quantiles(baseline, n=5, method="inclusive")[0]
                if faster and against != default:  # what it gains over the default is timed as it was itself
                    times, baseline = tools.race(job, choice, default)
        except Rejected as error:
            report.say(f"{job}: {describe(choice)}: {error}")
            continue
        ms, default_ms = statistics.median(times), statistics.median(baseline)
        timed, before = timed_as(job.op, choice, against), best
        if best.ms is None:  # the first race times the default too
            best = replace(best, ms=default_ms, default_ms=default_ms, timed=timed)
        if faster and (is_library or ms / default_ms < best.ms / best.default_ms):
            best = Entry(job.op, job.problem, choice, ms, default_ms, parity, timed)
        if best is not before:
            gain = best.default_ms / best.ms if best.ms else 1.0
            report.best(f"{describe(best.choice)}, {best.ms:.4f} ms, {gain:.2f}x the default")
    return replace(best, when=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))


def _checked(job: Job, choice: Choice, compiled: Future[str | None], tools: MachineTools) -> float | None:
    """What the parity gate measured: the error as a multiple of eager's; None: infinite."""
    try:
        reason = compiled.result()
    except Exception as error:  # of the compiler's processes
        why = "it was given up" if compiled.cancelled() else first_line(error)
        raise Inconclusive(f"{describe(choice)} was not compiled: {why}") from error
    if reason is not None:
        raise Rejected(f"does not compile: {reason}")
    with _blamed(choice, "checked", tools):
        ratio = tools.check(job, choice)
    return ratio if math.isfinite(ratio) else None


@contextlib.contextmanager
def _blamed(choice: Choice, attempt: str, tools: MachineTools) -> Iterator[None]:
    """Rejects the choice for whatever goes wrong, unless the device is lost or has no memory left."""
    try:
        yield
    except Rejected:
        raise
    except Exception as error:
        if tools.is_lost():
            raise DeviceLost(f"the GPU is lost: {error}") from error
        failure = f"cannot be {attempt}: {first_line(error)}"
        # Drivers say it in words, when a kernel is loaded or a graph recorded.
        in_words = isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
        if in_words or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            raise Inconclusive(f"{describe(choice)} {failure}") from error
        raise Rejected(failure) from error

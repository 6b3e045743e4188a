"""The tuner's loop: for every op and problem, which candidate is right and faster than the default.

What a candidate is, and how it is compiled, checked and timed, is a ``Tools``' business (``machine`` has
the real one), so that the loop runs in tests without a GPU. Each choice is recorded as soon as it is made: a
killed run loses the op that it was at, and the next one goes on there.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from fastmixer.configs.ops import HALVES
from fastmixer.configs.problem import Choice, Library, TileConfig
from fastmixer.configs.tables import Entry
from fastmixer.tune.jobs import Job, describe


class DeviceLost(RuntimeError):
    """The GPU answers no more: nothing that is measured in this process from here on would mean anything."""


class Inconclusive(RuntimeError):
    """A contender failed for a reason that is not its own: what wins without it must not win for good."""


@dataclass(frozen=True)
class Stats:
    """Median and quantiles of milliseconds."""

    median: float
    p20: float
    p80: float


@dataclass(frozen=True)
class Verdict:
    """Of the parity gate. ratio: the largest error as a multiple of eager's; reason: why not, if not ok."""

    ok: bool
    ratio: float
    reason: str = ""


@dataclass(frozen=True)
class Contender:
    """A candidate that is being compiled; the result is None, or why it does not compile or fit.

    A future that is cancelled, or has an exception, says nothing about the candidate.
    """

    choice: Choice
    compiled: Future[str | None]


class Tools(Protocol):
    """What the loop needs of the machine."""

    def recorded(self, job: Job) -> str | None:
        """Which table has this choice already, "shipped" or "user"; None: neither."""

    def prepare(self, job: Job) -> list[Contender]:
        """The default first, then what may be faster; starts to compile all of them and does not wait."""

    def check(self, job: Job, choice: Choice) -> Verdict:
        """Whether the choice's results are as near the truth as eager's."""

    def race(self, job: Job, choice: Choice, against: Choice) -> tuple[list[float], list[float]]:
        """Milliseconds of calls of both, measured in alternation."""

    def record(self, entry: Entry) -> None:
        """Keeps a choice, durably."""


class Report(Protocol):
    """Whom the loop tells."""

    def job(self, job: Job, place: int, total: int) -> None:
        """It starts with a job: the place-th, from 0."""

    def best(self, text: str) -> None:
        """The best choice so far of that job."""

    def say(self, text: str) -> None:
        """A line to stay."""


@dataclass
class Summary:
    """What a run came to.

    recorded: what was kept, in order. unfinished: jobs for the next run, a contender of which failed for a
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


def summarise(milliseconds: Sequence[float]) -> Stats:
    """Quantiles are interpolated linearly; ValueError with less than two times."""
    if len(milliseconds) < 2:
        raise ValueError(f"milliseconds must hold at least two times, got {len(milliseconds)}")
    p20, _, _, p80 = statistics.quantiles(milliseconds, n=5, method="inclusive")
    return Stats(statistics.median(milliseconds), p20, p80)


def timed_as(op: str, *choices: Choice) -> str:
    """What a race compares: each op's own launch ("kernel") or, with PyTorch in it, all of the "half"."""
    return "half" if op in HALVES or any(isinstance(choice, Library) for choice in choices) else "kernel"


def tune(
    jobs: Sequence[Job],
    tools: Tools,
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
    prepared: dict[Job, list[Contender]] = {}
    place = 0
    try:
        for place, job in enumerate(jobs):
            if clock() >= end:
                summary.left = len(jobs) - place
                return summary
            report.job(job, place, len(jobs))
            if _is_known(job, tools, report, force):
                summary.skipped += 1
                continue
            # The next op's candidates compile while this one's are timed, but not beside a half: its time is
            # the host's too.
            for ahead in (job, *jobs[place + 1 : place + 2]):
                if ahead is job or not (job.op in HALVES or (tools.recorded(ahead) and not force)):
                    prepared[ahead] = prepared.get(ahead) or tools.prepare(ahead)
            try:
                if not _tune_one(job, prepared.pop(job), tools, report, summary, lambda: clock() >= end):
                    summary.left = len(jobs) - place
                    return summary
            except Inconclusive as error:
                summary.unfinished.append(f"{job}: {error}")
                report.say(f"{job}: left for the next run: {error}")
    except KeyboardInterrupt:
        summary.interrupted, summary.left = True, len(jobs) - place
    except (DeviceLost, OSError) as error:
        summary.failed.append(f"{jobs[place]}: {error}")
        summary.left = len(jobs) - place
    return summary


def _is_known(job: Job, tools: Tools, report: Report, force: bool) -> bool:
    """Whether a table has it and may keep it; says so."""
    where = tools.recorded(job)
    if where == "shipped":
        forced = ": tuned because of --force; what is measured here goes before it"
        report.say(f"{job}: the shipped table has it" + (forced if force else "; --force tunes it anyway"))
    return where is not None and not force


def _tune_one(
    job: Job,
    contenders: Sequence[Contender],
    tools: Tools,
    report: Report,
    summary: Summary,
    expired: Callable[[], bool],
) -> bool:
    """Makes one choice; False if the budget ended before it was made."""
    default, *others = contenders
    if not others:
        summary.skipped += 1
        return True
    verdict = _judged(job, default, tools)
    if not verdict.ok:
        summary.failed.append(f"{job}: the default, {describe(default.choice)}: {verdict.reason}")
        report.say(summary.failed[-1])
        return True
    best = Entry(job.op, job.problem, default.choice, parity=_finite(verdict.ratio))
    # Libraries last: what they replace is timed as a part of its half, against the best tiles.
    for contender in sorted(others, key=lambda c: not isinstance(c.choice, TileConfig)):
        if expired():
            return False
        best = _better(job, contender, best, default.choice, tools, report)
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    entry = replace(best, when=when)
    tools.record(entry)
    summary.recorded.append(entry)
    return True


def _better(
    job: Job, contender: Contender, best: Entry, default: Choice, tools: Tools, report: Report
) -> Entry:
    """The better of ``best`` and a contender, which has to be right, and faster beyond the spread."""
    choice, name = contender.choice, f"{job}: {describe(contender.choice)}"
    verdict = _judged(job, contender, tools)
    if not verdict.ok:
        report.say(f"{name}: not timed: {verdict.reason}")
        return best
    against = best.choice if isinstance(choice, Library) else default
    try:
        mine, theirs = _raced(job, choice, against, tools)
        faster = mine.median < theirs.p20
        if faster and against != default:  # what it gains over the default is timed as it was itself
            mine, theirs = _raced(job, choice, default, tools)
    except (DeviceLost, Inconclusive):
        raise
    except Exception as error:  # a launch that fails: the candidate's result, not the run's end
        report.say(f"{name}: cannot be timed: {_first_line(error)}")
        return best
    timed = timed_as(job.op, choice, against)
    if best.ms is None:  # the first race times the default too
        best = replace(best, ms=theirs.median, default_ms=theirs.median, timed=timed)
    if faster and not isinstance(choice, Library) and best.choice != default:
        faster = mine.median / theirs.median < best.ms / best.default_ms
    if faster:
        best = Entry(job.op, job.problem, choice, mine.median, theirs.median, _finite(verdict.ratio), timed)
    gain = best.default_ms / best.ms if best.ms else 1.0
    report.best(f"{describe(best.choice)}, {best.ms:.4f} ms, {gain:.2f}x the default")
    return best


def _raced(job: Job, choice: Choice, against: Choice, tools: Tools) -> tuple[Stats, Stats]:
    """Times of both; Inconclusive where there is no memory for them."""
    try:
        mine, theirs = tools.race(job, choice, against)
    except Exception as error:
        if _is_out_of_memory(error):
            raise Inconclusive(f"{describe(choice)} cannot be timed: {_first_line(error)}") from error
        raise
    return summarise(mine), summarise(theirs)


def _judged(job: Job, contender: Contender, tools: Tools) -> Verdict:
    """The parity gate's verdict, which is no for what does not compile or run; may be Inconclusive."""
    name = describe(contender.choice)
    try:
        reason = contender.compiled.result()
    except CancelledError as error:
        raise Inconclusive(f"{name} was not compiled: it was given up") from error
    except Exception as error:  # of the compiler's processes
        raise Inconclusive(f"{name} was not compiled: {_first_line(error)}") from error
    if reason is not None:
        return Verdict(False, math.inf, f"does not compile: {reason}")
    try:
        verdict = tools.check(job, contender.choice)
    except DeviceLost:
        raise
    except Exception as error:  # whatever else a launch says is this candidate's result
        if _is_out_of_memory(error):
            raise Inconclusive(f"{name} cannot be checked: {_first_line(error)}") from error
        return Verdict(False, math.inf, f"does not run: {_first_line(error)}")
    return verdict if verdict.ok else Verdict(False, verdict.ratio, f"fails parity: {verdict.reason}")


def _is_out_of_memory(error: Exception) -> bool:
    """Also as drivers say it ("CUDA error: out of memory"), when a kernel is loaded or a graph recorded."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and "out of memory" in str(error).lower())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

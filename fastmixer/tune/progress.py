"""What the tuner shows while it runs: a progress bar where rich is installed, plain lines otherwise."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from fastmixer.tune.jobs import Job
from fastmixer.tune.loop import Report


@contextlib.contextmanager
def report(stream: TextIO | None = None) -> Iterator[Report]:
    """A report on ``stream``, by default stderr: with a bar if that is a terminal and rich is there."""
    stream = stream or sys.stderr
    try:
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
    except ImportError:
        yield Lines(stream)
        return
    console = Console(file=stream)
    if not console.is_terminal:
        yield Lines(stream)
        return
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(progress)


class Lines(Report):
    """A line for every job and every better choice."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._best = stream, ""

    def job(self, job: Job, place: int, total: int) -> None:
        self._best = ""
        self.say(f"[{place + 1}/{total}] {job}")

    def best(self, text: str) -> None:
        if text != self._best:
            self._best = text
            self.say(f"  best so far: {text}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class Bar(Report):
    """One bar over all jobs, with the job and its best so far; lines that stay go above it."""

    def __init__(self, progress) -> None:  # rich.progress.Progress
        self._progress = progress
        self._task = progress.add_task("tuning", total=None)
        self._job = ""

    def job(self, job: Job, place: int, total: int) -> None:
        from rich.markup import escape

        self._job = escape(str(job))
        self._progress.update(self._task, description=self._job, completed=place, total=total, refresh=True)

    def best(self, text: str) -> None:
        from rich.markup import escape

        self._progress.update(self._task, description=f"{self._job}: {escape(text)}", refresh=True)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

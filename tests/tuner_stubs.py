"""A tuner without a GPU: jobs, and tools whose times are made up. Also a program, for a process of its own.

``python tuner_stubs.py forward|backward N`` tunes JOBS in that order, and hangs at the N-th.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest

from fastmixer.configs import TARGETS, Library, TileConfig, tables
from fastmixer.tune.command import tune
from fastmixer.tune.jobs import jobs
from fastmixer.tune.trial import Rejected

SLUG = "sample-gpu"
TARGET = replace(TARGETS["sm_90"], name=SLUG)
JOBS = jobs(["B/16"], [1, 8], ["bfloat16"], TARGET, ops=["channel_fc1", "channel_fc2", "token_mixing"])
DEFAULT, FAST, FASTER, SLOW = (TileConfig(16, 16 << i, 16) for i in range(4))
MILLISECONDS = {DEFAULT: 2.0, FAST: 1.5, FASTER: 1.0, SLOW: 3.0, Library.ATEN: 2.5}


@contextlib.contextmanager
def own_tables(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No shipped table, and a user's folder of its own; the user's file of SLUG."""
    shipped = folder / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    monkeypatch.setenv("FASTMIXER_CACHE_DIR", str(folder / "cache"))
    tables.table_of.cache_clear()
    yield tables.user_path(SLUG)
    tables.table_of.cache_clear()


class Silent:
    """A report that remembers what it was told."""

    def __init__(self) -> None:
        self.jobs, self.bests, self.lines = [], [], []

    def job(self, job, place, total) -> None:
        self.jobs.append((job, place, total))

    def best(self, text) -> None:
        self.bests.append(text)

    def say(self, text) -> None:
        self.lines.append(text)


def done(value: object) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


def raising(error: Exception) -> Future:
    future: Future = Future()
    future.set_exception(error)
    return future


def given_up() -> Future:
    future: Future = Future()
    future.cancel()
    return future


ABORTS = 16  # candidates so wide end their process


def compile_or_abort(op, problem, choice, target) -> str | None:
    """For a worker process."""
    if choice.block_m == ABORTS:
        os.abort()
    return "too large" if choice.block_m > 256 else None


class StubTools:
    """Choices with known times. Records into the real table of SLUG.

    choices: the default first. uncompilable, wrong: choice -> why; failing: choice -> what its race
    raises. spread: of the times, each way.
    on_race: called with the job before each race.
    """

    def __init__(
        self, choices=(DEFAULT, SLOW, FAST), on_race=lambda job: None, spread=0.01, milliseconds=None
    ):
        self.choices, self.on_race, self.spread = choices, on_race, spread
        self.milliseconds = milliseconds or MILLISECONDS
        self.uncompilable, self.wrong, self.failing = {}, {}, {}
        self.prepared, self.checked, self.raced = [], [], []
        self.lost = False

    def recorded(self, job):
        return tables.source(*job[:2], TARGET)

    def prepare(self, job):
        self.prepared.append(job)
        return {choice: done(self.uncompilable.get(choice)) for choice in self.choices}

    def check(self, job, choice):
        self.checked.append((job, choice))
        if choice in self.wrong:
            raise Rejected(f"fails parity: {self.wrong[choice]}")
        return 0.9

    def race(self, job, choice, against):
        self.on_race(job)
        if choice in self.failing:
            raise self.failing[choice]
        self.raced.append((job, choice, against))
        return tuple(
            [self.milliseconds[c] * (1 + self.spread * i) for i in range(-5, 6)] for c in (choice, against)
        )

    def is_lost(self):
        return self.lost

    def record(self, entry):
        tables.record(SLUG, entry, "Sample GPU")


def main(order: str, hang_at: int) -> int:
    todo = JOBS if order == "forward" else JOBS[::-1]

    def hang(job) -> None:
        if todo.index(job) == hang_at:
            print("hangs", flush=True)
            time.sleep(300)

    print("starts", flush=True)
    summary = tune(todo, StubTools(on_race=hang), Silent())
    return 0 if summary.ok else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))

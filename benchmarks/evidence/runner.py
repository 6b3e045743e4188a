"""Runs stages, each a process group of its own with a limit: who fails, hangs or dies costs only itself."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .plan import Stage

TICK = 0.5  # seconds between two looks at what runs
REPORT_EVERY = 10.0  # seconds
LEAST = 10.0  # seconds; with less no stage is begun
POLITE, HARD = 4.0, 2.0  # seconds that a group gets after SIGINT and SIGKILL
TAIL = 2000  # bytes of a log that its outcome holds

RUNNING, OK, LATE, CUT, NO_TIME = "running", "ok", "timed out", "cut short", "no time"
NOT_HERE = "not in this installation"


@dataclass
class Runner:
    """Runs stages one after the other, those of the background beside the others.

    end: when all must be over, by ``time.monotonic()``. grace: seconds that the background gets before
    something is timed. report: called now and then, and after every stage. outcomes: by name, of the stages
    so far: state, seconds, limit, and the tail of the log.
    """

    logs: Path
    folder: Path
    environment: Mapping[str, str]
    end: float
    grace: float = 20.0
    report: Callable[[], None] = lambda: None
    outcomes: dict[str, dict[str, object]] = field(default_factory=dict)
    _running: dict[subprocess.Popen, tuple[Stage, float, float]] = field(default_factory=dict)
    _reported: float = field(default_factory=time.monotonic)

    def run(self, stages: Sequence[Stage]) -> None:
        """Runs all that find time. KeyboardInterrupt ends what runs, and goes on to the caller."""
        try:
            for index, stage in enumerate(stages):
                later = sum(s.seconds for s in stages[index + 1 :] if not s.background)
                self._begin(stage, later)
            self._settle(self._left())
        finally:
            self._settle(0.0)

    def _begin(self, stage: Stage, later: float) -> None:
        """Runs a stage to its end, or in the background begins it.

        It may use what earlier stages left of their time, up to as much again, if for the ``later`` seconds
        of those after it enough is left; the last one may use all.
        """
        if stage.needs_tests and not (self.folder / "tests").is_dir():
            self._note(stage, NOT_HERE)
            return
        if stage.timed:
            self._settle(min(self.grace, self._left()))
        most = min(self._left() - later, 2 * stage.seconds) if later else self._left()
        limit = min(max(stage.seconds, most), self._left())
        if limit < min(LEAST, stage.seconds):
            self._note(stage, NO_TIME)
            return
        print(f"== {stage.name}: {limit:.0f} s at most, {self._left():.0f} s left", flush=True)
        with open(self._log(stage), "wb") as file:
            process = subprocess.Popen(
                stage.arguments(limit), cwd=self.folder, env={**self.environment, **stage.environment},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._running[process] = stage, limit, time.monotonic()
        self._note(stage, RUNNING, limit=limit)
        while not stage.background and process in self._running:
            self._tick()

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _log(self, stage: Stage) -> Path:
        return self.logs / f"{stage.name}.log"

    def _settle(self, patience: float) -> None:
        """Waits for what runs in the background, and ends it when patience does."""
        until = time.monotonic() + patience
        while self._running and time.monotonic() < until:
            self._tick()
        while self._running:
            self._finish(next(iter(self._running)), CUT)

    def _tick(self) -> None:
        """Waits a little, and finishes those that have ended or must."""
        time.sleep(TICK)
        for process, (_, limit, began) in list(self._running.items()):
            if process.poll() is not None or time.monotonic() - began > limit:
                self._finish(process, LATE)
        if time.monotonic() - self._reported > REPORT_EVERY:
            self._reported = time.monotonic()
            self.report()

    def _finish(self, process: subprocess.Popen, otherwise: str) -> None:
        """Ends the process's group. Its state: what it ended with by itself, or ``otherwise``."""
        stage, limit, began = self._running[process]
        code, seconds = process.poll(), time.monotonic() - began
        end_group(process)
        del self._running[process]
        tail = self._log(stage).read_bytes()[-TAIL:].decode(errors="replace")
        self._note(stage, otherwise if code is None else state_of(code), seconds, limit, tail)
        self.report()

    def _note(
        self, stage: Stage, state: str, seconds: float = 0.0, limit: float = 0.0, tail: str = ""
    ) -> None:
        figures = {"seconds": round(seconds, 1), "limit": round(limit, 1)}
        self.outcomes[stage.name] = {"state": state, **figures, "tail": tail}


def state_of(code: int) -> str:
    """What an exit code is called: "ok", "exit 1", "signal 6"."""
    return OK if code == 0 else f"exit {code}" if code > 0 else f"signal {-code}"


def end_group(process: subprocess.Popen) -> None:
    """First so that results are written, then, with children left behind, at once."""
    for number, patience in ((signal.SIGINT, POLITE), (signal.SIGKILL, HARD)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue

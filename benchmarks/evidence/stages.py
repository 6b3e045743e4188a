"""A stage's process: ``python -m fastmixer.benchmarks.evidence.stages NAME DIR [--dry-run]``."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from .task import Task

# What runs of which module: each imports what it needs in its own process.
RUN = {
    "environment": "machine.run",
    "warm": "warm.triton",
    "inductor": "warm.inductor",
    "smoke": "smoke.run",
    "api": "api.run",
    "ncu": "tools.ncu",
    "profiled": "tools.profiled",
    "sanitizer": "tools.sanitizer",
    "memcheck": "tools.memcheck",
    "racecheck": "tools.racecheck",
    "hang": "stages.hang",
    "crash": "stages.crash",
}


def main(argv: list[str] | None = None) -> int:
    """Runs one stage, or with ``--group`` some cases of "smoke", and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmixer.benchmarks.evidence.stages")
    parser.add_argument("name", choices=RUN)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--group", nargs=2, type=int, metavar=("GROUP", "POSITION"))
    options = parser.parse_args(argv)
    task = Task(options.name, options.out, options.dry_run)
    if options.group:
        from . import smoke

        return smoke.run_group(task, *options.group)
    module, _, function = RUN[options.name].partition(".")
    return getattr(importlib.import_module(f".{module}", __package__), function)(task)


def hang(task: Task) -> int:
    """Of the dry run: ends by no polite signal, and has a child that would outlive it."""
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(600)
    return 0


def crash(task: Task) -> int:
    """Of the dry run: dies as a process does whose compiler aborts."""
    print("the planned crash", flush=True)
    os.abort()


if __name__ == "__main__":
    sys.exit(main())

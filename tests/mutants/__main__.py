"""Breaks the code on purpose, one edit at a time, and asks the tests named beside it whether they notice.

    python -m tests.mutants                                # all of them: minutes on 2 cores
    python -m tests.mutants kernels/mlp.py accumulator     # those whose path and bug have all these words
    python -m tests.mutants --some 16 --draws 36ddffe      # so many, drawn; CI gives the commit

Mutants are applied to copies of the repository. One is killed if a test fails, if the process crashes, or if
it takes longer than ``--limit``: a bug may hang. The exit status is 1 if one survives that must not, if one
that is listed as a survivor is killed, or if something else went wrong: then nothing is claimed.

No mutation tool is used: they edit Python by grammar, where a kernel's real bugs are a mask, a stride, a
dtype; and those that import a mutant as a function cannot show its source to Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from fastmixer.usage import positive, seconds

from .mutant import ROOT, Mutant, committed

# What pytest's exit status says of a mutant. A kernel that writes anywhere may end the process.
KILLED_BY = {1: "a test", None: "the limit", -signal.SIGSEGV: "a crash", -signal.SIGABRT: "a crash"}
KILLED_BY |= {-signal.SIGBUS: "a crash", -signal.SIGFPE: "a crash", -signal.SIGILL: "a crash"}
ALONE = 120  # seconds that the tests without a mutant have at least, whatever the limit
_running: set[subprocess.Popen] = set()


class Ran(NamedTuple):
    """pytest's exit status, a signal's number negated, or None: stopped at the limit."""

    status: int | None
    seconds: float
    output: str


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    mutants = [m for m in committed() if all(word in str(m) for word in arguments.words)]
    if arguments.some is not None:
        mutants = random.Random(arguments.draws).sample(mutants, min(arguments.some, len(mutants)))
    if not mutants:
        print("no mutant's path and bug have all of these words")
        return 1
    return run(mutants, ROOT, arguments.jobs, arguments.limit)


def run(mutants: Sequence[Mutant], root: Path, jobs: int, limit: float) -> int:
    """Tries mutants of the repository at ``root``, ``jobs`` at a time; 1 if one is not what it should be."""
    began, verdicts = time.perf_counter(), Counter()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Path] = SimpleQueue()
        for number in range(min(jobs, len(mutants))):
            copies.put(_copied(root, Path(folder, str(number))))
        tests = list(dict.fromkeys(name for mutant in mutants for name in mutant.tests))
        with _taken(copies) as copy:
            parallel = [] if jobs == 1 else ["-n", str(jobs), "--dist", "worksteal"]
            ran = _pytest(copy, [*parallel, *tests], max(ALONE, limit * len(tests)))
        print(f"all their tests without a mutant: {ran.seconds:.0f} s", flush=True)
        if ran.status != 0:
            print(ran.output, f"they do not pass without one: pytest gave {ran.status}", sep="\n")
            return 1
        pool, edits = ThreadPoolExecutor(jobs), itertools.count(1)
        try:
            running = {pool.submit(_try, mutant, next(edits), copies, limit): mutant for mutant in mutants}
            for done in as_completed(running):
                mutant, ran = running[done], done.result()
                verdict = _verdict(mutant, ran)
                verdicts[verdict] += 1
                print(f"{verdict:<20} {ran.seconds:5.1f} s  {mutant}", flush=True)
                if verdict == "NOT TRIED":
                    print(ran.output, flush=True)
        finally:  # after Ctrl-C, too
            pool.shutdown(wait=False, cancel_futures=True)
            for process in tuple(_running):
                _end(process)
            pool.shutdown()
    counted = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
    print(f"{len(mutants)} mutants: {counted}; {time.perf_counter() - began:.0f} s")
    return 1 if any(verdict.isupper() for verdict in verdicts) else 0


def _verdict(mutant: Mutant, ran: Ran) -> str:
    """In capitals what must not be."""
    if ran.status == 0:
        return "survives as listed" if mutant.survives else "SURVIVED"
    if ran.status not in KILLED_BY:
        return "NOT TRIED"
    return "KILLED, NOT LISTED" if mutant.survives else f"killed by {KILLED_BY[ran.status]}"


def _try(mutant: Mutant, edit: int, copies: SimpleQueue[Path], limit: float) -> Ran:
    with _taken(copies) as copy:
        path = copy / mutant.path
        source, before = path.read_text(), path.stat()
        try:
            path.write_text(mutant.applied(source))
            # Python takes a cached module for current by its size and the second of its edit: no two alike.
            os.utime(path, (edit, edit))
            return _pytest(copy, mutant.tests, limit)
        finally:
            path.write_text(source)
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@contextlib.contextmanager
def _taken(copies: SimpleQueue[Path]) -> Iterator[Path]:
    copy = copies.get()
    try:
        yield copy
    finally:
        copies.put(copy)


def _pytest(copy: Path, arguments: Sequence[str], limit: float) -> Ran:
    """Runs pytest in a copy, up to the first failure."""
    environment = os.environ | {"PYTHONPATH": str(copy)}
    environment.pop("PYTEST_ADDOPTS", None)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=copy, env=environment, stdout=output, stderr=output, start_new_session=True
        )
        _running.add(process)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
            _running.discard(process)
        output.seek(0)
        return Ran(status, time.perf_counter() - began, output.read()[-4000:])


def _end(process: subprocess.Popen) -> None:
    """Ends the process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _copied(root: Path, copy: Path) -> Path:
    """A copy of what git tracks, or would track, as it is now."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (root / name).is_file():  # not one that was deleted
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    return copy


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="only mutants whose path and bug have all of them")
    parser.add_argument("--some", type=positive, metavar="N", help="only N of them, drawn")
    parser.add_argument("--draws", default="0", metavar="SEED", help="which are drawn: any word")
    parser.add_argument("--jobs", type=positive, default=os.cpu_count() or 1, metavar="N", help="at a time")
    parser.add_argument("--limit", type=seconds, default=300.0, metavar="TIME", help="for a mutant's tests")
    return parser


if __name__ == "__main__":
    sys.exit(main())

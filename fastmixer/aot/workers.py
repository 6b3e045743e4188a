"""Worker processes that compile: fresh ones without ``TRITON_INTERPRET``, whatever this process has."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

MAX_WORKERS = 8  # a worker holds torch and Triton: about 0.5 GB and some seconds to start


def default_workers() -> int:
    """One per CPU, up to MAX_WORKERS."""
    return min(os.cpu_count() or 1, MAX_WORKERS)


def worker_pool(jobs: int | None = None, *, interruptible: bool = True) -> ProcessPoolExecutor:
    """A pool of ``jobs`` processes, by default ``default_workers``. ``interruptible``: Ctrl-C ends them."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs or default_workers(), context, _start, (interruptible,))


def _start(interruptible: bool) -> None:
    if not interruptible:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print must not mix with the report

"""Worker processes that compile: fresh ones without ``TRITON_INTERPRET``, whatever this process has."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor

MAX_WORKERS = 8  # a worker holds torch and Triton: about 0.5 GB and some seconds to start


def worker_pool(jobs: int | None = None) -> ProcessPoolExecutor:
    """A pool of ``jobs`` processes; by default one per CPU, up to MAX_WORKERS."""
    jobs = jobs or min(os.cpu_count() or 1, MAX_WORKERS)
    return ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_start)


def _start() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print must not mix with the report

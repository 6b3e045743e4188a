"""The tuner's compiler: candidates become machine code in worker processes, through Triton's cache on disk.

The process that measures then finds them there: what is compiled is recorded from the real launcher on meta
tensors, down to the key in the cache (see ``aot``).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from fastmixer import configs
from fastmixer.configs import Choice, Problem, Target, TileConfig
from fastmixer.tune.jobs import first_line
from fastmixer.tune.trial import Trial

MAX_WORKERS = 8  # a worker holds torch and Triton: about 0.5 GB and some seconds to start
Compiling = dict[Choice, Future[str | None]]  # what ``Compiler.start`` returned, by choice


class Compiler:
    """Compiles for one target in ``jobs`` processes; close it to stop them.

    LLVM aborts the process on some internal errors. So every process is a pool of its own, fed by a thread of
    its own with one candidate at a time: no other candidate is lost with it.
    """

    def __init__(self, target: Target, jobs: int | None = None) -> None:
        from fastmixer.aot.compile import compiles_ahead  # and with it triton

        self._target, self._closed = target, False
        self.compiles_ahead = compiles_ahead(target)
        self._own = threading.local()  # each thread's pool, whose process ends with the thread
        jobs = jobs or min(os.cpu_count() or 1, MAX_WORKERS)
        self._threads = ThreadPoolExecutor(jobs, initializer=self._renew_pool)

    def _renew_pool(self) -> None:
        self._own.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start_worker)

    def start(self, op: str, problem: Problem, choice: Choice) -> Future[str | None]:
        """Starts to compile; the result is None, or why ``choice`` does not compile or fit the target.

        The future is cancelled, or has an exception, where neither is known.
        """
        if isinstance(choice, TileConfig) and self.compiles_ahead:
            return self._threads.submit(self._compile, op, problem, choice, self._target)
        nothing: Future[str | None] = Future()
        nothing.set_result(None)  # a library is compiled, and so are the kernels of a half by now
        return nothing

    def _compile(self, *work: object) -> str | None:
        for _ in range(2):  # a process may also have died while it had nothing to do
            try:
                return self._own.pool.submit(compile_choice, *work).result()
            except BrokenProcessPool as error:
                if self._closed:
                    raise
                died = error
                self._renew_pool()
        return f"a compiler process died twice, the second time with nothing else in it: {died}"

    def close(self) -> None:
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)


# In the worker processes.


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print must not mix with the report


def compile_choice(op: str, problem: Problem, choice: TileConfig, target: Target) -> str | None:
    """Compiles the op's launch with ``choice``; None, or why it does not compile or fit.

    Raises MemoryError and OSError, a full disk for one: they say nothing about ``choice``.
    """
    from fastmixer.aot.compile import compile_launch  # triton reads TRITON_INTERPRET when it is imported

    try:
        trial = Trial(op, problem, target, torch.device("meta"), configs.select)
        compiled = compile_launch(trial.own_launch(choice), target)
    except (MemoryError, OSError):
        raise
    except Exception as error:  # whatever the compiler says is the result: it becomes the report's
        return first_line(error)
    if compiled.fits:
        return None
    return (
        f"does not fit: {compiled.shared_memory} bytes of shared memory where a program may use "
        f"{compiled.shared_memory_limit}, {compiled.registers} registers x {compiled.num_warps} warps"
    )

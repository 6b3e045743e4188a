"""The tuner's compiler: candidates become machine code in worker processes, through Triton's cache on disk.

The process that measures then finds them there: what is compiled is recorded from the real launcher on meta
tensors, down to the key in the cache (see ``aot``).
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from fastmixer import configs
from fastmixer.aot.workers import default_workers, worker_pool
from fastmixer.configs import Choice, Problem, Target, TileConfig
from fastmixer.configs.resources import MULTIPROCESSORS
from fastmixer.tune.jobs import first_line
from fastmixer.tune.trial import Trial

Compiling = dict[Choice, Future[str | None]]  # what ``Compiler.start`` returned, by choice


class Compiler:
    """Compiles for one target in ``jobs`` processes; close it to stop them.

    LLVM aborts the process on some internal errors. So every process is a pool of its own, fed by a thread of
    its own with one candidate at a time: no other candidate is lost with it.
    """

    def __init__(self, target: Target, jobs: int | None = None) -> None:
        self._target, self._closed = target, False
        self.compiles_ahead = target.arch in MULTIPROCESSORS  # elsewhere candidates compile when they run
        self._own = threading.local()  # each thread's pool, whose process ends with the thread
        self._threads = ThreadPoolExecutor(jobs or default_workers(), initializer=self._renew_pool)

    def _renew_pool(self) -> None:
        self._own.pool = worker_pool(1, interruptible=False)  # Ctrl-C is the parent's to answer

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


def compile_choice(op: str, problem: Problem, choice: TileConfig, target: Target) -> str | None:
    """Compiles the op's launch with ``choice``; None, or why it does not compile or fit. Run in a worker.

    Raises MemoryError and OSError, a full disk for one: they say nothing about ``choice``.
    """
    from fastmixer.aot.compile import compile_launch, why_not_fits  # triton reads TRITON_INTERPRET at import

    try:
        trial = Trial(op, problem, target, torch.device("meta"), configs.select)
        return why_not_fits(compile_launch(trial.own_launch(choice), target))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # whatever the compiler says is the result: it becomes the report's
        return first_line(error)

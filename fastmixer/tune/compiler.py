"""The tuner's compiler: candidates become machine code in worker processes, through Triton's cache on disk.

The process that measures then finds them there: what is compiled is recorded from the real launcher on meta
tensors, down to the key in the cache (see ``aot``).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from fastmixer.aot.compile import compiles_ahead
from fastmixer.configs import Problem, Target, TileConfig
from fastmixer.configs.problem import Choice

MAX_WORKERS = 8  # a worker holds torch and Triton: about 0.5 GB and some seconds to start


class Compiler:
    """Compiles for one target in ``jobs`` processes; close it to stop them.

    LLVM aborts the process on some internal errors, and with it goes all that the pool had yet to compile.
    Each of those is compiled once more, alone in a process: who dies there has done it itself.
    """

    def __init__(self, target: Target, jobs: int | None = None) -> None:
        self._target, self._jobs = target, jobs or min(os.cpu_count() or 1, MAX_WORKERS)
        self._pool = self._new_pool(self._jobs)
        self._lone_pool = self._new_pool(1)  # pools start their processes when they get work
        self._retries = ThreadPoolExecutor(1)

    def _new_pool(self, jobs: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)

    def start(self, op: str, problem: Problem, choice: Choice) -> Future[str | None]:
        """Starts to compile; the result is None, or why ``choice`` does not compile or fit the target.

        The future is cancelled, or has an exception, where neither is known.
        """
        outcome: Future[str | None] = Future()
        if not isinstance(choice, TileConfig) or not compiles_ahead(self._target):
            outcome.set_result(None)  # a library is compiled, and so are the kernels of a half by now
            return outcome
        work = (op, problem, choice, self._target)
        try:
            running = self._pool.submit(compile_choice, *work)
        except BrokenProcessPool:  # by what came before
            self._pool = self._new_pool(self._jobs)
            running = self._pool.submit(compile_choice, *work)
        running.add_done_callback(lambda done: self._finish(done, outcome, work))
        return outcome

    def _finish(self, done: Future[str | None], outcome: Future[str | None], work: tuple) -> None:
        if done.cancelled() or not isinstance(done.exception(), BrokenProcessPool):
            _pass_on(done, outcome)
            return
        try:
            again = self._retries.submit(self._compile_alone, work)
        except RuntimeError:  # closed meanwhile
            outcome.cancel()
            return
        again.add_done_callback(lambda done: _pass_on(done, outcome))

    def _compile_alone(self, work: tuple) -> str | None:
        try:
            running = self._lone_pool.submit(compile_choice, *work)
        except BrokenProcessPool:  # while it had nothing to do
            self._lone_pool = self._new_pool(1)
            running = self._lone_pool.submit(compile_choice, *work)
        try:
            return running.result()
        except BrokenProcessPool as error:
            self._lone_pool = self._new_pool(1)
            return f"a compiler process died twice, the second time with nothing else in it: {error}"

    def close(self) -> None:
        for pool in (self._retries, self._pool, self._lone_pool):
            pool.shutdown(wait=False, cancel_futures=True)


def _pass_on(done: Future[str | None], outcome: Future[str | None]) -> None:
    if done.cancelled():
        outcome.cancel()
    elif error := done.exception():
        outcome.set_exception(error)
    else:
        outcome.set_result(done.result())


# In the worker processes.


def _start_worker() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print must not mix with the report


def compile_choice(op: str, problem: Problem, choice: TileConfig, target: Target) -> str | None:
    """Compiles the op's launches with ``choice``; None, or why they do not compile or fit.

    Raises MemoryError and OSError, a full disk for one: they say nothing about ``choice``.
    """
    import torch

    from fastmixer import configs
    from fastmixer.aot.compile import compile_launch
    from fastmixer.tune.trial import Trial

    try:
        trial = Trial(op, problem, target, torch.device("meta"), configs.select)
        compiled = [compile_launch(item, target) for item in trial.launches(choice)]
    except (MemoryError, OSError):
        raise
    except Exception as error:  # whatever the compiler says is the result: it becomes the report's
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if all(one.fits for one in compiled):
        return None
    worst = max(compiled, key=lambda one: one.shared_memory)
    return (
        f"does not fit: {worst.shared_memory} bytes of shared memory where a program may use "
        f"{worst.shared_memory_limit}, {worst.registers} registers x {worst.num_warps} warps"
    )

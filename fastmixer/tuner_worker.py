"""The tuner's compiler: candidates become machine code in worker processes, through Triton's cache on disk.

The process that measures then finds them there: what is compiled is recorded from the real launcher on meta
tensors, down to the key in the cache (see ``aot``).
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from .configs import Problem, Target, TileConfig
from .configs.tiles import Choice

MAX_WORKERS = 8  # a worker holds torch and Triton: about 0.5 GB and some seconds to start


class Compiler:
    """Compiles for one target in ``jobs`` processes; close it to stop them."""

    def __init__(self, target: Target, jobs: int | None = None) -> None:
        self._target, self._jobs = target, jobs or min(os.cpu_count() or 1, MAX_WORKERS)
        self._pool = self._new_pool()

    def _new_pool(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._jobs, mp_context=context, initializer=_start_worker)

    def start(self, op: str, problem: Problem, choice: Choice) -> Future[str | None]:
        """Starts to compile; the result is None, or why ``choice`` does not compile or fit the target."""
        outcome: Future[str | None] = Future()
        if not isinstance(choice, TileConfig):
            outcome.set_result(None)  # a library is compiled, and so are the kernels of a half by now
            return outcome
        work = (op, problem, choice, self._target)
        try:
            running = self._pool.submit(compile_choice, *work)
        except BrokenProcessPool:  # LLVM aborts the process on some internal errors: the others go on
            self._pool = self._new_pool()
            running = self._pool.submit(compile_choice, *work)
        running.add_done_callback(lambda done: outcome.set_result(_reason(done)))
        return outcome

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _reason(done: Future[str | None]) -> str | None:
    if done.cancelled():
        return "it was given up"
    error = done.exception()
    return done.result() if error is None else f"a compiler process died: {error}"


# In the worker processes.


def _start_worker() -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what compilers print must not mix with the report


def compile_choice(op: str, problem: Problem, choice: TileConfig, target: Target) -> str | None:
    """Compiles the op's launches with ``choice``; None, or why they do not compile or fit."""
    import torch

    from . import configs
    from .aot import compile_launch
    from .tuner_trial import Trial

    try:
        trial = Trial(op, problem, target, torch.device("meta"), configs.select)
        compiled = [compile_launch(item, target) for item in trial.launches(choice)]
    except Exception as error:  # whatever the compiler says is the result: it becomes the report's
        return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    if all(one.fits for one in compiled):
        return None
    worst = max(compiled, key=lambda one: one.shared_memory)
    return (
        f"does not fit: {worst.shared_memory} bytes of shared memory where a program may use "
        f"{worst.shared_memory_limit}, {worst.registers} registers x {worst.num_warps} warps"
    )

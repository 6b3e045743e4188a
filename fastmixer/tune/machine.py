"""What the tuner's loop needs of the machine: candidates, compiled, checked, timed and recorded.

Candidates become machine code in worker processes, through Triton's cache on disk, where this process finds
it: what is compiled is recorded from the real launcher on meta tensors, down to the key in the cache.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch

from fastmixer import configs, timing
from fastmixer.aot.workers import default_workers, worker_pool
from fastmixer.configs import Choice, Library, Problem, Target, TileConfig, device_data, tables
from fastmixer.configs.designs import candidates, designs_of
from fastmixer.configs.ops import HALVES, libraries
from fastmixer.configs.predict import cost
from fastmixer.configs.resources import MULTIPROCESSORS
from fastmixer.timing import Call
from fastmixer.tune.jobs import Job, first_line
from fastmixer.tune.trial import Trial

PRUNE = 2.0  # what is predicted to take longer than so many times the best is not tried
MOST = 10  # tiles besides the default's
BURST_MS = 0.5  # about what a burst of calls takes, whose time is one figure
Compiling = dict[Choice, Future[str | None]]  # what ``Compiler.start`` returned, by choice


@dataclass
class MachineTools:
    """The loop's tools on one device."""

    target: Target  # its name is the table's slug
    device: torch.device  # a GPU, or in tests the CPU of Triton's interpreter
    start_compiling: Callable  # as ``Compiler.start``
    _trial: Trial | None = None

    def recorded(self, job: Job) -> str | None:
        """Which table has a choice, "shipped" or "user", as the files are now: others may be tuning too."""
        return tables.source(job.op, job.problem, self.target)

    def prepare(self, job: Job) -> Compiling:
        """The default first, then what may be faster; starts to compile all of them and does not wait."""
        choices = contenders(job, self.target)
        return {choice: self.start_compiling(job.op, job.problem, choice) for choice in choices}

    def check(self, job: Job, choice: Choice) -> float:
        """As ``Trial.check``."""
        return self._trial_of(job).check(choice)

    def race(self, job: Job, choice: Choice, against: Choice) -> Sequence[list[float]]:
        """Milliseconds of calls of both, measured in alternation."""
        timed, trial = timed_as(job.op, choice, against), self._trial_of(job)
        # Whole halves as a caller without graphs sees them: PyTorch launches faster than Triton does.
        calls = [trial.calls(one, timed) for one in (choice, against)]
        return time_in_turn(calls, graphs=job.op not in HALVES)

    def is_lost(self) -> bool:
        """Whether the device answers no more."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        except RuntimeError:
            return True
        return False

    def record(self, entry: tables.Entry) -> None:
        """Keeps a choice, durably."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.target.name
        tables.record(self.target.name, entry, name)

    def _trial_of(self, job: Job) -> Trial:
        """One at a time: its tensors may be a good part of the GPU's memory."""
        op, problem, _ = job
        if self._trial is None or (self._trial.op, self._trial.problem) != (op, problem):
            self._trial = None
            bytes_each = 2 * math.prod(problem[:3]) * problem.x_dtype.itemsize  # x and the output
            copies = cold_copies(bytes_each, self.device, self.target)
            # A kernel among the defaults it was compiled beside; a half of what is tuned by now.
            select = configs.choose if op in HALVES else configs.select
            self._trial = Trial(op, problem, self.target, self.device, select, copies)
        return self._trial


def cold_copies(bytes_each: int, device: torch.device, target: Target, most: int = 128) -> int:
    """``timing.cold_copies``, at most ``most``."""
    known = device_data(target)  # MI300X reports 4 MB of L2 and has 256 MB of Infinity Cache behind it
    return min(most, timing.cold_copies(bytes_each, device, known.l2 if known else 0))


def time_in_turn(
    contenders: Sequence[Sequence[Call]], *, graphs: bool, rounds: int = 20
) -> list[list[float]]:
    """Milliseconds per call, one figure per burst; contenders take turns, in another order each round.

    A burst lasts about BURST_MS and goes through all of a contender's calls, which differ in their inputs:
    what one left in L2 is gone when its turn comes again. With graphs a burst is one CUDA graph, which has
    the GPU's own time; without, calls are enqueued without waiting, and take the GPU's time or the host's to
    launch them, whichever is longer: what a caller sees in a steady loop.
    """
    bursts = {}
    for index, calls in enumerate(contenders):
        _run(calls)  # compiles, loads and packs
        one_round = _elapsed(functools.partial(_run, calls))
        repetitions = max(1, min(100, round(BURST_MS / max(one_round, 1e-3))))
        repeated = [*calls] * repetitions
        run = timing.capture(repeated)[0].replay if graphs else functools.partial(_run, repeated)
        count = len(repeated)
        bursts[index] = lambda run=run, count=count: [_elapsed(run) / count]
    times = timing.alternate(bursts, rounds=rounds + 1)
    return [milliseconds[1:] for milliseconds in times.values()]  # the first round warms up


def _run(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _elapsed(burst: Call) -> float:
    """Milliseconds of a burst on a device that has nothing else to do."""
    torch.cuda.synchronize()
    return timing.event_times([burst])[0]


def timed_as(op: str, *choices: Choice) -> str:
    """What a race compares: each op's own launch ("kernel") or, with PyTorch in it, all of the "half"."""
    return "half" if op in HALVES or any(isinstance(choice, Library) for choice in choices) else "kernel"


def contenders(job: Job, target: Target) -> list[Choice]:
    """The default, every design, the candidates that the cost model does not rule out, and PyTorch's ways."""
    op, problem, _ = job
    default = configs.select(op, problem, target)
    if op in HALVES:
        return [default, None if default is Library.REFERENCE else Library.REFERENCE]
    every = (default, *candidates(op, problem, target))
    predictions = {choice: cost.predict_launch(op, problem, choice, target) for choice in every}
    seconds = {choice: one.seconds if one else math.inf for choice, one in predictions.items()}
    longest = PRUNE * min(seconds.values())
    # Every design, then the likeliest; what nothing is predicted of is kept, behind the others.
    designed = designs_of(op, problem, target).values()
    likeliest = sorted(seconds, key=lambda choice: (choice not in designed, seconds[choice]))
    kept = [c for c in likeliest if c in designed or seconds[c] <= longest or seconds[c] == math.inf]
    others = [choice for choice in kept if choice != default][:MOST]
    return [default, *others, *(library for library in libraries(op, problem) if library is not default)]


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

"""What the tuner's loop needs of the machine: candidates, compiled, checked, timed and recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastmixer import configs
from fastmixer.configs import Choice, Library, Target, tables
from fastmixer.configs.ops import HALVES, OPS
from fastmixer.configs.predict import cost
from fastmixer.configs.tiles import candidates
from fastmixer.tune.compiler import Compiling
from fastmixer.tune.jobs import Job
from fastmixer.tune.timer import cold_copies
from fastmixer.tune.trial import Trial

PRUNE = 2.0  # what is predicted to take longer than so many times the best is not tried
MOST = 8  # candidates besides the default


@dataclass
class MachineTools:
    """The loop's tools on one device."""

    target: Target  # its name is the table's slug
    device: torch.device  # a GPU, or in tests the CPU of Triton's interpreter
    start_compiling: Callable  # as ``Compiler.start``
    timer: Callable  # as ``CudaTimer``
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
        return self.timer(calls, graphs=job.op not in HALVES)

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


def timed_as(op: str, *choices: Choice) -> str:
    """What a race compares: each op's own launch ("kernel") or, with PyTorch in it, all of the "half"."""
    return "half" if op in HALVES or any(isinstance(choice, Library) for choice in choices) else "kernel"


def contenders(job: Job, target: Target) -> list[Choice]:
    """The default, the candidates that the cost model does not rule out, and PyTorch where it is a choice."""
    op, problem, _ = job
    default = configs.select(op, problem, target)
    if op in HALVES:
        return [default, None if default is Library.REFERENCE else Library.REFERENCE]
    every = (default, *candidates(op, problem, target))
    predictions = {choice: cost.predict_launch(op, problem, choice, target) for choice in every}
    seconds = {choice: one.seconds if one else math.inf for choice, one in predictions.items()}
    longest = PRUNE * min(seconds.values())
    # The likeliest first; what nothing is predicted of is kept, behind the others.
    likeliest = sorted(seconds, key=seconds.__getitem__)
    kept = [choice for choice in likeliest if seconds[choice] <= longest or seconds[choice] == math.inf]
    others = [choice for choice in kept if choice != default][:MOST]
    if op in OPS and OPS[op].library and default is not Library.ATEN:
        others.append(Library.ATEN)
    return [default, *others]

"""``python -m fastmixer tune``: the tuner's loop on the current GPU, and what it shows."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch

from fastmixer import configs, dispatch
from fastmixer.configs import tables
from fastmixer.tune.compiler import Compiler
from fastmixer.tune.jobs import DTYPES, check_names, jobs
from fastmixer.tune.loop import Report, tune
from fastmixer.tune.machine import MachineTools
from fastmixer.usage import UsageError, progress_bar


def run(
    models: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    backward: bool = False,
    ops: Sequence[str] = (),
    budget: float = math.inf,
    workers: int | None = None,
    force: bool = False,
) -> int:
    """Tunes on the current GPU and writes the user's table.

    Args:
        models, batches, dtypes, backward, ops: as for ``jobs.jobs``.
        budget: seconds.
        workers: compiler processes; by default one per CPU, up to ``workers.MAX_WORKERS``.
        force: make recorded choices again.

    Returns:
        The exit code: 1 if a default fails, a choice could not be made, the GPU is lost or the run was
        interrupted; 0 otherwise, also when the budget ends first.

    Raises:
        UsageError: an unknown model or op, no GPU that runs the kernels, or a table that cannot be written.
    """
    check_names(models, ops)
    if not torch.cuda.is_available():
        raise UsageError("tune needs a CUDA or ROCm GPU, and torch sees none: nothing was tuned")
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype in dtypes:
        if reason := dispatch.why_not_triton(device, *DTYPES[dtype]):
            raise UsageError(f"tune needs a GPU that runs the kernels in {dtype}: {reason}")
    target = configs.target_of(device)
    todo = jobs(models, batches, dtypes, target, backward=backward, ops=ops)
    try:
        path = tables.user_path(target.name)
        with tables.locked(path):  # before anything is measured in vain
            pass
    except OSError as error:
        raise UsageError(f"tune cannot write its table: {error}; set FASTMIXER_CACHE_DIR") from error
    with contextlib.closing(Compiler(target, workers)) as compiler, progress_bar("tuning") as bar:
        report = Report(bar)
        if not compiler.compiles_ahead:
            unknown = f"arch {target.arch}: unknown ahead of time"
            report.say(f"{unknown}, so candidates compile when they first run")
        tools = MachineTools(target, device, compiler.start)
        with torch.cuda.device(device):
            summary = tune(todo, tools, report, budget=budget, force=force)
    print("\n".join([*summary.lines(), f"table: {path}"]))
    return 0 if summary.ok else 1

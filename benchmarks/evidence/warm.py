"""The stages "warm" and "inductor": what is timed later is compiled now, beside the parity checks."""

from __future__ import annotations

import os
import time
from functools import partial

import torch

from fastmixer import configs
from fastmixer.aot import catalogue
from fastmixer.aot import compile as aot
from fastmixer.aot.workers import worker_pool
from fastmixer.configs.resources import MULTIPROCESSORS

from .task import Task

BATCHES = (256, 64, 1)
JOBS = 4  # processes; the checks of "smoke" want CPUs too
RIVALS = (("block", 256, "forward"), ("channel", 256, "forward"), ("token", 256, "forward"),
          ("block", 64, "forward"), ("block", 1, "forward"), ("block", 64, "forward_backward"),
          ("model", 256, "forward"), ("model", 64, "forward_backward"))  # fmt: skip


def triton(task: Task) -> int:
    """A B/16 block's kernels, forward and backward, into Triton's cache on disk, by the CPUs alone."""
    if task.dry:
        target, batches = configs.target_named("sm_90"), BATCHES[:1]
    else:
        target, batches = configs.target_of(torch.device("cuda", torch.cuda.current_device())), BATCHES
    if target.arch not in MULTIPROCESSORS:
        print("nothing is known of this GPU's arch: its kernels compile when they first run")
        return 0
    distinct: dict[str, tuple] = {}
    for batch in batches:
        for index, item in enumerate(_launches(target, batch)):
            distinct.setdefault(aot.code_key(item, target), (target, batch, index))
    jobs = list(distinct.values())[: 1 if task.dry else None]
    with worker_pool(min(JOBS, os.cpu_count() or 1, len(jobs))) as pool:
        futures = [pool.submit(_compile, *job) for job in jobs]
        return 0 if all([task.attempt("kernel", future.result) for future in futures]) else 1


def _launches(target: configs.Target, batch: int) -> list:
    """All that a B/16 block launches in bf16, in an order that is the same in every process."""
    case = catalogue.Case("B/16", catalogue.B16)
    recorders = catalogue.record, catalogue.record_training, catalogue.record_library
    return [item for recorder in recorders for item in recorder(case, target, batch)]


def _compile(target: configs.Target, batch: int, index: int) -> dict:
    """In a process of the pool."""
    begun = time.monotonic()
    launch = _launches(target, batch)[index]
    aot.compile_binary(launch, target)
    return {"kernel": launch.kernel.__name__, "seconds": round(time.monotonic() - begun, 1)}


def inductor(task: Task) -> int:
    """What torch.compile makes of the eager rivals, into Inductor's cache on disk."""
    rivals = [("block", 1, "forward")] if task.dry else RIVALS
    return task.attempt_all({" ".join(map(str, rival)): partial(_rival, task, *rival) for rival in rivals})


def _rival(task: Task, level: str, batch: int, direction: str) -> dict:
    from fastmixer.benchmarks import opponents

    begun = time.monotonic()
    torch._dynamo.reset()
    subject = task.subject(level, batch, direction)
    with torch.set_grad_enabled(subject.case.trains):
        if task.dry:  # without the minute that Inductor takes on a CPU
            torch.compile(subject.eager, backend="aot_eager")(subject.items[0])
        else:
            opponents.OPPONENTS["compile"].make(subject)(subject.items[0])
    del subject
    if not task.dry:
        torch.cuda.empty_cache()
    return {"seconds": round(time.monotonic() - begun, 1)}

"""The stage "api": what a user does with a fused model, each by itself, judged as bench judges."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch
from fastmixer.benchmarks import cells, levels, measure

import fastmixer

from .task import Task, judged

CALLS = 200  # of a block, for the host's time


def run(task: Task) -> int:
    """Notes every check; the exit code says whether all is well."""
    warnings.simplefilter("error", fastmixer.FallbackWarning)  # what quietly ran unfused would pass
    forward, step = (_subject(task, way) for way in ("forward", "forward_backward"))
    checks: dict[str, Callable[[], dict]] = {
        "inference, triton": lambda: _gate(forward),
        "gradients, triton": lambda: _gate(step),
        "gradients, triton, lean": lambda: _gate(step, memory="lean"),
        "host time of a block's call": lambda: _host_time(task),
    }
    if not task.dry:
        checks |= {
            "inference, auto": lambda: _gate(forward, backend="auto"),
            "gradients, auto": lambda: _gate(step, backend="auto"),
            "CUDA graph": lambda: _gate(forward, graph=True),
        }
    compiler = "aot_eager" if task.dry else "inductor"  # which cannot compile what the interpreter runs
    checks |= {
        "torch.compile": lambda: _gate(_compiled(forward, compiler)),
        "changed weights are seen": lambda: _after_a_change(step),
        "unfuse gives eager's bits": lambda: _unfused(forward),
    }
    return task.attempt_all(checks)


def _subject(task: Task, direction: str) -> levels.Subject:
    if not task.dry:
        return task.subject("model", 8, direction)
    case = levels.Case("model", "tiny", 2, "float32", direction, levels.Shape(4, 40, 20, 80, 2, 16))
    with torch.set_grad_enabled(case.trains):
        return levels.make_subject(case, task.device)


def _gate(
    subject: levels.Subject, *, backend: str = "triton", memory: str = "balanced", graph: bool = False
) -> dict:
    """The parity of the fused model, or of its CUDA graph's replay."""
    call = levels.make_call(subject.fused, subject.case, memory)
    with torch.set_grad_enabled(subject.case.trains), fastmixer.backend(backend):
        if graph:
            call = measure.Replay(call, subject.items).answer
        return judged(cells.gate(subject, call))


def _compiled(subject: levels.Subject, compiler: str) -> levels.Subject:
    return replace(subject, fused=torch.compile(subject.fused, fullgraph=True, backend=compiler))


def _after_a_change(subject: levels.Subject) -> dict:
    """The same after all weights changed in place, as an optimizer changes them: no packed copy is stale."""
    with torch.no_grad():
        for module in (subject.eager, subject.fused):
            for parameter in module.parameters():
                parameter.mul_(1.25)
    return _gate(subject)


def _unfused(subject: levels.Subject) -> dict:
    """Whether the model is what it was: its keys, and its answer to the bit."""
    x = subject.items[0]
    keys = list(subject.fused.state_dict()) == list(subject.eager.state_dict())
    fastmixer.unfuse(subject.fused)
    with torch.no_grad():
        same = torch.equal(subject.fused(x), subject.eager(x))
    return {"ok": keys and same, "keys": keys, "bits": same}


def _host_time(task: Task) -> dict:
    """Microseconds that a call of a B/16 block keeps the host, fused and eager; batch 1."""
    warm_up, calls = (1, 2) if task.dry else (20, CALLS)
    subject, times = task.subject("block", 1), {}
    with torch.no_grad(), fastmixer.backend("triton"):
        for name, module in (("fused_us", subject.fused), ("eager_us", subject.eager)):
            for count in (warm_up, calls):
                if not task.dry:
                    torch.cuda.synchronize()
                begun = time.perf_counter()
                for _ in range(count):
                    module(subject.items[0])
                times[name] = round((time.perf_counter() - begun) / count * 1e6, 1)
    return times

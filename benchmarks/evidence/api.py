"""The stage "api": what a user does with a fused model, each by itself, judged as bench judges."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

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
            "CUDA graph": lambda: _graph(forward),
        }
    compiler = "aot_eager" if task.dry else "inductor"  # which cannot compile what the interpreter runs
    checks["torch.compile"] = lambda: _gate(
        forward, torch.compile(forward.fused, fullgraph=True, backend=compiler)
    )
    checks["changed weights are seen"] = lambda: _after_a_change(step)
    checks["unfuse gives eager's bits"] = lambda: _unfused(forward)
    return 0 if all([task.attempt(what, check) for what, check in checks.items()]) else 1


def _subject(task: Task, direction: str) -> levels.Subject:
    if task.dry:
        case = levels.Case("model", "tiny", 2, "float32", direction, levels.Shape(4, 40, 20, 80, 2, 16))
    else:
        (case,) = levels.make_cases(["model"], ["B/16"], [8], ["bfloat16"], [direction])
    with torch.set_grad_enabled(case.trains):
        return levels.make_subject(case, task.device)


def _gate(
    subject: levels.Subject,
    module: Callable | None = None,
    *,
    backend: str = "triton",
    memory: str = "balanced",
) -> dict:
    """The parity of the fused model, or of ``module`` in its place."""
    call = levels.make_call(subject.fused if module is None else module, subject.case, subject.owner, memory)
    with torch.set_grad_enabled(subject.case.trains), fastmixer.backend(backend):
        return judged(cells.gate(subject, call))


def _graph(subject: levels.Subject) -> dict:
    """The same of a CUDA graph's replay."""
    with torch.no_grad(), fastmixer.backend("triton"):
        replay = measure.Replay(levels.make_call(subject.fused, subject.case), subject.items)
        return judged(cells.gate(subject, replay.answer))


def _after_a_change(subject: levels.Subject) -> dict:
    """The same after all weights changed in place, as an optimizer changes them: no packed copy is stale."""
    with torch.no_grad():
        for module in (subject.eager, subject.owner):
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
    model, dtype = ("S/32", "float32") if task.dry else ("B/16", "bfloat16")
    (case,) = levels.make_cases(["block"], [model], [1], [dtype], ["forward"])
    found, calls = {}, 2 if task.dry else CALLS
    with torch.no_grad(), fastmixer.backend("triton"):
        subject = levels.make_subject(case, task.device)
        for name, module in (("fused_us", subject.fused), ("eager_us", subject.eager)):
            for _ in range(1 if task.dry else 20):
                module(subject.items[0])
            _wait(task)
            begun = time.perf_counter()
            for _ in range(calls):
                module(subject.items[0])
            found[name] = round((time.perf_counter() - begun) / calls * 1e6, 1)
            _wait(task)
    return found


def _wait(task: Task) -> None:
    if not task.dry:
        torch.cuda.synchronize()

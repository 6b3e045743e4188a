"""The race of designs: the same fused call, forced to run ops by one design after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import closing
from functools import partial

import torch

from fastmixer import configs
from fastmixer.configs import Problem, Target, TileConfig
from fastmixer.configs.designs import parsed
from fastmixer.configs.ops import OPS, half_of
from fastmixer.tune.jobs import first_line
from fastmixer.tune.machine import Compiler

from . import measure
from .levels import Case, Subject, make_call
from .opponents import Opponent
from .schema import RACED_AT, is_design


def problem_of(op: str, case: Case) -> Problem:
    """What a design of ``op`` is chosen for in the case, whose GELU is erf's."""
    shape = case.shape
    hidden = shape.token_hidden if half_of(op) == "token" else shape.channel_hidden
    sizes = case.batch, shape.tokens, shape.channels, hidden
    return Problem(*sizes, case.x_dtype, case.product_dtype)


def combinations(case: Case, asked: Iterable[str], target: Target) -> list[dict[str, str]]:
    """What is forced together, by op: of an op every design that serves the case, else what ``asked`` says.

    asked: ops, and combinations as ``parsed`` takes them. An op of the backward races only where one runs.
    """
    found: list[dict[str, str]] = []
    for text in asked if case.level in RACED_AT else ():
        if is_design(text):
            found.append(parsed(text))
        elif case.trains or OPS[text].direction == "forward":
            found += [{text: name} for name in configs.designs_of(text, problem_of(text, case), target)]
    return found


def raced(case: Case, asked: Iterable[str], device: torch.device) -> dict[str, Opponent]:
    """Who races in the case, by "op=design", or by several with commas."""
    target = configs.target_of(device)
    return {
        ",".join(f"{op}={name}" for op, name in names.items()): Opponent(
            RACED_AT, partial(_forced, names), judged=True
        )
        for names in combinations(case, asked, target)
    }


def _forced(names: dict[str, str], subject: Subject) -> measure.Call:
    lean = any(OPS[op].products == 2 for op in names)  # what recomputes runs in that mode only
    call = make_call(subject.fused, subject.case, memory="lean" if lean else "balanced")

    def forced(item: measure.Item) -> object:
        with configs.forced(**names):
            return call(item)

    return forced


def compile_ahead(cases: Iterable[Case], asked: Sequence[str], target: Target) -> list[str]:
    """Compiles what ``raced`` will run in processes beside each other; what does not compile, and why.

    That each then finds it in Triton's cache on disk leaves the time to the race.
    """
    jobs = {}
    for case in cases:
        for op, name in (pair for names in combinations(case, asked, target) for pair in names.items()):
            problem = problem_of(op, case)
            tiles = configs.designs_of(op, problem, target).get(name)
            if isinstance(tiles, TileConfig):
                jobs[op, problem._replace(batch=64), tiles] = name  # no code depends on the batch
    with closing(Compiler(target)) as compiler:
        started = {job: compiler.start(*job) for job in jobs}
        reasons = {f"{job[0]}={jobs[job]}": _outcome(future) for job, future in started.items()}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason]


def _outcome(future: Future[str | None]) -> str | None:
    """Why it is not compiled, whoever's fault that is: it compiles, or fails, when it first runs."""
    try:
        return future.result()
    except Exception as error:
        return first_line(error)

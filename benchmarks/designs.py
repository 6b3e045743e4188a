"""The race of an op's designs: the same fused call, forced to run an op by one design after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial

import torch

from fastmixer import configs
from fastmixer.configs import Problem, Target, TileConfig
from fastmixer.configs.ops import half_of
from fastmixer.tune.machine import Compiler

from . import measure
from .levels import Case, Subject, make_call
from .opponents import Opponent

LEVELS = ("channel", "block")


def problem_of(op: str, case: Case) -> Problem:
    """What a design of ``op`` is chosen for in the case."""
    shape = case.shape
    hidden = shape.token_hidden if half_of(op) == "token" else shape.channel_hidden
    sizes = case.batch, shape.tokens, shape.channels, hidden
    return Problem(*sizes, case.x_dtype, case.product_dtype)


def raced(case: Case, ops: Iterable[str], device: torch.device) -> dict[str, Opponent]:
    """Who races in the case: every design of these ops that serves it, as "op=design"."""
    if case.level not in LEVELS:
        return {}
    target = configs.target_of(device)
    return {
        f"{op}={name}": Opponent(LEVELS, partial(_forced, op, name), judged=True)
        for op in ops
        for name in configs.designs_of(op, problem_of(op, case), target)
    }


def _forced(op: str, name: str, subject: Subject) -> measure.Call:
    call = make_call(subject.fused, subject.case)

    def forced(item: measure.Item) -> object:
        with configs.forced(**{op: name}):
            return call(item)

    return forced


def compile_ahead(cases: Iterable[Case], ops: Sequence[str], target: Target) -> list[str]:
    """Compiles what ``raced`` will run in processes beside each other; what does not compile, and why.

    That each then finds it in Triton's cache on disk leaves the time to the race.
    """
    jobs = {
        (op, problem_of(op, case)._replace(batch=64), tiles)  # no code depends on the batch
        for case in cases
        if case.level in LEVELS
        for op in ops
        for tiles in configs.designs_of(op, problem_of(op, case), target).values()
        if isinstance(tiles, TileConfig)
    }
    with closing(Compiler(target)) as compiler:
        started = {job: compiler.start(*job) for job in jobs}
        reasons = {job: future.result() for job, future in started.items()}
    return [f"{op} {tiles}: {reason}" for (op, _, tiles), reason in reasons.items() if reason]

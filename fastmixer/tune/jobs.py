"""What there is to tune: the ops of the paper's models, given batches and dtypes, by importance."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from fastmixer.configs import Choice, Library, Problem, Target, next_power_of_2
from fastmixer.configs.models import ALIASES, MODELS
from fastmixer.configs.ops import HALVES, OPS, TUNED, WHOLE_HALVES, half_of
from fastmixer.configs.tiles import is_launched
from fastmixer.usage import UsageError, did_you_mean

FORWARD = tuple(name for name in TUNED if OPS[name].direction == "forward")
BACKWARD = tuple(name for name in TUNED if OPS[name].direction == "backward")
ALL = (*FORWARD, *WHOLE_HALVES, *BACKWARD)
DTYPES = {  # by name: of x, and of the products
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
    # Of a block that is fed fp32. Inside a whole model x has autocast's dtype, from the stem on: "bfloat16".
    "autocast": (torch.float32, torch.bfloat16),
}


class Job(NamedTuple):
    """One choice to make. model: which one asked for it, for messages."""

    op: str
    problem: Problem
    model: str = ""

    def __str__(self) -> str:
        x, products = (str(dtype).removeprefix("torch.") for dtype in self.problem[4:6])
        dtype = products if x == products else f"{x} x, {products}"
        gelu = " tanh" * (self.problem.approximate == "tanh")
        return f"{self.op} {self.model} batch {self.problem.batch} {dtype}{gelu}".replace("  ", " ")


def jobs(
    models: Iterable[str],
    batches: Iterable[int],
    dtypes: Iterable[str],
    target: Target,
    *,
    gelu: str = "none",
    backward: bool = False,
    ops: Sequence[str] = (),
) -> list[Job]:
    """Every choice there is, each once: the forward's kernels, then whole halves, then the backward's.

    Halves come after the kernels that they are made of. Batches are rounded up to powers of two.

    Args:
        models: keys of ``fastmixer.configs.models.MODELS``, or names such as "B/16".
        dtypes: keys of DTYPES.
        gelu: "none" (erf), which holds for tanh too where nothing else was measured, or "tanh".
        backward: the backward's ops too.
        ops: only these; those of the backward whether or not ``backward`` is given.

    Raises UsageError for an unknown model or op, naming the nearest ones, or for one that no model here runs.
    """
    models = check_names(models, ops)
    wanted = ops or (ALL if backward else (*FORWARD, *WHOLE_HALVES))
    unique: dict[tuple[str, Problem], Job] = {}
    for group in (FORWARD, WHOLE_HALVES, BACKWARD):
        for model, batch, dtype in itertools.product(models, batches, dtypes):
            S, C, D, E = MODELS[model].block_shape()
            for op in group:
                hidden = D if half_of(op) == "token" else E
                problem = Problem(next_power_of_2(batch), S, C, hidden, *DTYPES[dtype], gelu)
                if op in wanted and (op in HALVES or is_launched(op, problem, target)):
                    unique.setdefault((op, problem), Job(op, problem, model))
    for op in ops:
        if op not in {job.op for job in unique.values()}:
            raise UsageError(f"--op: none of the models runs {op} on this GPU")
    return list(unique.values())


def check_names(models: Iterable[str], ops: Iterable[str]) -> list[str]:
    """The models by their keys in MODELS; UsageError for an unknown one or an unknown op."""
    for op in ops:
        if op not in ALL:
            raise UsageError(f"--op: unknown op {op!r}; {did_you_mean(op, ALL)}")
    names = [ALIASES.get(model, model) for model in models]
    for name in names:
        if name not in MODELS:
            raise UsageError(f"--model: unknown model {name!r}; {did_you_mean(name, [*MODELS, *ALIASES])}")
    return names


def describe(choice: Choice) -> str:
    """A choice in a few words."""
    if choice is None:
        return "fused"
    if isinstance(choice, Library):
        return choice.value
    shape = f"{choice.block_m}x{choice.block_n}" + (f"x{choice.block_k}" if choice.block_k else "")
    return f"{shape}, {choice.num_warps} warps, {choice.num_stages} stages"


def first_line(error: Exception) -> str:
    """An error in a few words."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"

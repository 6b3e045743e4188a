"""What there is to tune: the ops of the paper's models, given batches and dtypes, by importance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from .cli import UsageError, did_you_mean
from .configs import ONE_PASS_TOKENS, Library, Problem, Target, next_power_of_2, wgrad_in_one_launch
from .configs.tiles import Choice
from .model import ALIASES, MODELS

FORWARD = ("channel_fc1", "channel_fc2", "token_mixing", "token_fc1", "token_fc2")
HALVES = ("channel_half", "token_half")
BACKWARD = (
    "channel_mlp_hidden_bwd",
    "channel_mlp_hidden_bwd_recompute",
    "token_wgrad_fc1",
    "token_wgrad_fc2",
    "token_dgrad",
    "token_mlp_hidden_bwd_recompute",
)
OPS = (*FORWARD, *HALVES, *BACKWARD)
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
        x, products = (str(dtype).removeprefix("torch.") for dtype in self.problem[4:])
        dtype = products if x == products else f"{x} x, {products}"
        return f"{self.op} {self.model} batch {self.problem.batch} {dtype}".replace("  ", " ")


def jobs(
    models: Iterable[str],
    batches: Iterable[int],
    dtypes: Iterable[str],
    target: Target,
    *,
    backward: bool = False,
    ops: Sequence[str] = (),
) -> list[Job]:
    """Every choice there is, each once: the forward's kernels, then whole halves, then the backward's.

    Halves come after the kernels that they are made of. Batches are rounded up to powers of two.

    Args:
        models: keys of ``fastmixer.model.MODELS``, or names such as "B/16".
        dtypes: keys of DTYPES.
        backward: the backward's ops too.
        ops: only these; those of the backward whether or not ``backward`` is given.

    Raises:
        UsageError: an unknown model or op, with the nearest known ones, or an op that no model here runs.
    """
    models = check_names(models, ops)
    wanted = ops or (OPS if backward else (*FORWARD, *HALVES))
    shapes = [(model, batch, dtype) for model in models for batch in batches for dtype in dtypes]
    found: dict[tuple[str, Problem], Job] = {}
    for group in (FORWARD, HALVES, BACKWARD):
        for shape in shapes:
            for job in _jobs_of(*shape, [op for op in group if op in wanted], target):
                found.setdefault(job[:2], job)
    for op in ops:
        if not any(job.op == op for job in found.values()):
            raise UsageError(f"--op: none of the models runs {op} on this GPU")
    return list(found.values())


def check_names(models: Iterable[str], ops: Iterable[str]) -> list[str]:
    """The models by their keys in MODELS; UsageError for an unknown one or an unknown op."""
    for op in ops:
        if op not in OPS:
            raise UsageError(f"--op: unknown op {op!r}; {did_you_mean(op, OPS)}")
    names = [ALIASES.get(model, model) for model in models]
    for name in names:
        if name not in MODELS:
            raise UsageError(f"--model: unknown model {name!r}; {did_you_mean(name, [*MODELS, *ALIASES])}")
    return names


def _jobs_of(model: str, batch: int, dtype: str, ops: Sequence[str], target: Target) -> Iterable[Job]:
    config = MODELS[model]
    tokens, channels = (224 // config.patch_size) ** 2, config.embed_dim
    for op in ops:
        hidden = channels // 2 if op.startswith("token") else 4 * channels
        problem = Problem(next_power_of_2(batch), tokens, channels, hidden, *DTYPES[dtype])
        if _is_launched(op, problem, target):
            yield Job(op, problem, model)


def _is_launched(op: str, problem: Problem, target: Target) -> bool:
    one_pass = problem.tokens <= ONE_PASS_TOKENS
    if op in ("token_fc1", "token_fc2", "token_mlp_hidden_bwd_recompute"):
        return not one_pass
    if op == "token_wgrad_fc2":
        return one_pass and not wgrad_in_one_launch(problem, target)
    return one_pass or op not in ("token_mixing", "token_dgrad", "token_wgrad_fc1")


def describe(choice: Choice) -> str:
    """A choice in a few words."""
    if choice is None:
        return "fused"
    if isinstance(choice, Library):
        return choice.value
    shape = f"{choice.block_m}x{choice.block_n}" + (f"x{choice.block_k}" if choice.block_k else "")
    return f"{shape}, {choice.num_warps} warps, {choice.num_stages} stages"

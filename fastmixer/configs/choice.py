"""What runs for an op: what was measured, else the rule's tile unless a compiled fact is against it.

No clock has confirmed the cost model. So what it predicts decides in two places only: which tile takes the
place of one that does not fit, spills in its loop or waits between its products; and whether PyTorch runs
what the kernels would multiply on ordinary cores (fp32 without TF32), which no tile makes up for.

Choosing reads no file and asks no GPU: the same arguments give the same choice wherever the same Triton is
installed, for tiles compile differently with another. A ``Target`` that names a version gives the same choice
anywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fastmixer.configs import resources, tables
from fastmixer.configs.designs import candidates, designed, forced_names
from fastmixer.configs.ops import HALVES, OPS, half_of
from fastmixer.configs.predict import cost
from fastmixer.configs.predict.kernels import Prediction
from fastmixer.configs.problem import Choice, Library, Problem, TileConfig, bucketed, measured_as
from fastmixer.configs.resources import cannot_run, usable
from fastmixer.configs.targets import Target, device_data
from fastmixer.configs.tiles import multiplies_on_ordinary_cores, rule

# The share of the kernels' time that PyTorch has to save: the model's figures were never compared with a
# clock, and a half left to PyTorch loses the memory that the fused one saves. Where no code was compiled for
# the kernels' problem, what they need is guessed, and PyTorch must be predicted to be twice as fast.
LIBRARY_MARGIN, GUESS_MARGIN = 0.15, 0.50
# Seconds that PyTorch has to save besides for each launch that it takes more (a product one or two, a half
# two or three): they cost the host a few microseconds each wherever no CUDA graph hides them.
LIBRARY_GAIN = 5e-6

Table = Mapping[tables.Key, Choice]


class Chosen(NamedTuple):
    """A choice and where it is from: "forced", "table", "model" or "rule"; ``why`` in a few words."""

    choice: Choice
    source: str
    why: str = ""


def select(
    op: str,
    problem: Problem,
    target: Target,
    table: Table | None = None,
    forced: Sequence[tuple[str, str]] = (),
) -> Choice:
    """What runs for ``op``: tiles, a Library, or None. A pure function.

    Args:
        op: a row of ``ops.OPS``, or a half of ``ops.HALVES``; no table has the halves in training.
        problem: of the half.
        target: for which GPU.
        table: what was measured on it, by (op, problem with ``bucketed`` batch): ``tables.table_of``.
        forced: ops and the design that each has to run: ``designs.forced_names``.

    Returns:
        TileConfig: the kernel's tiles. One of ``ops.libraries``, for channel_fc1 and channel_fc2: PyTorch's
        product. Library.REFERENCE, for the halves: all of it in PyTorch. None, for the halves: the
        kernels; for the one-pass ops: too long for one pass, use the two-pass design.

    Raises:
        ValueError: no such op, or a forced design does not serve the problem.
    """
    return explained(op, problem, target, table, forced).choice


def explained(
    op: str,
    problem: Problem,
    target: Target,
    table: Table | None = None,
    forced: Sequence[tuple[str, str]] = (),
) -> Chosen:
    """``select`` with where the choice is from."""
    if op not in OPS and op not in HALVES:
        raise ValueError(f"op: expected one of {', '.join([*OPS, *HALVES])}, got {op!r}")
    for name, design in forced:
        if name == op:
            return Chosen(designed(op, design, problem, target), "forced")
        if op in HALVES and half_of(name) == half_of(op):  # or its design would not run
            return Chosen(None, "forced")
    if target.backend != "interpreter":
        problem = bucketed(problem)
        for known in measured_as(problem) if table else ():
            if (op, known) in table:
                return Chosen(table[op, known], "table")
    return _modelled(op, problem, target)


# The remembered answers for each target with what they hold for, the table and the forced designs: a block's
# forward asks about ten times.
_answers: dict[Target, tuple[Table | None, tuple, Callable[[str, Problem, Target], Choice]]] = {}


def choose(op: str, problem: Problem, target: Target) -> Choice:
    """``select`` with tables and forced designs as they are now: what a launch uses unless told otherwise."""
    table, forced = tables.table_of(target) if target.name else None, forced_names()
    known = _answers.get(target)
    if known is None or known[0] is not table or known[1] != forced:
        bound = functools.partial(select, table=table, forced=forced)
        known = _answers[target] = table, forced, functools.lru_cache(maxsize=4096)(bound)
    return known[2](op, problem, target)


def edition() -> tuple:
    """Differs whenever ``choose`` may have another answer: what was made of its answers holds for one."""
    return tables.edition(), forced_names()


def choose_kernels(op: str, problem: Problem, target: Target) -> Choice:
    """``choose`` where PyTorch may run neither a product nor a half: the table's tiles, else the model's.

    A forced design is what was asked for by name, whoever runs it.
    """
    choice = choose(op, problem, target)
    if isinstance(choice, TileConfig) or op in dict(forced_names()):
        return choice
    return select_kernels(op, problem, target)


def select_kernels(op: str, problem: Problem, target: Target) -> TileConfig | None:
    """``select`` without tables and as if PyTorch ran nothing: the kernels' own tiles."""
    if op in HALVES:
        return None
    return _kernels(op, problem if target.backend == "interpreter" else bucketed(problem), target).choice


@functools.lru_cache(maxsize=4096)
def _modelled(op: str, problem: Problem, target: Target) -> Chosen:
    if op in HALVES:
        return _half(op, problem, target)
    kernel = _kernels(op, problem, target)
    if not OPS[op].library or target.backend == "interpreter":
        return kernel
    if cannot_run(op, problem, kernel.choice, target):
        return Chosen(Library.ATEN, "model", "none of the kernel's tiles fits")
    if multiplies_on_ordinary_cores(problem, target):
        tiled = cost.predict_launch(op, problem, kernel.choice, target)
        library = cost.predict_launch(op, problem, Library.ATEN, target)
        recorded = resources.is_recorded(op, problem, kernel.choice, target)
        if saving := _saving(library, tiled, recorded, LIBRARY_GAIN):
            return Chosen(Library.ATEN, "model", f"the library's product {saving}")
    return kernel


@functools.lru_cache(maxsize=4096)
def _kernels(op: str, problem: Problem, target: Target) -> Chosen:
    """The rule's tile, or the candidate predicted fastest among those that run clean where it does not."""
    first = rule(op, problem, target)
    others = candidates(op, problem, target)
    if len(others) < 2 or not resources.is_recorded(op, problem, first, target):
        return Chosen(first, "rule")
    runnable = {tiles: needs for tiles in others if (needs := usable(op, problem, tiles, target)) is not None}
    clean = [tiles for tiles, needs in runnable.items() if needs.is_clean(op)]
    predicted = {tiles: cost.predict_launch(op, problem, tiles, target) for tiles in clean}
    predicted = {tiles: prediction for tiles, prediction in predicted.items() if prediction is not None}
    if first in clean or not predicted:
        return Chosen(first, "rule")
    best = min(predicted, key=lambda tiles: predicted[tiles].seconds)  # the earliest of equals
    if first not in runnable:
        return Chosen(best, "model", "the rule's tile does not fit")
    return Chosen(best, "model", "the rule's tile spills in its loop or waits between products")


def _half(op: str, problem: Problem, target: Target) -> Chosen:
    """REFERENCE where no tile fits, or PyTorch's half is clearly faster than products on ordinary cores."""
    if target.backend == "interpreter" or device_data(target) is None:
        return Chosen(None, "rule")

    def kernels(name: str, problem: Problem, target: Target) -> Choice:
        return None if name in HALVES else _modelled(name, problem, target).choice

    forward = [name for name, _ in cost.forward_ops({op: problem}, target, kernels)]
    ops = forward[1:] + cost.backward_ops(op, problem, target, kernels)  # without the row moments
    chosen = {name: kernels(name, problem, target) for name in ops}
    tiled = {name: tiles for name, tiles in chosen.items() if isinstance(tiles, TileConfig)}
    for name, tiles in tiled.items():
        if cannot_run(name, problem, tiles, target):
            return Chosen(Library.REFERENCE, "model", f"none of the tiles of {name} fits")
    if not multiplies_on_ordinary_cores(problem, target):
        return Chosen(None, "rule")
    fused = cost.total(list(cost.predict_halves({op: problem}, target, kernels).values()))
    reference = cost.predict_launch(op, problem, Library.REFERENCE, target)
    recorded = all(resources.is_recorded(name, problem, tiles, target) for name, tiles in tiled.items())
    if saving := _saving(reference, fused, recorded, 2 * LIBRARY_GAIN):
        return Chosen(Library.REFERENCE, "model", f"PyTorch's half {saving}")
    return Chosen(None, "model")


def _saving(library: Prediction | None, kernels: Prediction | None, recorded: bool, least: float) -> str:
    """What PyTorch is predicted to save, in words; "" if it is not enough: a share and so many seconds."""
    if library is None or kernels is None:
        return ""
    margin = LIBRARY_MARGIN if recorded else GUESS_MARGIN
    if library.seconds >= kernels.seconds - max(margin * kernels.seconds, least):
        return ""
    return f"predicted {1 - library.seconds / kernels.seconds:.0%} shorter than the kernels"

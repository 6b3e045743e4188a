"""The designs of an op: ways to run it that have a name, to be raced and to be forced; and other tiles.

What a design needs of a problem stands beside it. Whether its tiles fit a GPU and run clean there is for
``resources`` to say, which of them runs for ``choice``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from fastmixer.configs.ops import OPS, libraries, matrix_sizes
from fastmixer.configs.problem import Choice, Problem, TileConfig
from fastmixer.configs.targets import Target
from fastmixer.configs.tiles import ALIGNED, rule, token_pieces

RULE = "rule"  # the name of the rule's tiles, which every op has
VARIABLE = "FASTMIXER_DESIGN"  # of the environment: "channel_fc1=tma_128x256,channel_fc2=aten"


@dataclass(frozen=True)
class Design:
    """Tiles for an op on some architectures; PyTorch's ways are designs too, ``ops.libraries``."""

    name: str
    runs: TileConfig
    archs: tuple[int, ...]

    def serves(self, op: str, problem: Problem, target: Target) -> bool:
        """Whether it can run such a problem at all."""
        _, _, columns, depth = matrix_sizes(op, problem)
        there = target.backend == "interpreter" or target.arch in self.archs
        if not there or problem.dtype.itemsize != 2 or (columns | depth) % ALIGNED:
            return False
        return problem.x_dtype == problem.dtype or not self.runs.descriptors


def _design(
    name: str, m: int, n: int, k: int, warps: int, stages: int, archs: tuple[int, ...], **kind: bool
) -> Design:
    return Design(name, TileConfig(m, n, k, num_warps=warps, num_stages=stages, **kind), archs)


# 128 x 128 leaves room for two programs on a multiprocessor, one of which multiplies under the other's
# epilogue; 256 columns or rows need a quarter less of L2, and have the multiprocessor to themselves.
_HOPPER = (90, 100)
_LARGE = (
    _design("pointers_128x256", 128, 256, 64, 8, 3, _HOPPER),
    _design("pointers_256x128", 256, 128, 64, 8, 3, _HOPPER),
    _design("tma_128x256", 128, 256, 64, 8, 3, _HOPPER, descriptors=True),
    _design("tma_128x256_persistent", 128, 256, 64, 8, 3, _HOPPER, descriptors=True, persistent=True),
    _design("tma_128x128", 128, 128, 32, 8, 4, (120,), descriptors=True),
)
_FORWARD = (*_LARGE, _design("tma_128x128", 128, 128, 64, 4, 3, _HOPPER, descriptors=True))
_BACKWARD = (*_LARGE, _design("tma_128x128", 128, 128, 64, 8, 3, _HOPPER, descriptors=True))
_RECOMPUTE = (  # two accumulators
    _design("tma_64x128", 64, 128, 64, 4, 3, _HOPPER, descriptors=True),
    _design("tma_128x128", 128, 128, 64, 8, 3, _HOPPER, descriptors=True),
    _design("tma_64x128", 64, 128, 32, 4, 4, (120,), descriptors=True),
)
DESIGNS: dict[str, tuple[Design, ...]] = {
    "channel_fc1": _FORWARD,
    "channel_fc2": _FORWARD,
    "channel_mlp_hidden_bwd": _BACKWARD,
    "channel_mlp_hidden_bwd_recompute": _RECOMPUTE,
    # Of long sequences. token_fc1 has none: its operand is normalised in registers, and products wait for it.
    "token_fc2": tuple(design for design in _FORWARD if not design.runs.persistent),
    "token_mlp_hidden_bwd_recompute": _RECOMPUTE,
}


def designs_of(op: str, problem: Problem, target: Target) -> dict[str, Choice]:
    """What runs ``op`` by the name of the design: of the rule's tiles first, then of all that serve."""
    tiles = {design.name: design.runs for design in DESIGNS.get(op, ()) if design.serves(op, problem, target)}
    by_library = {library.value: library for library in libraries(op, problem)}
    return {RULE: rule(op, problem, target), **tiles, **by_library}


def name_of(op: str, problem: Problem, target: Target, choice: Choice) -> str:
    """The name of the design that runs ``op`` so; "" where it has none."""
    return next((name for name, runs in designs_of(op, problem, target).items() if runs == choice), "")


@functools.cache
def candidates(op: str, problem: Problem, target: Target) -> tuple[TileConfig, ...]:
    """The few tiles worth a try for ``op``, the rule's first; none if the sequence is too long for one pass.

    Then those of the designs, then others that vary what the rule had to decide without a clock: rows against
    columns, one large program on a multiprocessor against two small ones, and smaller tiles for small
    batches. Not all of them fit ``target`` or are free of spills: that is for ``resources`` to say.
    """
    first = rule(op, problem, target)
    if first is None:
        return ()
    if target.backend == "interpreter" or not OPS[op].tuned or problem.dtype.itemsize >= 4:
        return (first,)
    family = "hip" if target.backend == "hip" else "hopper" if target.arch in (90, 100) else "ampere"
    if OPS[op].one_pass:
        others = _TOKEN_MIXING[family] if op == "token_mixing" else _TOKEN_DGRAD[family]
        if OPS[op].kernel == "token_wgrad":
            others = tuple(replace(tiles, block_m=tiles.block_n, block_n=tiles.block_m) for tiles in others)
        if sum(token_pieces(problem.tokens)) > 64:  # two accumulators per row leave no room for the largest
            others = (t for t in others if t.block_m <= 16 * t.num_warps and t.block_m * t.block_n <= 8192)
    else:
        others = _PRODUCT[family, "recompute" if OPS[op].products == 2 else OPS[op].direction]
        if OPS[op].half == "token":
            others = others[:2]
    named = (tiles for tiles in designs_of(op, problem, target).values() if isinstance(tiles, TileConfig))
    return tuple(dict.fromkeys((first, *named, *others)))


def _tiles(*shapes: tuple[int, int, int, int, int]) -> tuple[TileConfig, ...]:
    """(block_m, block_n, block_k, num_warps, num_stages) each."""
    return tuple(TileConfig(m, n, k, num_warps=w, num_stages=s) for m, n, k, w, s in shapes)


# 16-bit products only: 32-bit ones have the rule's tile and the library to choose from. The weight gradients
# of one-pass token mixing have the tiles of dgrad, transposed.
_TOKEN_MIXING = {
    "hopper": _tiles(
        (64, 32, 0, 4, 3), (64, 32, 0, 4, 2), (64, 64, 0, 4, 2), (128, 64, 0, 8, 2), (128, 32, 0, 8, 2),
        (128, 64, 0, 4, 2),
    ),
    "ampere": _tiles((64, 32, 0, 4, 2), (64, 16, 0, 4, 3), (128, 32, 0, 8, 2)),
    "hip": _tiles((64, 64, 0, 4, 1), (128, 32, 0, 8, 1)),
}  # fmt: skip
_TOKEN_DGRAD = {
    "hopper": _tiles((128, 64, 0, 8, 2), (64, 64, 0, 4, 2)),
    "ampere": _tiles((64, 32, 0, 4, 2)),
    "hip": _tiles((32, 32, 0, 4, 1)),
}
_PRODUCT = {  # the first two also serve token mixing in two passes
    ("hopper", "forward"): _tiles(
        (64, 64, 64, 4, 4), (128, 64, 64, 4, 4), (64, 128, 64, 4, 3), (32, 64, 128, 4, 3),
        (32, 32, 128, 4, 4),
    ),
    ("hopper", "backward"): _tiles((64, 64, 64, 4, 4), (128, 128, 64, 4, 3), (64, 128, 64, 4, 3)),
    ("hopper", "recompute"): _tiles((64, 64, 64, 4, 4), (128, 128, 64, 8, 3)),
    ("ampere", "forward"): _tiles(
        (64, 64, 32, 4, 4), (128, 64, 32, 4, 4), (64, 128, 32, 4, 4), (32, 64, 64, 4, 4),
        (32, 32, 64, 4, 4),
    ),
    ("ampere", "backward"): _tiles((64, 64, 32, 4, 4), (128, 64, 32, 4, 4)),
    ("ampere", "recompute"): _tiles((64, 64, 32, 4, 4)),
    ("hip", "forward"): _tiles(
        (64, 64, 64, 4, 2), (128, 64, 64, 4, 2), (128, 128, 32, 4, 2), (64, 128, 64, 4, 2),
        (32, 64, 64, 4, 2),
    ),
    ("hip", "backward"): _tiles((64, 64, 64, 4, 2), (128, 128, 32, 4, 2)),
    ("hip", "recompute"): _tiles((64, 64, 64, 4, 2)),
}  # fmt: skip


# ---- forced ----------------------------------------------------------------------------------------------

_forced: tuple[tuple[str, str], ...] | None = None  # None: the environment was not read yet


def forced_names() -> tuple[tuple[str, str], ...]:
    """Ops and the design that each has to run: of ``forced`` and the environment; of no other op.

    Raises ValueError for what the environment says and no op or design is called.
    """
    global _forced
    if _forced is None:
        try:
            _forced = tuple(sorted(parsed(os.environ.get(VARIABLE, "")).items()))
        except ValueError as error:
            raise ValueError(f"{VARIABLE}: {error}") from None
    return _forced


def parsed(text: str) -> dict[str, str]:
    """The design of each op in "channel_fc1=tma_128x256,channel_fc2=aten".

    Raises ValueError for an op or a design that does not exist, and for an op that stands there twice.
    """
    pairs = [[word.strip() for word in pair.partition("=")[::2]] for pair in text.split(",") if pair.strip()]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"expected every op once, got {text!r}")
    return _checked(dict(pairs))


@contextmanager
def forced(**names: str) -> Iterator[None]:
    """Inside the block the whole process runs ops by these designs and no others: for measuring.

    ``with forced(channel_fc1="tma_128x256"):``; for a process from its start on the environment's VARIABLE.
    A call whose problem a design does not serve raises ValueError.

    Raises ValueError for an op or a design that does not exist.
    """
    global _forced
    before = forced_names()
    _forced = tuple(sorted({**dict(before), **_checked(names)}.items()))
    try:
        yield
    finally:
        _forced = before


def _checked(names: dict[str, str]) -> dict[str, str]:
    for op, name in names.items():
        if op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {op!r}")
        by_library = (library.value for library in OPS[op].library)
        known = list(dict.fromkeys([RULE, *(design.name for design in DESIGNS.get(op, ())), *by_library]))
        if name not in known:
            raise ValueError(f"design of {op}: expected one of {', '.join(known)}, got {name!r}")
    return names


def designed(op: str, name: str, problem: Problem, target: Target) -> Choice:
    """What the design of that name runs; ValueError where it does not serve the problem."""
    known = designs_of(op, problem, target)
    if name not in known:
        raise ValueError(
            f"the design {name!r} of {op} does not serve {problem} on {target.arch}: expected one of "
            f"{', '.join(known)}"
        )
    return known[name]

"""The few tiles worth a try, by op, arch and dtypes: the tuner measures them, and one may replace the rule's.

The rule-based tile comes first. The others vary what it had to decide without a clock: rows against columns,
one large program on a multiprocessor against two small ones, and smaller tiles for small batches.
"""

from __future__ import annotations

import functools
from dataclasses import replace

from fastmixer.configs.ops import OPS
from fastmixer.configs.problem import Problem, TileConfig
from fastmixer.configs.targets import Target
from fastmixer.configs.tiles import rule, token_pieces


@functools.cache
def candidates(op: str, problem: Problem, target: Target) -> tuple[TileConfig, ...]:
    """Tiles for ``op``, the rule's first; none if the sequence is too long for one pass.

    Not all of them fit ``target`` or are free of spills: that is for ``resources`` to say.
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
        tokens = sum(token_pieces(problem.tokens))
        if target.arch == 100 and op != "token_mixing":
            # Triton 3.6.0 gives the others more shared memory than there is; the records are of a newer one.
            others = others[1:] if tokens <= 224 else ()
        if tokens > 64:  # two accumulators per row leave no room for the largest
            others = (t for t in others if t.block_m <= 16 * t.num_warps and t.block_m * t.block_n <= 8192)
    else:
        others = _PRODUCT[family, "recompute" if OPS[op].products == 2 else OPS[op].direction]
        if OPS[op].half == "token":
            others = others[:2]
    return tuple(dict.fromkeys((first, *others)))


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
        (64, 64, 64, 4, 4), (128, 64, 64, 4, 4), (128, 256, 64, 8, 3), (64, 128, 64, 4, 3),
        (32, 64, 128, 4, 3), (32, 32, 128, 4, 4),
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

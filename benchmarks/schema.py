"""The benchmark's result file, schema 3: what it holds, and ``validate``, which a file must pass.

A file is one run: how it was measured, and one cell for every thing that was. ``REPORT`` is the shape as a
nested description (``_check`` tells how to read one); ``_check_cell`` adds what a shape cannot say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SCHEMA = 3  # raise it when a field changes its meaning
LEVELS = ("kernel", "token", "channel", "block", "model")
DTYPES = ("bfloat16", "float16", "float32", "autocast")
DIRECTIONS = ("forward", "forward_backward")
DEVICES = ("cuda", "cpu")
FUSED = ("fused", "fused_lean", "fused_frozen")
RIVALS = ("eager", "compile", "compile_max_autotune")  # the same block in PyTorch: what a ratio is taken to
OPPONENTS = (*FUSED, *RIVALS, "lucidrains", "cublas", "copy", "flax", "vit")
# What tells one cell of a file from another.
KEY = ("level", "op", "model", "batch", "dtype", "direction", "device")


class SchemaError(ValueError):
    """A result file that is not what this version writes; the message names the place in it."""


class PartialFileError(ValueError):
    """A run's unfinished file is there and may not be continued; it is left as it is."""


class Maybe:
    """None, or ``shape``."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


class Optional:
    """As the value of a name: it may be absent, as from files that were written before it existed."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


class Each:
    """An object with any names, or only ``names``, all of whose values have ``shape``."""

    def __init__(self, shape: Any, names: tuple[str, ...] | None = None) -> None:
        self.shape, self.names = shape, names


COUNT = "a whole number, 0 or more"
NUMBER = "a finite number"
POSITIVE = "a finite number above 0"
ANYTHING = "anything"

STATS = {"median": POSITIVE, "p20": POSITIVE, "p80": POSITIVE, "calls": COUNT}  # milliseconds of a call
OPPONENT = {
    "ms": STATS,  # between two CUDA events, or by the clock on the wall
    "graph_ms": Maybe(STATS),  # replayed from a CUDA graph
    "peak_bytes": Maybe(COUNT),
    "launches": Maybe(COUNT),
    "tflop_per_s": Maybe(NUMBER),
    "gb_per_s": Maybe(NUMBER),
    "share_of_roofline": Maybe(NUMBER),
    "images_per_s": Maybe(NUMBER),
    # Its own, where it is another network than the cell's ("vit"); otherwise None: the cell's count.
    "flops": Maybe(COUNT),
    "parameters": Maybe(COUNT),
}
PARITY = {
    "ok": bool,
    "tensor": str,  # the one nearest its bound, whose figures these are
    "error_fused": Maybe(NUMBER),
    "error_eager": Maybe(NUMBER),
    "max_fused": Maybe(NUMBER),
    "max_eager": Maybe(NUMBER),
    "error_bound": Maybe(NUMBER),
    "max_bound": Maybe(NUMBER),
    "misplaced": COUNT,
    "ratio": Maybe(NUMBER),
    "ratios": Each(Maybe(NUMBER)),  # error_fused / error_eager of every tensor
    "failed": [str],
}
CLOCKS = Maybe({"before": Maybe(Each(str)), "after": Maybe(Each(str))})
CELL = {
    "level": LEVELS,
    "op": Maybe(str),
    "model": str,
    "batch": COUNT,
    "dtype": DTYPES,
    "direction": DIRECTIONS,
    "device": DEVICES,
    "ok": bool,  # the gate was green and the fused side was timed
    "attempts": Optional(COUNT),  # how often the case was begun; with --resume a failed one is begun twice
    "parity": Each(PARITY),
    "errors": Each(str),
    "flops": COUNT,
    "bytes": COUNT,
    "parameters": Maybe(COUNT),
    "opponents": Each(OPPONENT, OPPONENTS),
    "predicted_ms": Each(NUMBER),
    "ratio_to_best": Maybe(POSITIVE),  # best opponent's median / fused median: above 1 fused is faster
    "best_opponent": Maybe(RIVALS),
    "clocks": CLOCKS,
}
REPORT = {
    "schema": (SCHEMA,),
    "kind": ("bench",),
    "started": str,
    "updated": str,
    "complete": bool,
    "environment": {
        "gpu": str,
        "cpu": Optional(Maybe(str)),
        "nvidia_smi": Maybe(Each(str)),
        "cuda": Maybe(str),
        "hip": Maybe(str),
        "versions": Each(Maybe(str)),
        "commit": Maybe(str),
        "dirty": Maybe(bool),
    },
    "protocol": Each(ANYTHING),
    "ceilings": Maybe(Each(ANYTHING)),  # checked by _check_ceilings
    "clocks": CLOCKS,
    "footnotes": Each(str),
    "cells": [CELL],
}


def validate(report: object) -> None:
    """Raises SchemaError, naming the first place that is wrong, unless ``report`` is a schema 3 report."""
    if isinstance(report, Mapping) and report.get("schema") != SCHEMA:
        raise SchemaError(f"report.schema must be {SCHEMA}, got {report.get('schema')!r}")
    _check(report, REPORT, "report")
    _check_ceilings(report["ceilings"])
    seen: set[tuple] = set()
    for index, cell in enumerate(report["cells"]):
        where = f"report.cells[{index}]"
        _check_cell(cell, where)
        key = cell_key(cell)
        if key in seen:
            raise SchemaError(f"{where} repeats the cell {key}")
        seen.add(key)


def cell_key(cell: Mapping) -> tuple:
    """What tells the cell from the others of its file, in the order of ``KEY``."""
    return tuple(cell[name] for name in KEY)


def shown_ms(opponent: Mapping, other: Mapping) -> tuple[float, float]:
    """The medians of two opponents of a cell that may be compared: of graphs where both have one."""
    kind = "graph_ms" if opponent["graph_ms"] and other["graph_ms"] else "ms"
    return opponent[kind]["median"], other[kind]["median"]


def _check(value: object, shape: Any, where: str) -> None:
    """Checks ``value`` against ``shape``.

    A shape is one of the names above, ``bool`` or ``str``; a tuple: one of these values; a list of one: a
    list of such; a dict: an object with exactly these names, but for an ``Optional`` one; ``Maybe`` or
    ``Each``.
    """
    if shape is ANYTHING:
        return
    if isinstance(shape, Optional):
        _check(value, shape.shape, where)
    elif isinstance(shape, Maybe):
        if value is not None:
            _check(value, shape.shape, where)
    elif isinstance(shape, tuple):
        if value not in shape:
            raise SchemaError(f"{where} must be one of {shape}, got {value!r}")
    elif isinstance(shape, list):
        _expect(isinstance(value, list), value, "a list", where)
        for index, item in enumerate(value):
            _check(item, shape[0], f"{where}[{index}]")
    elif isinstance(shape, dict):
        _expect(isinstance(value, Mapping), value, "an object", where)
        _check_names(value, shape, where)
        for name in value:
            _check(value[name], shape[name], f"{where}.{name}")
    elif isinstance(shape, Each):
        _expect(isinstance(value, Mapping), value, "an object", where)
        for name, item in value.items():
            if shape.names is not None and name not in shape.names:
                raise SchemaError(f"{where} may hold {', '.join(shape.names)}; got {name!r}")
            _check(item, shape.shape, f"{where}.{name}")
    elif isinstance(shape, str):
        _expect(_is_number(value, shape), value, shape, where)
    else:
        _expect(isinstance(value, shape), value, f"a {shape.__name__}", where)


def _check_names(value: Mapping, shape: dict, where: str) -> None:
    required = {name for name, inner in shape.items() if not isinstance(inner, Optional)}
    missing, unknown = required - value.keys(), value.keys() - shape.keys()
    if missing:
        raise SchemaError(f"{where} lacks {', '.join(sorted(missing))}")
    if unknown:
        raise SchemaError(f"{where} has unknown fields: {', '.join(sorted(map(str, unknown)))}")


def _is_number(value: object, shape: str) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if shape is COUNT:
        return isinstance(value, int) and value >= 0
    return math.isfinite(value) and (shape is NUMBER or value > 0)


def _expect(holds: bool, value: object, expected: str, where: str) -> None:
    if not holds:
        raise SchemaError(f"{where} must be {expected}, got {value!r:.80}")


def _check_ceilings(ceilings: Mapping | None) -> None:
    """{dtype: {"product_tflop_per_s": x}, ..., "copy_gb_per_s": x}, or None where none were measured."""
    if ceilings is None:
        return
    shape = {dtype: {"product_tflop_per_s": POSITIVE} for dtype in DTYPES if dtype in ceilings}
    _check(ceilings, {**shape, "copy_gb_per_s": POSITIVE}, "report.ceilings")


def _check_cell(cell: Mapping, where: str) -> None:
    """What the shape cannot say: no time on a red gate, quantiles in order, a ratio that is the times'."""
    opponents = cell["opponents"]
    if not cell["ok"] and opponents:
        raise SchemaError(f"{where}.opponents must be empty: the cell is not ok, so nothing is timed")
    if cell["ok"] and "fused" not in opponents:
        raise SchemaError(f"{where}.opponents lacks fused, but the cell is ok")
    red = [name for name, parity in cell["parity"].items() if name.startswith("fused") and not parity["ok"]]
    if cell["ok"] and red:
        raise SchemaError(f"{where}.ok must be false: the parity of {', '.join(red)} is red")
    if (cell["level"] == "kernel") != (cell["op"] is not None) and cell["ok"]:
        raise SchemaError(f"{where}.op must name a kernel at level kernel and be null elsewhere")
    for name, opponent in opponents.items():
        for kind in ("ms", "graph_ms"):
            stats = opponent[kind]
            if stats and not stats["p20"] <= stats["median"] <= stats["p80"]:
                raise SchemaError(f"{where}.opponents.{name}.{kind} must have p20 <= median <= p80")
    best, ratio = best_opponent(opponents)
    if cell["best_opponent"] != best:
        raise SchemaError(f"{where}.best_opponent must be {best!r}, got {cell['best_opponent']!r}")
    found = cell["ratio_to_best"]
    if (found is None) != (ratio is None) or (ratio is not None and not math.isclose(found, ratio)):
        raise SchemaError(f"{where}.ratio_to_best must be {ratio}, got {found}")


def best_opponent(opponents: Mapping) -> tuple[str | None, float | None]:
    """The fastest of ``RIVALS`` against "fused", and its median / that of fused; (None, None) without one."""
    fused = opponents.get("fused")
    ratios = {}
    for name in RIVALS:
        if fused and name in opponents:
            theirs, ours = shown_ms(opponents[name], fused)
            ratios[name] = theirs / ours
    if not ratios:
        return None, None
    best = min(ratios, key=ratios.get)
    return best, ratios[best]

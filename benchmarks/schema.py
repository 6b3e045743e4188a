"""The benchmark's result file, schema 3: what it holds, and ``validate``, which a file must pass.

A file is one run: how it was measured, and one cell for every thing that was. ``REPORT`` declares the fields
and their values; ``_check_cell`` adds the rules between the fields of a cell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

SCHEMA = 3  # raise it when a field changes its meaning
LEVELS = ("kernel", "token", "channel", "block", "model")
DTYPES = ("bfloat16", "float16", "float32", "autocast")
DIRECTIONS = ("forward", "forward_backward")
FUSED = ("fused", "fused_lean", "fused_frozen")
RIVALS = ("eager", "compile", "compile_max_autotune")  # the same block in PyTorch: what a ratio is taken to
OPPONENTS = (*FUSED, *RIVALS, "lucidrains", "cublas", "copy", "flax", "vit")


class SchemaError(ValueError):
    """A result file that is not what this version writes; the message names the place in it."""


class PartialFileError(ValueError):
    """A run's unfinished file is there and may not be continued; it is left as it is."""


class Key(NamedTuple):
    """What was measured: tells the cells of a file apart, and is the same for the same thing in two files."""

    level: str
    op: str | None
    model: str
    batch: int
    dtype: str
    direction: str
    device: str

    def __str__(self) -> str:
        what = f"{self.level} {self.op}" if self.op else self.level
        direction = self.direction.replace("_", "+")
        return f"{what} {short_model(self.model)} x{self.batch} {self.dtype} {direction} {self.device}"

    @classmethod
    def of_cell(cls, cell: Mapping) -> Key:
        return cls(*(cell[name] for name in cls._fields))


def short_model(name: str) -> str:
    """B/16 for mixer_b16_224; another name as it is."""
    match = re.fullmatch(r"mixer_([a-z])(\d+)_\d+", name)
    return f"{match[1].upper()}/{match[2]}" if match else name


# ---- shapes: what is called with a value and its place in the file, and raises SchemaError ---------------

Shape = Callable[[Any, str], None]


def must_be(expected: str, fits: Callable[[Any], bool]) -> Shape:
    """A value for which ``fits`` holds."""

    def check(value: Any, place: str) -> None:
        if not fits(value):
            raise SchemaError(f"{place} must be {expected}, got {value!r:.80}")

    return check


def one_of(*choices: str | int) -> Shape:
    return must_be(f"one of {choices}", choices.__contains__)


def maybe(shape: Shape) -> Shape:
    """None, or ``shape``."""
    return lambda value, place: None if value is None else shape(value, place)


def list_of(shape: Shape) -> Shape:
    def check(value: Any, place: str) -> None:
        LIST(value, place)
        for index, item in enumerate(value):
            shape(item, f"{place}[{index}]")

    return check


def each(shape: Shape, names: Sequence[str] = ()) -> Shape:
    """An object with any names, or only some of ``names``, whose values all have one shape."""

    def check(value: Any, place: str) -> None:
        OBJECT(value, place)
        for name, item in value.items():
            if names and name not in names:
                raise SchemaError(f"{place} may hold {', '.join(names)}; got {name!r}")
            shape(item, f"{place}.{name}")

    return check


def fields(shapes: Mapping[str, Shape], optional: Sequence[str] = ()) -> Shape:
    """An object with exactly these names, of which ``optional`` may be absent."""

    def check(value: Any, place: str) -> None:
        OBJECT(value, place)
        missing, unknown = shapes.keys() - value.keys() - {*optional}, value.keys() - shapes.keys()
        if missing:
            raise SchemaError(f"{place} lacks {', '.join(sorted(missing))}")
        if unknown:
            raise SchemaError(f"{place} has unknown fields: {', '.join(sorted(map(str, unknown)))}")
        for name, item in value.items():
            shapes[name](item, f"{place}.{name}")

    return check


def _is_number(value: object, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


OBJECT = must_be("an object", lambda value: isinstance(value, Mapping))
LIST = must_be("a list", lambda value: isinstance(value, list))
TEXT = must_be("a str", lambda value: isinstance(value, str))
BOOL = must_be("a bool", lambda value: isinstance(value, bool))
COUNT = must_be("a whole number, 0 or more", lambda value: _is_number(value, int) and value >= 0)
NUMBER = must_be("a finite number", lambda value: _is_number(value) and math.isfinite(value))
POSITIVE = must_be("a finite number above 0", lambda value: _is_number(value) and 0 < value < math.inf)

# ---- the file --------------------------------------------------------------------------------------------

STATS = fields({"median": POSITIVE, "p20": POSITIVE, "p80": POSITIVE, "calls": COUNT})  # ms of a call
OPPONENT = {
    "ms": STATS,  # between two CUDA events, or by the clock on the wall
    "graph_ms": maybe(STATS),  # replayed from a CUDA graph
    **dict.fromkeys(("peak_bytes", "launches"), maybe(COUNT)),
    **dict.fromkeys(("tflop_per_s", "gb_per_s", "share_of_roofline", "images_per_s"), maybe(NUMBER)),
    # Its own, where it is another network than the cell's ("vit"); otherwise None: the cell's count.
    **dict.fromkeys(("flops", "parameters"), maybe(COUNT)),
}
PARITY = {
    "ok": BOOL,
    "tensor": TEXT,  # the one nearest its bound, whose figures these are
    **dict.fromkeys(("error_fused", "error_eager", "error_bound", "ratio"), maybe(NUMBER)),
    **dict.fromkeys(("max_fused", "max_eager", "max_bound"), maybe(NUMBER)),
    "misplaced": COUNT,
    "ratios": each(maybe(NUMBER)),  # error_fused / error_eager of every tensor
    "failed": list_of(TEXT),
}
CLOCKS = maybe(fields(dict.fromkeys(("before", "after"), maybe(each(TEXT)))))
CELL = {
    "level": one_of(*LEVELS),
    "op": maybe(TEXT),
    "model": TEXT,
    "batch": COUNT,
    "dtype": one_of(*DTYPES),
    "direction": one_of(*DIRECTIONS),
    "device": one_of("cuda", "cpu"),
    "ok": BOOL,  # the gate was green and the fused side was timed
    "attempts": COUNT,  # how often the case was begun; with --resume a failed one is begun twice
    "parity": each(fields(PARITY)),
    "errors": each(TEXT),
    "flops": COUNT,
    "bytes": COUNT,
    "parameters": maybe(COUNT),
    "opponents": each(fields(OPPONENT), OPPONENTS),
    "predicted_ms": each(NUMBER),
    "ratio_to_best": maybe(POSITIVE),  # best opponent's median / fused median: above 1 fused is faster
    "best_opponent": maybe(one_of(*RIVALS)),
    "clocks": CLOCKS,
}
ENVIRONMENT = {
    "gpu": TEXT,
    "cpu": maybe(TEXT),
    "nvidia_smi": maybe(each(TEXT)),
    "cuda": maybe(TEXT),
    "hip": maybe(TEXT),
    "versions": each(maybe(TEXT)),
    "commit": maybe(TEXT),
    "dirty": maybe(BOOL),
}
PRODUCT = fields({"product_tflop_per_s": POSITIVE})
CEILINGS = {**dict.fromkeys(DTYPES, PRODUCT), "copy_gb_per_s": POSITIVE}
# Optional are dtypes that were not measured, and fields that files from before they existed lack.
REPORT = {
    "schema": one_of(SCHEMA),
    "kind": one_of("bench"),
    "started": TEXT,
    "updated": TEXT,
    "complete": BOOL,
    "environment": fields(ENVIRONMENT, optional=["cpu"]),
    "protocol": OBJECT,
    "ceilings": maybe(fields(CEILINGS, optional=DTYPES)),
    "clocks": CLOCKS,
    "footnotes": each(TEXT),
    "cells": list_of(fields(CELL, optional=["attempts"])),
}


def validate(report: object) -> None:
    """Raises SchemaError, naming the first place that is wrong, unless ``report`` is a schema 3 report."""
    if isinstance(report, Mapping) and report.get("schema") != SCHEMA:
        raise SchemaError(f"report.schema must be {SCHEMA}, got {report.get('schema')!r}")
    fields(REPORT)(report, "report")
    seen: set[Key] = set()
    for index, cell in enumerate(report["cells"]):
        place, key = f"report.cells[{index}]", Key.of_cell(cell)
        _check_cell(cell, place)
        if key in seen:
            raise SchemaError(f"{place} repeats the cell {tuple(key)}")
        seen.add(key)


def _check_cell(cell: Mapping, place: str) -> None:
    """The rules between fields: no time on a red gate, quantiles in order, a ratio that is the times'."""
    ok, opponents = cell["ok"], cell["opponents"]
    if not ok and opponents:
        raise SchemaError(f"{place}.opponents must be empty: the cell is not ok, so nothing is timed")
    if ok and "fused" not in opponents:
        raise SchemaError(f"{place}.opponents lacks fused, but the cell is ok")
    red = [name for name, parity in cell["parity"].items() if name.startswith("fused") and not parity["ok"]]
    if ok and red:
        raise SchemaError(f"{place}.ok must be false: the parity of {', '.join(red)} is red")
    if ok and (cell["level"] == "kernel") != (cell["op"] is not None):
        raise SchemaError(f"{place}.op must name a kernel at level kernel and be null elsewhere")
    for name, opponent in opponents.items():
        for kind in ("ms", "graph_ms"):
            stats = opponent[kind]
            if stats and not stats["p20"] <= stats["median"] <= stats["p80"]:
                raise SchemaError(f"{place}.opponents.{name}.{kind} must have p20 <= median <= p80")
    best, ratio = best_opponent(opponents)
    if cell["best_opponent"] != best:
        raise SchemaError(f"{place}.best_opponent must be {best!r}, got {cell['best_opponent']!r}")
    recorded = cell["ratio_to_best"]
    if recorded != ratio and not (recorded and ratio and math.isclose(recorded, ratio)):
        raise SchemaError(f"{place}.ratio_to_best must be {ratio}, got {recorded}")


def time_ratio(opponents: Mapping, name: str) -> float | None:
    """An opponent's median / that of fused: of the graphs where both have one, else of the calls."""
    if name not in opponents or "fused" not in opponents:
        return None
    opponent, fused = opponents[name], opponents["fused"]
    kind = "graph_ms" if opponent["graph_ms"] and fused["graph_ms"] else "ms"
    return opponent[kind]["median"] / fused[kind]["median"]


def best_opponent(opponents: Mapping) -> tuple[str | None, float | None]:
    """The fastest of ``RIVALS`` against "fused", and its median / that of fused; (None, None) without one."""
    ratios = {name: ratio for name in RIVALS if (ratio := time_ratio(opponents, name)) is not None}
    best = min(ratios, key=ratios.get, default=None)
    return best, ratios.get(best)

"""The benchmark's result file, schema 3: what it holds, and ``validate``, which a file must pass.

A file is one run: how it was measured, and one cell for every thing that was. ``REPORT`` declares the fields
and their values; ``_check_cell`` adds the rules between the fields of a cell.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SCHEMA = 3  # raise it when a field changes its meaning
LEVELS = ("kernel", "token", "channel", "block", "model")
DTYPES = ("bfloat16", "float16", "float32", "autocast")
DIRECTIONS = ("forward", "forward_backward")
FUSED = ("fused", "fused_lean", "fused_frozen")
RIVALS = ("eager", "compile", "compile_max_autotune")  # the same block in PyTorch: what a ratio is taken to
RACED_AT = ("channel", "block")  # the levels at which designs race
# The ops that have designs with tiles.
DESIGNED = ("channel_fc1", "channel_fc2", "channel_mlp_hidden_bwd", "channel_mlp_hidden_bwd_recompute")
OPPONENTS = (*FUSED, *RIVALS, "lucidrains", "cublas", "copy", "flax", "vit")


class SchemaError(ValueError):
    """A result file that is not what this version writes; the message names the place in it."""


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


def is_design(name: str) -> bool:
    """Whether it is the name of a design among those who race: "op=design", or several with commas."""
    return "=" in name


def short_model(name: str) -> str:
    """B/16 for mixer_b16_224; another name as it is."""
    match = re.fullmatch(r"mixer_([a-z])(\d+)_\d+", name)
    return f"{match[1].upper()}/{match[2]}" if match else name


# ---- shapes ----------------------------------------------------------------------------------------------


class Value(NamedTuple):
    """What a value must be: in words, and as what holds for it."""

    expected: str
    fits: Callable[[Any], bool]


class Maybe(NamedTuple):
    """None, or ``shape``."""

    shape: Shape


class Each(NamedTuple):
    """An object with any names, whose values all have one shape."""

    shape: Shape


# A dictionary is an object with exactly its names, of which "name?" may be absent; [shape] is a list.
Shape = Value | Maybe | Each | dict[str, Any] | list


def one_of(*choices: str | int) -> Value:
    return Value(f"one of {choices}", choices.__contains__)


NUMBERS = (int, float)  # and no bool
OBJECT = Value("an object", lambda value: isinstance(value, Mapping))
LIST = Value("a list", lambda value: isinstance(value, list))
TEXT = Value("a str", lambda value: isinstance(value, str))
BOOL = Value("a bool", lambda value: isinstance(value, bool))
COUNT = Value("a whole number, 0 or more", lambda value: type(value) is int and value >= 0)
NUMBER = Value("a finite number", lambda value: type(value) in NUMBERS and math.isfinite(value))
POSITIVE = Value("a finite number above 0", lambda value: type(value) in NUMBERS and 0 < value < math.inf)


def check(shape: Shape, value: Any, place: str) -> None:
    """Raises SchemaError, naming the place in the file, unless ``value`` has the shape."""
    if isinstance(shape, Maybe):
        if value is not None:
            check(shape.shape, value, place)
        return
    expected, fits = shape if isinstance(shape, Value) else LIST if isinstance(shape, list) else OBJECT
    if not fits(value):
        raise SchemaError(f"{place} must be {expected}, got {value!r:.80}")
    if isinstance(shape, list):
        for index, item in enumerate(value):
            check(shape[0], item, f"{place}[{index}]")
    elif isinstance(shape, Each):
        for name, item in value.items():
            check(shape.shape, item, f"{place}.{name}")
    elif isinstance(shape, dict):
        fields = {name.removesuffix("?"): field for name, field in shape.items()}
        if missing := shape.keys() & fields.keys() - value.keys():
            raise SchemaError(f"{place} lacks {', '.join(sorted(missing))}")
        if unknown := value.keys() - fields.keys():
            raise SchemaError(f"{place} has unknown fields: {', '.join(sorted(map(str, unknown)))}")
        for name, item in value.items():
            check(fields[name], item, f"{place}.{name}")


# ---- the file --------------------------------------------------------------------------------------------

STATS = {"median": POSITIVE, "p20": POSITIVE, "p80": POSITIVE, "calls": COUNT}  # ms of a call
OPPONENT = {
    "ms": STATS,  # between two CUDA events, or by the clock on the wall
    "graph_ms": Maybe(STATS),  # replayed from a CUDA graph
    **dict.fromkeys(("peak_bytes", "launches"), Maybe(COUNT)),
    **dict.fromkeys(("tflop_per_s", "gb_per_s", "share_of_roofline", "images_per_s"), Maybe(NUMBER)),
    # Its own, where it is another network than the cell's ("vit"); otherwise None: the cell's count.
    **dict.fromkeys(("flops", "parameters"), Maybe(COUNT)),
}
PARITY = {
    "ok": BOOL,
    "tensor": TEXT,  # the one nearest its bound, whose figures these are
    **dict.fromkeys(("error_fused", "error_eager", "error_bound", "ratio"), Maybe(NUMBER)),
    **dict.fromkeys(("max_fused", "max_eager", "max_bound"), Maybe(NUMBER)),
    "misplaced": COUNT,
    "ratios": Each(Maybe(NUMBER)),  # error_fused / error_eager of every tensor
    "failed": [TEXT],
}
CLOCKS = Maybe(dict.fromkeys(("before", "after"), Maybe(Each(TEXT))))
CELL = {
    "level": one_of(*LEVELS),
    "op": Maybe(TEXT),
    "model": TEXT,
    "batch": COUNT,
    "dtype": one_of(*DTYPES),
    "direction": one_of(*DIRECTIONS),
    "device": one_of("cuda", "cpu"),
    "ok": BOOL,  # the gate was green and the fused side was timed
    "attempts?": COUNT,  # how often the case was begun; with --resume a failed one is begun twice
    "parity": Each(PARITY),
    "errors": Each(TEXT),
    "flops": COUNT,
    "bytes": COUNT,
    "parameters": Maybe(COUNT),
    "opponents": {f"{name}?": OPPONENT for name in OPPONENTS},
    "designs?": Each(OPPONENT),  # by "op=design"
    "predicted_ms": Each(NUMBER),
    "ratio_to_best": Maybe(POSITIVE),  # best opponent's median / fused median: above 1 fused is faster
    "best_opponent": Maybe(one_of(*RIVALS)),
    "clocks": CLOCKS,
}
ENVIRONMENT = {
    "gpu": TEXT,
    "cpu?": Maybe(TEXT),
    "nvidia_smi": Maybe(Each(TEXT)),
    "cuda": Maybe(TEXT),
    "hip": Maybe(TEXT),
    "versions": Each(Maybe(TEXT)),
    "commit": Maybe(TEXT),
    "dirty": Maybe(BOOL),
}
# What may be absent (?): dtypes that were not measured, and fields that older files lack.
PRODUCT = {"product_tflop_per_s": POSITIVE}
CEILINGS = {"copy_gb_per_s": POSITIVE, **{f"{dtype}?": PRODUCT for dtype in DTYPES}}
REPORT = {
    "schema": one_of(SCHEMA),
    "kind": one_of("bench"),
    "started": TEXT,
    "updated": TEXT,
    "complete": BOOL,
    "environment": ENVIRONMENT,
    "protocol": OBJECT,
    "ceilings": Maybe(CEILINGS),
    "clocks": CLOCKS,
    "footnotes": Each(TEXT),
    "cells": [CELL],
}

# What the figures mean: the footnotes that every file carries.
FOOTNOTES = {
    "ms": "milliseconds of a call: on a GPU between two CUDA events, the calls enqueued in bursts after one "
    "that is not timed, so the longer of the GPU's time and the host's to launch; on a CPU by the clock on "
    "the wall. Median, p20, p80",
    "graph_ms": "milliseconds of a call inside a CUDA graph that holds one call for every input, up to 512: "
    "no launch costs the host anything; none of calls above 20 ms. The fused side packs its weights, those "
    "that it does not read as they are, in every call there, because a graph's replays must follow the "
    "weights; the ms of a forward holds no packing, and nothing at level kernel does. compile_max_autotune "
    "is captured without its own CUDA graphs",
    "inputs": "random normal numbers, on a GPU rotated through twice the L2 cache's size, at level model "
    "through up to 4 batches of images, at level kernel up to 128 inputs. Smaller ones may stay in L2 where "
    "these limits, or the 512 calls of a CUDA graph, come first; flax always has one input, and at level "
    "kernel cublas and copy have buffers of their own. The weights may stay in L2",
    "flops": "token 4 B S C D, channel 4 B S C E, block their sum, model: its blocks, patch embedding and "
    "head; three times that with a backward. Recomputed products do not count as work done. At level kernel "
    "the products that the kernel does, recomputed ones too; padding never counts",
    "bytes": "itemsize * (2 B S C + parameters): x and weights read once, y written once. With a backward "
    "itemsize * (5 B S C + 3 parameters): it starts when all of y exists, and x and weights do not stay on "
    "the chip so long, so they are read again; the gradient of y read, those of x and the weights written. A "
    "model: 2 or 5 B S C a block and for the embedding and the head together, and the images likewise. At "
    "level kernel every tensor that the launch is given, once. Tensors are fp32 under autocast",
    "rates": "tflop_per_s and gb_per_s: flops and bytes over the median, graph_ms's where there is one; of "
    "copy no flops, of cublas no bytes, and of neither a share of the roofline",
    "share_of_roofline": "max(flops / product_tflop_per_s, bytes / copy_gb_per_s) over the median, "
    "graph_ms's where there is one; the ceilings are this file's, measured in the same run",
    "ratio_to_best": "median of the best of eager, compile and compile_max_autotune over that of fused, of "
    "graph_ms where both have one: above 1 fused is faster",
    "parity": "err = ||a - truth|| / ||truth|| with an fp64 truth; err_fused <= 1.25 err_eager + 8 eps, "
    "max_fused <= 2 max_eager + 16 eps max |truth|; for the output and each gradient on its own, at level "
    "model the logits and the images' gradient, of up to 64 samples spread over the batch. The figures are "
    "those of the tensor nearest its bound",
    "peak_bytes": "max_memory_allocated during one call after a warm-up, minus what was allocated before: "
    "what is kept for the backward, temporaries, packed weights, the output and the gradients; not the "
    "inputs, the weights and what fused_frozen packed before. compile_max_autotune is weighed without CUDA "
    "graphs",
    "launches": "kernels that the profiler saw in one call, without copies and fills",
    "fused": "the weights are packed in every call, by a launch of its own; fused_frozen packed them before. "
    "fused_lean keeps no pre-activation. The halves and kernels are fastmixer's own launches even where a "
    "block would choose PyTorch for them",
    "kernel": "a launch of a fused block, run again on the buffers it was recorded with; its gate is the "
    "block's. cublas: the bare product on random matrices; copy: as many bytes as the launch is given",
    "channel": "alone, the half computes its row moments; inside a block the token half leaves them",
    "cublas": "the channel half's matrix products alone, 2 forward and 4 more backward",
    "copy": "the token half's activations moved and nothing else: a copy, with a backward also an addition",
    "lucidrains": "mlp-mixer-pytorch's modules built with the case's sizes and random weights of their own",
    "flax": "flax.linen, jitted, forward only: time on the wall until the result is ready, host included",
    "vit": "timm's ViT of the same size, patch and images: another network, with flops and parameters of its "
    "own",
    "designs": "fused, with an op or several forced to run by that design, all of them and the opponents in "
    "turns; each has passed the gate of fused by itself. A design that recomputes runs with lean memory. ms "
    "holds 5 us for forcing it, graph_ms nothing",
    "predicted_ms": "of fused, by fastmixer's cost model: the sum of its launches, each under its name too, "
    "without packing weights, sums of partials and what the host takes; of a model its blocks alone",
}


def validate(report: object) -> None:
    """Raises SchemaError, naming the first place that is wrong, unless ``report`` is a schema 3 report."""
    if isinstance(report, Mapping) and report.get("schema") != SCHEMA:
        raise SchemaError(f"report.schema must be {SCHEMA}, got {report.get('schema')!r}")
    check(REPORT, report, "report")
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
    if not ok and (opponents or cell.get("designs")):
        raise SchemaError(f"{place}.opponents must be empty: the cell is not ok, so nothing is timed")
    if ok and "fused" not in opponents:
        raise SchemaError(f"{place}.opponents lacks fused, but the cell is ok")
    red = [name for name, parity in cell["parity"].items() if name.startswith("fused") and not parity["ok"]]
    if ok and red:
        raise SchemaError(f"{place}.ok must be false: the parity of {', '.join(red)} is red")
    if ok and (cell["level"] == "kernel") != (cell["op"] is not None):
        raise SchemaError(f"{place}.op must name a kernel at level kernel and be null elsewhere")
    designs = cell.get("designs", {})
    if wrong := [name for name in designs if not cell["parity"].get(name, {"ok": False})["ok"]]:
        raise SchemaError(f"{place}.designs must not have {', '.join(wrong)}: the parity is not green")
    for group, timed in (("opponents", opponents), ("designs", designs)):
        for name, kind in itertools.product(timed, ("ms", "graph_ms")):
            stats = timed[name][kind]
            if stats and not stats["p20"] <= stats["median"] <= stats["p80"]:
                raise SchemaError(f"{place}.{group}.{name}.{kind} must have p20 <= median <= p80")
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


def troubles(cell: Mapping) -> list[str]:
    """What went wrong in a cell: whose it is, and how."""
    untimed = "" if cell["ok"] else "; not timed"
    red = {name: verdict["failed"] for name, verdict in cell["parity"].items() if not verdict["ok"]}
    failed = [f"{name}: parity failed in {', '.join(tensors)}{untimed}" for name, tensors in red.items()]
    return failed + [f"{name}: {error}" for name, error in cell["errors"].items()]

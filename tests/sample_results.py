"""Result files for the tests of the report. Nobody measured these figures."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.schema import SCHEMA, best_opponent, validate

GPU = "Sample GPU"
SLUG = "sample-gpu"
MODELS = {
    "mixer_s32_224": (0.5, 19_000_000),
    "mixer_s16_224": (1.0, 18_000_000),
    "mixer_b32_224": (1.0, 60_000_000),
    "mixer_b16_224": (2.0, 59_000_000),
    "mixer_l32_224": (3.0, 206_000_000),
    "mixer_l16_224": (6.0, 208_000_000),
    "mixer_h14_224": (12.0, 432_000_000),
}
OPS = ("row_moments", "token_mixing", "channel_fc1", "channel_fc2")
# Of fused at batch 100 a block of a model of size 1: milliseconds, GFLOP, MB.
WORK = {
    "kernel": (0.25, 25, 100),
    "token": (0.5, 50, 200),
    "channel": (1.0, 400, 400),
    "block": (2.0, 450, 600),
}
WORK["model"] = (24.0, 5400, 7200)
SLOWER = {"fused": 1.0, "eager": 2.0, "compile": 1.6, "compile_max_autotune": 1.25}
CEILINGS = {dtype: {"product_tflop_per_s": 1000.0} for dtype in ("bfloat16", "float16")}
CEILINGS |= {"float32": {"product_tflop_per_s": 100.0}, "copy_gb_per_s": 4000.0}


def stats(milliseconds: float, spread: float = 0.01) -> dict:
    return {
        "median": milliseconds,
        "p20": milliseconds * (1 - spread),
        "p80": milliseconds * (1 + spread),
        "calls": 100,
    }


def opponent(milliseconds: float, cell: dict, **fields) -> dict:
    flops, moved = cell["flops"], cell["bytes"]
    floor = max(flops / 1e12, moved / 4e9)
    figures = {
        "ms": stats(milliseconds),
        "graph_ms": stats(milliseconds * 0.9),
        "peak_bytes": int(1e8 * milliseconds),
        "launches": 4,
        "tflop_per_s": flops / milliseconds / 1e9,
        "gb_per_s": moved / milliseconds / 1e6,
        "share_of_roofline": floor / milliseconds,
        "images_per_s": cell["batch"] / milliseconds * 1e3 if cell["level"] == "model" else None,
        "flops": None,
        "parameters": None,
    }
    return figures | fields


def cell(model="mixer_b16_224", level="block", batch=100, direction="forward", scale=1.0, **fields) -> dict:
    """A green cell; ``scale`` multiplies all its times, ``fields`` replace what it holds."""
    size, parameters = MODELS[model]
    passes = 1 if direction == "forward" else 3
    time, flops, megabytes = (figure * size * passes * batch / 100 for figure in WORK[level])
    verdict = {
        "ok": True,
        "tensor": "output",
        "misplaced": 0,
        "ratio": 0.9,
        "ratios": {"output": 0.9},
        "failed": [],
    }
    names = ("error_fused", "error_eager", "max_fused", "max_eager", "error_bound", "max_bound")
    found = {
        "level": level,
        "op": "channel_fc1" if level == "kernel" else None,
        "model": model,
        "batch": batch,
        "dtype": "bfloat16",
        "direction": direction,
        "device": "cuda",
        "ok": True,
        "parity": {"fused": verdict | dict.fromkeys(names, 0.001)},
        "errors": {},
        "flops": int(flops * 1e9),
        "bytes": int(megabytes * 1e6 / size**0.5),
        "parameters": parameters if level == "model" else None,
        "predicted_ms": {"fused": time * 0.8},
        "clocks": None,
    } | fields
    raced = {name: opponent(time * scale * slower, found) for name, slower in SLOWER.items()}
    raced["eager"]["launches"] = 12
    if level == "model":
        own = {"graph_ms": None, "flops": found["flops"] * 2, "parameters": 86_000_000}
        raced["vit"] = opponent(time * scale * 3, found, **own)
    found.setdefault("opponents", raced)
    return judged(found)


def judged(found: dict) -> dict:
    """The cell with the ratio that its times give."""
    found["best_opponent"], found["ratio_to_best"] = best_opponent(found["opponents"])
    return found


def red(**fields) -> dict:
    """A cell whose parity gate is closed."""
    found = cell(**fields)
    found["parity"]["fused"] |= {"ok": False, "failed": ["output"], "ratio": 9.0}
    found["errors"] = {"timer": "not asked: the gate is red"}
    return judged(found | {"ok": False, "opponents": {}})


def run(cells=None, *, updated="2001-02-03T04:05:06+00:00", gpu=GPU, **fields) -> dict:
    """A complete result of the given cells, by default one block."""
    report = {
        "schema": SCHEMA,
        "kind": "bench",
        "started": "2001-02-03T04:00:00+00:00",
        "updated": updated,
        "complete": True,
        "environment": {
            "gpu": gpu,
            "nvidia_smi": {"driver_version": "100.00", "power.limit": "700.00 W"},
            "cuda": "10.0",
            "hip": None,
            "versions": {"torch": "100.0", "triton": "100.0", "flax": None},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "dirty": False,
        },
        "protocol": {"rounds": 10, "burst": 10},
        "ceilings": CEILINGS,
        "clocks": {"before": {"clocks.sm": "1000 MHz"}, "after": None},
        "footnotes": {"bytes": "read and written once: x, the output and the weights."},
        "cells": [cell()] if cells is None else cells,
    } | fields
    validate(report)
    return report


def full_run() -> dict:
    """Seven models, every level, both directions of the block and the model, two batches."""
    cells = [cell(model, level, 100) for model in MODELS for level in ("token", "channel")]
    cells += [
        cell(model, level, batch, direction)
        for direction in ("forward", "forward_backward")
        for level in ("block", "model")
        for model in MODELS
        for batch in (10, 100)
    ]
    return run([cell(level="kernel", op=op) for op in OPS] + cells)


def write(folder: Path, report: dict, name: str = "bench.json", slug: str = SLUG) -> Path:
    path = folder / slug / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report), encoding="utf-8")
    return path

"""The schema of result files: what it refuses, by name, and what the ratio of a cell must be."""

import copy
import math

import pytest

from benchmarks import schema
from benchmarks.schema import SchemaError, validate

STATS = {"median": 2.0, "p20": 1.9, "p80": 2.1, "calls": 10}
OPPONENT = {
    "ms": STATS, "graph_ms": None, "peak_bytes": 100, "launches": 4, "tflop_per_s": 1.0, "gb_per_s": 1.0,
    "share_of_roofline": 0.5, "images_per_s": None, "flops": None, "parameters": None,
}  # fmt: skip
PARITY = {
    "ok": True, "tensor": "output", "error_fused": 1e-3, "error_eager": 1e-3, "max_fused": 0.1,
    "max_eager": 0.1, "error_bound": 2e-3, "max_bound": 0.2, "misplaced": 0, "ratio": 1.0,
    "ratios": {"output": 1.0}, "failed": [],
}  # fmt: skip


def timed(median: float, graph: float | None = None) -> dict:
    """An opponent with these medians."""

    def stats(value):
        return {"median": value, "p20": value, "p80": value, "calls": 5}

    return {**OPPONENT, "ms": stats(median), "graph_ms": None if graph is None else stats(graph)}


def sample() -> dict:
    cell = {
        "level": "block", "op": None, "model": "mixer_b16_224", "batch": 64, "dtype": "bfloat16",
        "direction": "forward", "device": "cuda", "ok": True, "parity": {"fused": copy.deepcopy(PARITY)},
        "errors": {"vit": "RuntimeError: sample"}, "flops": 10, "bytes": 10, "parameters": 5,
        "opponents": {"fused": timed(1.0), "eager": timed(4.0), "compile": timed(2.0), "copy": timed(0.5)},
        "predicted_ms": {"fc1": 0.5}, "ratio_to_best": 2.0, "best_opponent": "compile", "clocks": None,
    }  # fmt: skip
    return {
        "schema": 3, "kind": "bench", "started": "2026-01-01T00:00:00+00:00",
        "updated": "2026-01-01T00:00:00+00:00", "complete": True,
        "environment": {
            "gpu": "Sample GPU", "nvidia_smi": {"name": "Sample GPU"}, "cuda": "0", "hip": None,
            "versions": {"torch": "0", "timm": None}, "commit": None, "dirty": None,
        },
        "protocol": {"timer": {"rounds": 3}}, "footnotes": {"ms": "milliseconds"},
        "ceilings": {"bfloat16": {"product_tflop_per_s": 700.0}, "copy_gb_per_s": 4000.0},
        "clocks": {"before": {"clocks.sm": "1"}, "after": None}, "cells": [cell],
    }  # fmt: skip


def changed(path: str, value: object) -> dict:
    """The sample with another value at ``path``, as in "cells.0.batch"."""
    report = sample()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = report
    for part in parents:
        place = place[part]
    place[last] = value
    return report


def test_a_sound_report_passes_and_so_does_one_without_a_gpu():
    validate(sample())
    for path in ("ceilings", "clocks", "cells.0.parameters", "environment.nvidia_smi"):
        validate(changed(path, None))
    validate(changed("cells", []))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", 1, "report.schema must be 3, got 1"),
        ("kind", "blocks-forward", "report.kind must be one of"),
        ("complete", "yes", "report.complete must be a bool"),
        ("environment.gpu", None, "report.environment.gpu must be a str"),
        ("environment.host", "name", "report.environment has unknown fields: host"),
        ("footnotes.ms", 3, r"report.footnotes.ms must be a str, got 3"),
        ("ceilings.int8", {"product_tflop_per_s": 1.0}, "report.ceilings has unknown fields: int8"),
        ("ceilings.copy_gb_per_s", 0, "report.ceilings.copy_gb_per_s must be a finite number above 0"),
        ("cells", {}, "report.cells must be a list"),
        ("cells.0.level", "layer", r"report.cells\[0\].level must be one of"),
        ("cells.0.batch", 1.5, r"cells\[0\].batch must be a whole number"),
        ("cells.0.batch", True, r"cells\[0\].batch must be a whole number"),
        ("cells.0.flops", -1, r"cells\[0\].flops must be a whole number"),
        ("cells.0.op", "fc1", r"cells\[0\].op must name a kernel at level kernel"),
        ("cells.0.opponents.tensorflow", timed(1.0), r"opponents has unknown fields: tensorflow"),
        ("cells.0.opponents.eager.ms", None, r"opponents.eager.ms must be an object, got None"),
        ("cells.0.opponents.eager.ms.median", math.nan, r"eager.ms.median must be a finite number"),
        ("cells.0.opponents.eager.ms.p20", 5.0, r"opponents.eager.ms must have p20 <= median <= p80"),
        ("cells.0.opponents.eager.launches", 1.0, r"opponents.eager.launches must be a whole number"),
        ("cells.0.parity.fused.ok", False, r"cells\[0\].ok must be false: the parity of fused is red"),
        (
            "cells.0.parity.fused_graph",
            {**PARITY, "ok": False},
            r"cells\[0\].ok must be false: the parity of fused_graph is red",
        ),
        ("cells.0.ok", False, r"opponents must be empty: the cell is not ok"),
        ("cells.0.ratio_to_best", 3.0, r"ratio_to_best must be 2.0, got 3.0"),
        ("cells.0.ratio_to_best", None, r"ratio_to_best must be 2.0, got None"),
        ("cells.0.best_opponent", "eager", r"best_opponent must be 'compile', got 'eager'"),
        ("cells.0.best_opponent", "copy", r"best_opponent must be one of"),
    ],
)
def test_what_is_wrong_is_named(path, value, message):
    with pytest.raises(SchemaError, match=message):
        validate(changed(path, value))


def test_fields_may_not_be_missing():
    report = sample()
    del report["cells"][0]["errors"], report["cells"][0]["clocks"]
    with pytest.raises(ValueError, match=r"report.cells\[0\] lacks clocks, errors"):
        validate(report)
    with pytest.raises(SchemaError, match="report must be an object"):
        validate([])
    report = sample()
    del report["cells"][0]["opponents"]["fused"]
    with pytest.raises(SchemaError, match="lacks fused"):
        validate(report)


def test_no_cell_comes_twice():
    report = sample()
    report["cells"] *= 2
    with pytest.raises(SchemaError, match=r"cells\[1\] repeats the cell .*mixer_b16_224"):
        validate(report)
    report = sample()
    report["cells"].append({**copy.deepcopy(report["cells"][0]), "batch": 65})
    validate(report)


@pytest.mark.parametrize(
    ("opponents", "best"),
    [
        ({}, (None, None)),
        ({"eager": timed(4.0)}, (None, None)),
        ({"fused": timed(1.0), "copy": timed(0.1), "lucidrains": timed(0.5)}, (None, None)),
        ({"fused": timed(2.0), "eager": timed(1.0)}, ("eager", 0.5)),
        # Graphs where both sides have one: 0.5 / 0.25; otherwise the plain times.
        ({"fused": timed(1.0, 0.25), "eager": timed(9.0, 0.5), "compile": timed(3.0)}, ("eager", 2.0)),
    ],
)
def test_the_best_is_of_pytorchs_own_and_of_like_times(opponents, best):
    assert schema.best_opponent(opponents) == best

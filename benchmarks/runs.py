"""A run: case after case into one file, which a kill, an error or the time limit leaves with all it has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import cells, files, schema
from .cells import Bench
from .footnotes import FOOTNOTES
from .levels import Case

SAME = ("kind", "schema", "stage", "environment", "protocol")  # in a partial file that may be continued


def run(
    cases: Sequence[Case],
    bench: Bench,
    output: Path,
    *,
    header: dict,
    stage: str | None = None,
    resume: bool = False,
    seconds: float = float("inf"),
    log: Callable[[str], None] = print,
) -> dict:
    """Measures every case, and returns the report: in ``output`` if complete, else in its partial file.

    While it runs, the report so far is in ``files.partial_path(output)``, so that a killed run neither loses
    its cells nor overwrites a complete report.

    Args:
        header: "environment", "protocol", "ceilings" and "clocks" of the report.
        resume: take over the partial file's cells, if it is of the same code on the same machine. Cases whose
            fused side could not be timed are tried again, after all others.
        seconds: no case is begun when the longest so far would end after this many seconds.
    """
    partial, began = files.partial_path(output), time.monotonic()
    report = new_report(header, stage)
    if resume:
        report |= resumable(partial, report)
    order = _in_order(cases, report["cells"])
    log(table_head())
    for cell in report["cells"]:
        log(table_row(cell))
    longest = 0.0
    for index, case in enumerate(order):
        now = time.monotonic() - began
        if index and now + longest > seconds:
            log(f"time limit: {len(order) - index} of {len(order)} cases left, to be had with --resume")
            return report
        found = cells.measure_case(case, bench)
        report["cells"] = [cell for cell in report["cells"] if _case_key(cell) != case.key] + found
        report["updated"] = files.now()
        files.write_atomically(partial, report)
        longest = max(longest, time.monotonic() - began - now)
        for cell in found:
            log(table_row(cell))
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    report["complete"] = True
    report["clocks"] = _with_end(report["clocks"], bench.device)
    schema.validate(report)
    files.write_atomically(output, report)
    partial.unlink(missing_ok=True)
    return report


def new_report(header: dict, stage: str | None) -> dict:
    """A report without cells."""
    now = files.now()
    report = {"schema": schema.SCHEMA, "kind": "bench", "started": now, "updated": now, "complete": False}
    return {**report, "stage": stage, **header, "footnotes": FOOTNOTES, "cells": []}


def resumable(partial: Path, report: dict) -> dict:
    """What to take over from an earlier, killed run of the same code on the same machine: its cells.

    Its ceilings too, which their shares of the roofline refer to. Nothing if the file is not valid, or if
    either run's code was not committed.
    """
    try:
        earlier = json.loads(partial.read_text(encoding="utf-8"))
        schema.validate(earlier)
    except (OSError, ValueError):
        return {}
    if any(earlier[key] != report[key] for key in SAME) or report["environment"]["dirty"]:
        return {}
    return {key: earlier[key] for key in ("started", "ceilings", "clocks", "cells")}


def _in_order(cases: Sequence[Case], done: Sequence[dict]) -> list[Case]:
    """What is left to measure: first what was never tried, then what did not succeed."""
    succeeded: dict[tuple, bool] = {}
    for cell in done:
        key = _case_key(cell)
        succeeded[key] = succeeded.get(key, True) and cell["ok"]
    left = [case for case in cases if not succeeded.get(case.key, False)]
    return sorted(left, key=lambda case: case.key in succeeded)


def _case_key(cell: dict) -> tuple:
    return tuple(cell[name] for name in ("level", "model", "batch", "dtype", "direction"))


def _with_end(clocks: dict | None, device: torch.device) -> dict | None:
    from . import measure

    return None if clocks is None else {**clocks, "after": measure.clocks(device)}


# ---- the table on the screen -----------------------------------------------------------------------------


def table_head() -> str:
    """The titles over the rows of ``table_row``."""
    return (
        f"{'level':<8}{'model':<15}{'batch':>5}  {'dtype':<9}{'direction':<18}{'parity':>7}{'fused ms':>11}"
        f"{'roofline':>9}{'of best':>9}  opponents' ms, of CUDA graphs where there are any"
    )


def table_row(cell: dict) -> str:
    """A cell as one line under ``table_head``, with what went wrong behind it."""
    parity, entries = cell["parity"].get("fused"), dict(cell["opponents"])
    ratio = "-" if parity is None or parity["ratio"] is None else f"{parity['ratio']:.2f}"
    fused = entries.pop("fused", None)
    share = fused and fused["share_of_roofline"]
    best = cell["ratio_to_best"]
    line = f"{cell['level']:<8}{cell['model']:<15}{cell['batch']:>5}  {cell['dtype']:<9}"
    line += f"{cell['direction']:<18}{ratio:>7}{_ms(fused):>11}{f'{share:.0%}' if share else '-':>9}"
    line += f"{f'{best:.2f}x' if best else '-':>9}  "
    parts = [cell["op"]] if cell["op"] else []
    parts += [f"{name} {_ms(entry)}" for name, entry in entries.items()]
    for name, found in cell["parity"].items():
        if name.startswith("fused") and not found["ok"]:
            parts.append(f"PARITY FAILED, not timed: {name}: {', '.join(found['failed'])}")
    return line + ", ".join(parts + [f"{name}: {error}" for name, error in cell["errors"].items()])


def _ms(entry: dict | None) -> str:
    return "-" if entry is None else f"{(entry['graph_ms'] or entry['ms'])['median']:.4f}"

"""A run: case after case into one file, which a kill, an error or the time limit leaves with all it has."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from fastmixer.usage import UsageError

from . import cells, files, measure, schema
from .cells import Bench
from .levels import Case

SAME = ("kind", "schema", "environment", "protocol")  # in a partial file that may be continued
MOST_ATTEMPTS = 2  # at a case that fails or kills the process: more would keep a resumed run from its end
CASE_KEY = ("level", "model", "batch", "dtype", "direction")
OTHERWISE = "; run without --resume for a new file, or name another with --output"


def run(
    cases: Sequence[Case],
    bench: Bench,
    output: Path,
    *,
    header: dict,
    resume: bool = False,
    seconds: float = float("inf"),
    began: float | None = None,
    final: bool = False,
    log: Callable[[str], None] = print,
) -> dict:
    """Measures every case, and returns the report: in ``output`` if complete, else in its partial file.

    While it runs, the report so far is in ``files.partial_path(output)``, so that a killed run neither loses
    its cells nor overwrites a complete report.

    Args:
        header: "environment", "protocol", "ceilings" and "clocks" of the report.
        resume: take over the partial file's cells. Cases whose fused side could not be timed are tried once
            more, after all others.
        seconds: no case is begun when the longest so far would end after this many seconds.
        began: ``time.monotonic()`` from which they count; by default now.
        final: a run that the time limit ends is complete; "protocol" lists the cases it skipped.

    Raises UsageError, with nothing measured or written, for a partial file that is there and may not be
    continued: of other code, another machine, other cases or options, or without ``resume``.
    """
    partial, began = files.partial_path(output), time.monotonic() if began is None else began
    values = dict(zip(CASE_KEY, zip(*(case.key for case in cases), strict=True), strict=True))
    asked = {"count": len(cases), **{name: sorted(set(several)) for name, several in values.items()}}
    report = new_report({**header, "protocol": {**header["protocol"], "cases": asked}})
    if partial.exists():
        if not resume:
            raise UsageError(f"{partial} holds an unfinished run: --resume continues it; or move it away")
        report |= _resumed(partial, report)
    bench = replace(bench, ceilings=report["ceilings"])  # of the whole file, its earlier cells too
    order, skipped = _in_order(cases, report["cells"]), []
    log(table_head())
    for cell in report["cells"]:
        log(table_row(cell))
    longest = 0.0
    for index, case in enumerate(order):
        now = time.monotonic() - began
        if index and now + longest > seconds:
            skipped = order[index:]
            outcome = "skipped" if final else "left, to be had with --resume"
            log(f"time limit: {len(skipped)} of {len(order)} cases {outcome}")
            break
        for cell in _attempt(case, bench, report, partial):
            log(table_row(cell))
        longest = max(longest, time.monotonic() - began - now)
        if bench.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError as error:  # one that no later call of this process gets rid of
                reason = cells.described(error)
                log(f"the GPU fails for good in this process ({reason}): stopped; --resume continues")
                return report
    if skipped and not final:
        return report
    if skipped:
        report["protocol"]["skipped"] = [" ".join(map(str, case.key)) for case in skipped]
    report["complete"] = True
    if report["clocks"] is not None:
        report["clocks"] = {**report["clocks"], "after": measure.clocks(bench.device)}
    schema.validate(report)
    files.write_atomically(output, report)
    partial.unlink(missing_ok=True)
    return report


def _attempt(case: Case, bench: Bench, report: dict, partial: Path) -> list[dict]:
    """Measures the case into the report and its file, which says so before: a case may kill the process."""
    before = report["cells"]
    others = [cell for cell in before if _case_key(cell) != case.key]
    attempts = {"attempts": 1 + _attempts(before).get(case.key, 0)}
    begun = cells.empty_cell(case, bench.device) | attempts | {"errors": {"case": "begun, not finished"}}
    report["cells"] = [*others, begun]
    files.write_atomically(partial, report)
    try:
        measured = cells.measure_case(case, bench)
    except KeyboardInterrupt:  # no fault of the case
        report["cells"] = before
        files.write_atomically(partial, report)
        raise
    report["cells"] = others + [cell | attempts for cell in measured]
    report["updated"] = files.now()
    files.write_atomically(partial, report)
    return measured


def new_report(header: dict) -> dict:
    """A report without cells."""
    now = files.now()
    report = {"schema": schema.SCHEMA, "kind": "bench", "started": now, "updated": now, "complete": False}
    return {**report, **header, "footnotes": schema.FOOTNOTES, "cells": []}


def _resumed(partial: Path, report: dict) -> dict:
    """What to take over from an earlier, killed run of the same code on the same machine: its cells.

    Its ceilings too, which their shares of the roofline refer to. UsageError if the file is not valid,
    if it is of another run, or if the code has changes that no commit holds.
    """
    try:
        earlier = json.loads(partial.read_text(encoding="utf-8"))
        schema.validate(earlier)
    except (OSError, ValueError) as error:
        raise UsageError(f"{partial} cannot be continued, it is not valid: {error}{OTHERWISE}") from error
    reasons = [reason for name in SAME for reason in _changes(name, earlier[name], report[name])]
    if report["environment"]["dirty"]:
        reasons.append("the code has changes that are not committed")
    if reasons:
        raise UsageError(f"{partial} cannot be continued: {'; '.join(reasons)}{OTHERWISE}")
    return {key: earlier[key] for key in ("started", "ceilings", "clocks", "cells")}


def _changes(place: str, was: object, now: object) -> list[str]:
    """A line for everything at and below ``place`` that is not the same."""
    if isinstance(was, dict) and isinstance(now, dict):
        return [line for n in {**was, **now} for line in _changes(f"{place}.{n}", was.get(n), now.get(n))]
    return [f"{place} was {was!r:.80}, is {now!r:.80}"] if was != now else []


def _in_order(cases: Sequence[Case], done: Sequence[dict]) -> list[Case]:
    """What is left to measure: first what was never tried, then what did not succeed, if not too often."""
    attempts = _attempts(done)
    succeeded = attempts.keys() - {_case_key(cell) for cell in done if not cell["ok"]}
    left = [c for c in cases if c.key not in succeeded and attempts.get(c.key, 0) < MOST_ATTEMPTS]
    return sorted(left, key=lambda case: attempts.get(case.key, 0))


def _attempts(done: Sequence[dict]) -> dict[tuple, int]:
    """How often each case was begun."""
    return {_case_key(cell): cell.get("attempts", 1) for cell in done}


def _case_key(cell: Mapping) -> tuple:
    return tuple(cell[name] for name in CASE_KEY)


# ---- the table on the screen -----------------------------------------------------------------------------

LINE = "{:<8}{:<15}{:>5}  {:<9}{:<18}{:>7}{:>9}{:>9}  {}"


def table_head() -> str:
    """The titles over the rows of ``table_row``."""
    times = "ms as called, host included / in a CUDA graph = how many times longer"
    return LINE.format(*CASE_KEY, "parity", "roofline", "of best", times)


def table_row(cell: dict) -> str:
    """A cell as one line under ``table_head``, with what went wrong behind it."""
    ratio = cell["parity"].get("fused", {}).get("ratio")
    share = cell["opponents"].get("fused", {}).get("share_of_roofline")
    best = cell["ratio_to_best"]
    parts = [cell["op"]] if cell["op"] else []
    parts += [f"{name} {_times(entry)}" for name, entry in cell["opponents"].items()]
    parts += schema.troubles(cell)
    figures = ["-" if ratio is None else f"{ratio:.2f}"]
    figures += [f"{share:.0%}" if share else "-", f"{best:.2f}x" if best else "-"]
    return LINE.format(*_case_key(cell), *figures, ", ".join(parts))


def _times(entry: dict) -> str:
    ms, graph = entry["ms"]["median"], entry["graph_ms"]
    return f"{ms:.4f}" + (f" / {graph['median']:.4f} = {ms / graph['median']:.2f}x" if graph else "")

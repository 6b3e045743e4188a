"""summary.json and summary.txt: what lies in the folder of results, as one object and as a person reads it.

Both are made anew from the disk each time. A file that cannot be read is named and hides no other.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

from ..recorded import Run, cells_of, replaced
from ..schema import RIVALS, validate
from ..tables import gpu_report
from .plan import Stage
from .runner import CUT, NO_TIME, NOT_HERE, OK, RUNNING

QUIET = (OK, RUNNING, CUT, NO_TIME, NOT_HERE)  # states that need no explanation from a log
LOG_LINES = 6
NO_FIGURES = ("what", "ok", "failed")  # of a row
# Of what ncu tells of a kernel.
METRICS = ("Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Hit Rate",
           "Achieved Occupancy", "Registers Per Thread", "Issue Slots Busy", "No Eligible",
           "Warp Cycles Per Issued Instruction", "SM Frequency")  # fmt: skip


def write(
    out: Path, head: Mapping[str, object], planned: list[Stage], outcomes: Mapping[str, Mapping]
) -> None:
    """Replaces both files.

    Args:
        head: what is known of the run as a whole; "dry run" and "interrupted" are looked at.
        planned, outcomes: the stages, and of those so far what came of them.
    """
    stages = {stage.name: outcomes.get(stage.name) for stage in planned}
    results = {**head, "stages": stages, **collect(out)}
    texts = {
        "summary.json": json.dumps(results, indent=1, default=_plain) + "\n",
        "summary.txt": text(results, {stage.name: stage.expected for stage in planned}),
    }
    for name, content in texts.items():
        with replaced(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")


def _plain(value: object) -> object:
    """A file of bench as it is; each cell also says how many times fused's time each opponent takes."""
    if not isinstance(value, Run):
        return str(value)
    cells = []
    for cell in cells_of(value):
        ratios = {name: cell.ratio(name) for name in cell.opponents if name != "fused"}
        cells.append({"what": str(cell.key), "times_fused": ratios, **cell.content})
    return {**value.content, "cells": cells}


def collect(out: Path) -> dict:
    """What the stages have left: {"environment", "rows" of each stage, "bench", "tuned", "unreadable"}."""
    results: dict = {"environment": None, "rows": {}, "bench": {}, "tuned": [], "unreadable": {}}
    for pattern in ("results/*", "logs/ncu.log", "bench/*/*.json", "tuned/configs/*.json"):
        for path in sorted(out.glob(pattern)):
            try:
                _read(path, path.relative_to(out).parts[0], results)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                results["unreadable"][str(path.relative_to(out))] = f"{type(error).__name__}: {error}"
    results["bench"] = dict(sorted(results["bench"].items(), key=lambda item: item[1].content["started"]))
    return results


def _read(path: Path, folder: str, results: dict) -> None:
    content = path.read_text(encoding="utf-8", errors="strict" if folder == "bench" else "replace")
    if folder == "logs":
        results["rows"][path.stem] = _metrics(content)
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.split("\n")[:-1]]  # a process may have died in the last
        results["rows"][path.stem] = [{"what": row["what"], "ok": row["ok"], **row} for row in rows]
    elif folder == "bench":
        validate(json.loads(content))
        results["bench"][path.name] = Run(path, json.loads(content))
    elif folder == "tuned":
        results["tuned"] += _object(content)["entries"]
    else:
        results["environment"] = _object(content)


def _object(text: str) -> dict:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {text[:80]}")
    return value


def _metrics(log: str) -> list[dict]:
    """A row for each kernel in the CSV of ncu, which stands between what else it says."""
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(line for line in log.splitlines() if line.startswith('"')):
        if row["Metric Name"] in METRICS and row["Metric Value"]:
            name = row["Kernel Name"].partition("(")[0]
            value = f"{row['Metric Value']} {row['Metric Unit']}".strip()
            kernels.setdefault(name, {"what": name, "ok": True})[row["Metric Name"]] = value
    return list(kernels.values())


# ---- as a person reads it --------------------------------------------------------------------------------


def text(results: Mapping, expected: Mapping[str, str]) -> str:
    """summary.txt of what ``collect`` returns. expected: the state of each stage that did what it should."""
    lines: list[str] = []
    for part in (_head, _stages, _rows, _losses, _bench, _tuned, _failures):
        try:
            section = part(results, expected)
            lines += [*section, ""] if section else []
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # rows of another form
            lines += [f"({part.__name__.strip('_')} cannot be shown: {type(error).__name__}: {error})", ""]
    return "\n".join(lines)


def _head(results: Mapping, _: Mapping) -> list[str]:
    run = [f"{name} {results[name]}" for name in ("plan", "gpu", "seconds", "commit") if results.get(name)]
    lines = ["fastmixer evidence: " + ", ".join(run)]
    if results.get("dry run"):
        lines.append("A DRY RUN ON A CPU: it shows that the plumbing works, and no figure means anything")
    if results.get("interrupted"):
        lines.append("INTERRUPTED")
    environment = results["environment"] or {"environment": "not known"}
    flat = {name: value for name, value in environment.items() if not isinstance(value, dict)}
    for name in ("versions", "nvidia_smi", "now"):
        flat |= environment.get(name) or {}
    return lines + [f"  {name}: {value}" for name, value in flat.items() if value is not None]


def _stages(results: Mapping, expected: Mapping) -> list[str]:
    lines = ["stages"]
    for name, outcome in results["stages"].items():
        if outcome is None:
            lines.append(f"  {name:<20}not begun")
            continue
        state = outcome["state"] + (", as planned" if outcome["state"] == expected.get(name) != OK else "")
        lines.append(f"  {name:<20}{state:<24}{outcome['seconds']:>6.0f} of {outcome['limit']:.0f} s")
    return lines


def _rows(results: Mapping, _: Mapping) -> list[str]:
    """What stages noted of each check; parity first."""
    lines = ["checks: of parity the ratio of the error against fp64 to eager's, of what is nearest its bound"]
    for name, rows in sorted(results["rows"].items(), key=lambda item: item[0] != "smoke"):
        wrong = [row for row in rows if not row["ok"]]
        lines.append(f"  {name}: {len(rows)} rows, {len(wrong)} WRONG OR FAILED")
        for row in rows:
            told = [f"{k} {v}" for k, v in row.items() if k not in NO_FIGURES and v not in (None, "")]
            lines.append(f"    {'' if row['ok'] else 'NOT OK  '}{row['what']}: {', '.join(told)}")
            lines += [f"      {tensor}: {why}" for tensor, why in row.get("failed", {}).items()]
    return lines


def _losses(results: Mapping, _: Mapping) -> list[str]:
    """Where PyTorch is faster: of whoever computes the same."""
    lines = [
        f"  {name} takes {ratio:.2f} of fused's time: {cell.key} ({file})"
        for file, run in results["bench"].items()
        for cell in cells_of(run)
        for name in RIVALS
        if (ratio := cell.ratio(name)) is not None and ratio < 1
    ]
    return ["losses: where PyTorch is faster than fastmixer", *(lines or ["  none among what was timed"])]


def _bench(results: Mapping, _: Mapping) -> list[str]:
    """The tables of each file's report, and once what their columns mean."""
    lines, meaning = ["times, as benchmarks.report shows them"], ""
    for file, run in results["bench"].items():
        lines += ["", file + ("" if run.content["complete"] else ", UNFINISHED")]
        lines += [f"  ceiling {name}: {value}" for name, value in (run.content["ceilings"] or {}).items()]
        if cells := cells_of(run):  # a title, each level's tables, and three sections more
            _, *tables, meaning, _, _ = gpu_report(cells, []).split("\n## ")
            lines += ["", *tables]
    return [*lines, "", meaning]


def _tuned(results: Mapping, _: Mapping) -> list[str]:
    lines = [
        f"  {entry['op']}: {entry.get('ms')} of {entry.get('default_ms')}: {entry.get('tiles')}"
        for entry in results["tuned"]
    ]
    return ["tuned: milliseconds of what won, of the default", *lines] if lines else []


def _failures(results: Mapping, expected: Mapping) -> list[str]:
    lines = [f"cannot be read: {path}: {why}" for path, why in results["unreadable"].items()]
    for name, outcome in results["stages"].items():
        if outcome and outcome["state"] not in (*QUIET, expected.get(name)):
            lines.append(f"{name}: {outcome['state']}; the end of logs/{name}.log:")
            lines += [f"    {line}" for line in outcome["tail"].splitlines()[-LOG_LINES:]]
    return lines

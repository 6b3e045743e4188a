"""summary.json and summary.txt: what lies in the folder of results, as one object and as a person reads it.

Both are made anew from the disk each time. A file that cannot be read is named and hides no other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from ..recorded import Cell, Run, cells_of
from ..schema import RIVALS, validate
from .plan import Stage
from .runner import CUT, NO_TIME, NOT_HERE, OK, RUNNING

QUIET = (OK, RUNNING, CUT, NO_TIME, NOT_HERE)  # states that need no explanation from a log
LOG_LINES = 6
JUDGED = ("smoke", "api")  # stages whose rows are right or wrong


def write(
    out: Path, head: Mapping[str, object], planned: list[Stage], outcomes: Mapping[str, Mapping]
) -> None:
    """Replaces both files.

    Args:
        head: what is known of the run as a whole; "dry run" and "interrupted" are looked at.
        planned, outcomes: the stages, and of those so far what came of them.
    """
    found = {**head, "stages": {stage.name: outcomes.get(stage.name) for stage in planned}, **collect(out)}
    expected = {stage.name: stage.expected for stage in planned}
    _replace(out / "summary.json", json.dumps(found, indent=1, default=str) + "\n")
    _replace(out / "summary.txt", text(found, expected))


def collect(out: Path) -> dict:
    """What the stages have left: {"environment", "rows" of each stage, "bench", "tuned", "unreadable"}."""
    found: dict = {"environment": None, "rows": {}, "bench": {}, "tuned": [], "unreadable": {}}

    def readable(path: Path, take) -> None:
        try:
            take(path)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            found["unreadable"][str(path.relative_to(out))] = f"{type(error).__name__}: {error}"

    def environment(path: Path) -> None:
        found["environment"] = _object(path.read_text())

    def rows(path: Path) -> None:  # a process may have died while it wrote the last line
        lines = path.read_text(errors="replace").split("\n")[:-1]
        found["rows"][path.stem] = [_object(line) for line in lines]

    def bench(path: Path) -> None:
        content = _object(path.read_text())
        validate(content)
        cells = [figures(cell) for cell in cells_of(Run(path, content))]
        found["bench"][path.name] = {name: content[name] for name in ("started", "complete", "ceilings")} | {
            "cells": cells
        }

    def tuned(path: Path) -> None:
        found["tuned"] += [_object(json.dumps(entry)) for entry in _object(path.read_text())["entries"]]

    for pattern, take in (
        ("results/environment.json", environment),
        ("results/*.jsonl", rows),
        ("bench/*/*.json", bench),
        ("tuned/configs/*.json", tuned),
    ):
        for path in sorted(out.glob(pattern)):
            readable(path, take)
    found["bench"] = dict(sorted(found["bench"].items(), key=lambda item: item[1]["started"]))
    return found


def figures(cell: Cell) -> dict:
    """A cell in short: milliseconds of calls and of graphs, and how many times fused's each rival takes."""
    content, names = cell.content, list(cell.opponents)
    parity = {
        name: {"ok": one["ok"], "ratio": one["ratio"], "failed": one["failed"]}
        for name, one in content["parity"].items()
    }
    return {
        "what": str(cell.key),
        "ok": content["ok"],
        "parity": parity,
        "ms": {name: cell.milliseconds(name) for name in names},
        "graph_ms": {name: cell.milliseconds(name, "graph_ms") for name in names},
        "times_fused": {name: cell.ratio(name) for name in names if name != "fused"},
        "peak_bytes": {name: cell.opponents[name]["peak_bytes"] for name in names},
        "launches": {name: cell.opponents[name]["launches"] for name in names},
        "share_of_roofline": cell.opponents.get("fused", {}).get("share_of_roofline"),
        "predicted_ms": content["predicted_ms"].get("fused"),
        "errors": content["errors"],
    }


def _object(line: str) -> dict:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"expected an object, got {line[:80]}")
    return found


def _replace(path: Path, content: str) -> None:
    """A reader finds the old file or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)


# ---- as a person reads it --------------------------------------------------------------------------------


def text(found: Mapping, expected: Mapping[str, str]) -> str:
    """summary.txt of what ``collect`` found. expected: the state of each stage that did what it should."""
    lines: list[str] = []
    for part in (_head, _stages, _parity, _losses, _bench, _rows, _tuned, _failures):
        try:
            section = part(found, expected)
            lines += [*section, ""] if section else []
        except (LookupError, TypeError, ValueError, AttributeError) as error:  # rows of another form
            lines += [f"({part.__name__.strip('_')} cannot be shown: {type(error).__name__}: {error})", ""]
    return "\n".join(lines)


def _head(found: Mapping, _: Mapping) -> list[str]:
    lines = [
        "fastmixer evidence: "
        + ", ".join(f"{k} {found[k]}" for k in ("plan", "gpu", "seconds", "commit") if found.get(k))
    ]
    lines += ["A DRY RUN ON A CPU: it shows that the plumbing works, and no figure means anything"] * bool(
        found.get("dry run")
    )
    lines += ["INTERRUPTED"] * bool(found.get("interrupted"))
    environment = found["environment"] or {"environment": "not known"}
    flat = {k: v for k, v in environment.items() if not isinstance(v, dict)}
    for name in ("versions", "nvidia_smi", "now"):
        flat |= environment.get(name) or {}
    return lines + [f"  {name}: {value}" for name, value in flat.items() if value is not None]


def _stages(found: Mapping, expected: Mapping) -> list[str]:
    lines = ["stages"]
    for name, outcome in found["stages"].items():
        if outcome is None:
            lines.append(f"  {name:<20}not begun")
            continue
        state = outcome["state"] + (", as planned" if outcome["state"] == expected.get(name) != OK else "")
        lines.append(f"  {name:<20}{state:<24}{outcome['seconds']:>6.0f} of {outcome['limit']:.0f} s")
    return lines


def _parity(found: Mapping, _: Mapping) -> list[str]:
    rows = found["rows"].get("smoke", [])
    wrong = [row for row in rows if not row["ok"]]
    lines = [f"parity against fp64, of eager's own error: {len(rows)} cases, {len(wrong)} WRONG OR FAILED"]
    lines += [
        f"  {row['what']:<32}{row['ratio']:>7.2f}  nearest its bound: {row['worst']}"
        for row in rows
        if row["ok"]
    ]
    return lines + [line for row in wrong for line in _wrong(row)]


def _wrong(row: Mapping) -> list[str]:
    told = row.get("failed") or {"": row.get("error", "")}
    return [f"  NOT OK  {row['what']}: {name} {why}" for name, why in told.items()]


def _losses(found: Mapping, _: Mapping) -> list[str]:
    """Where PyTorch is faster: of whoever computes the same."""
    lines = [
        f"  {name} takes {ratio:.2f} of fused's time: {cell['what']} ({file})"
        for file, run in found["bench"].items()
        for cell in run["cells"]
        for name, ratio in cell["times_fused"].items()
        if name in RIVALS and ratio is not None and ratio < 1
    ]
    return ["losses: where PyTorch is faster than fastmixer", *(lines or ["  none among what was timed"])]


def _bench(found: Mapping, _: Mapping) -> list[str]:
    lines = ["times: ms of a call (of a CUDA graph's), and how many times fused's: above 1 fused is faster"]
    for file, run in found["bench"].items():
        lines.append(f"  {file}" + ("" if run["complete"] else ", UNFINISHED"))
        lines += [f"    ceiling {name}: {value}" for name, value in (run["ceilings"] or {}).items()]
        lines += [line for cell in run["cells"] for line in _cell(cell)]
    return lines


def _cell(cell: Mapping) -> list[str]:
    ratio = cell["parity"].get("fused", {}).get("ratio")
    head = f"    {cell['what']}: parity {'-' if ratio is None else f'{ratio:.2f}'}"
    head += "" if cell["ok"] else ", NOT TIMED"
    head += f", {cell['share_of_roofline']:.0%} of the roofline" if cell["share_of_roofline"] else ""
    head += f", predicted {cell['predicted_ms']:.3f} ms" if cell["predicted_ms"] else ""
    lines = [head]
    for name, ms in cell["ms"].items():
        graph, times = cell["graph_ms"][name], cell["times_fused"].get(name)
        peak, launches = cell["peak_bytes"][name], cell["launches"][name]
        line = f"      {name:<22}{ms:>9.4f} ({'-' if graph is None else f'{graph:.4f}'})"
        line += "" if times is None else f"  {times:.2f}x"
        line += "" if peak is None else f"  peak {peak / 2**20:.0f} MiB"
        lines.append(line + ("" if launches is None else f"  {launches} launches"))
    lines += [
        f"      PARITY of {name}: {', '.join(one['failed'])}"
        for name, one in cell["parity"].items()
        if not one["ok"]
    ]
    return lines + [f"      failed: {name}: {error[:200]}" for name, error in cell["errors"].items()]


def _rows(found: Mapping, _: Mapping) -> list[str]:
    """What the other stages noted; of a stage that only compiles what failed."""
    lines = []
    for name, rows in found["rows"].items():
        if name == "smoke":
            continue
        wrong = [row for row in rows if not row["ok"]]
        lines.append(f"{name}: {len(rows)} rows, {len(wrong)} not ok")
        if name not in ("warm", "inductor"):
            for row in rows:
                told = {
                    k: v
                    for k, v in row.items()
                    if k not in ("what", "ok", "failed", "error") and v not in (None, "")
                }
                lines += [f"  {row['what']}: " + ", ".join(f"{k} {v}" for k, v in told.items())] * row["ok"]
        lines += [line for row in wrong for line in _wrong(row)]
    return lines


def _tuned(found: Mapping, _: Mapping) -> list[str]:
    lines = ["tuned: milliseconds of what won, of the default"] * bool(found["tuned"])
    for entry in found["tuned"]:
        lines.append(f"  {entry['op']}: {entry.get('ms')} of {entry.get('default_ms')}: {entry.get('tiles')}")
    return lines


def _failures(found: Mapping, expected: Mapping) -> list[str]:
    lines = [f"cannot be read: {path}: {why}" for path, why in found["unreadable"].items()]
    for name, outcome in found["stages"].items():
        if outcome and outcome["state"] not in (*QUIET, expected.get(name)):
            lines.append(f"{name}: {outcome['state']}; the end of logs/{name}.log:")
            lines += [f"    {line}" for line in outcome["tail"].splitlines()[-LOG_LINES:]]
    return lines

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
NO_FIGURES = ("what", "ok", "failed", "error")  # of a row


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
    for pattern, add in READERS.items():
        for path in sorted(out.glob(pattern)):
            try:
                add(found, path)
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                found["unreadable"][str(path.relative_to(out))] = f"{type(error).__name__}: {error}"
    found["bench"] = dict(sorted(found["bench"].items(), key=lambda item: item[1]["started"]))
    return found


def _add_environment(found: dict, path: Path) -> None:
    found["environment"] = _object(path.read_text())


def _add_rows(found: dict, path: Path) -> None:
    lines = path.read_text(errors="replace").split("\n")[:-1]  # a process may have died in the last one
    found["rows"][path.stem] = [_object(line) for line in lines]


def _add_bench(found: dict, path: Path) -> None:
    content = _object(path.read_text())
    validate(content)
    head = {name: content[name] for name in ("started", "complete", "ceilings")}
    found["bench"][path.name] = head | {"cells": [figures(cell) for cell in cells_of(Run(path, content))]}


def _add_tuned(found: dict, path: Path) -> None:
    found["tuned"] += [_object(json.dumps(entry)) for entry in _object(path.read_text())["entries"]]


READERS = {
    "results/environment.json": _add_environment,
    "results/*.jsonl": _add_rows,
    "bench/*/*.json": _add_bench,
    "tuned/configs/*.json": _add_tuned,
}


def figures(cell: Cell) -> dict:
    """A cell in short: milliseconds of calls and of graphs, and how many times fused's each rival takes."""
    content, opponents = cell.content, cell.opponents
    parity = content["parity"].items()
    return {
        "what": str(cell.key),
        "ok": content["ok"],
        "parity": {name: {key: one[key] for key in ("ok", "ratio", "failed")} for name, one in parity},
        "ms": {name: cell.milliseconds(name) for name in opponents},
        "graph_ms": {name: cell.milliseconds(name, "graph_ms") for name in opponents},
        "times_fused": {name: cell.ratio(name) for name in opponents if name != "fused"},
        "peak_bytes": {name: one["peak_bytes"] for name, one in opponents.items()},
        "launches": {name: one["launches"] for name, one in opponents.items()},
        "share_of_roofline": opponents.get("fused", {}).get("share_of_roofline"),
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
    run = [f"{name} {found[name]}" for name in ("plan", "gpu", "seconds", "commit") if found.get(name)]
    lines = ["fastmixer evidence: " + ", ".join(run)]
    if found.get("dry run"):
        lines.append("A DRY RUN ON A CPU: it shows that the plumbing works, and no figure means anything")
    if found.get("interrupted"):
        lines.append("INTERRUPTED")
    environment = found["environment"] or {"environment": "not known"}
    flat = {name: value for name, value in environment.items() if not isinstance(value, dict)}
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
    right = [row for row in rows if row["ok"]]
    return [
        f"parity against fp64, of eager's own error: {len(rows)} cases, "
        f"{len(rows) - len(right)} WRONG OR FAILED",
        *(f"  {row['what']:<32}{row['ratio']:>7.2f}  nearest its bound: {row['worst']}" for row in right),
        *_wrong(rows),
    ]


def _wrong(rows: list[Mapping]) -> list[str]:
    return [
        f"  NOT OK  {row['what']}: {name} {why}"
        for row in rows
        if not row["ok"]
        for name, why in (row.get("failed") or {"": row.get("error", "")}).items()
    ]


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
    head = f"    {cell['what']}: parity {_or_dash(ratio, '.2f')}"
    head += "" if cell["ok"] else ", NOT TIMED"
    head += f", {cell['share_of_roofline']:.0%} of the roofline" if cell["share_of_roofline"] else ""
    head += f", predicted {cell['predicted_ms']:.3f} ms" if cell["predicted_ms"] else ""
    lines = [head]
    for name, ms in cell["ms"].items():
        times, peak, launches = (cell[kind].get(name) for kind in ("times_fused", "peak_bytes", "launches"))
        line = f"      {name:<22}{ms:>9.4f} ({_or_dash(cell['graph_ms'][name], '.4f')})"
        line += "" if times is None else f"  {times:.2f}x"
        line += "" if peak is None else f"  peak {peak / 2**20:.0f} MiB"
        lines.append(line + ("" if launches is None else f"  {launches} launches"))
    for name, one in cell["parity"].items():
        if not one["ok"]:
            lines.append(f"      PARITY of {name}: {', '.join(one['failed'])}")
    return lines + [f"      failed: {name}: {error[:200]}" for name, error in cell["errors"].items()]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _rows(found: Mapping, _: Mapping) -> list[str]:
    """What the other stages noted; of a stage that only compiles what failed."""
    lines = []
    for name, rows in found["rows"].items():
        if name == "smoke":
            continue
        right = [row for row in rows if row["ok"]]
        lines.append(f"{name}: {len(rows)} rows, {len(rows) - len(right)} not ok")
        for row in right if name not in ("warm", "inductor") else ():
            told = [f"{k} {v}" for k, v in row.items() if k not in NO_FIGURES and v not in (None, "")]
            lines.append(f"  {row['what']}: " + ", ".join(told))
        lines += _wrong(rows)
    return lines


def _tuned(found: Mapping, _: Mapping) -> list[str]:
    lines = [
        f"  {entry['op']}: {entry.get('ms')} of {entry.get('default_ms')}: {entry.get('tiles')}"
        for entry in found["tuned"]
    ]
    return ["tuned: milliseconds of what won, of the default", *lines] if lines else []


def _failures(found: Mapping, expected: Mapping) -> list[str]:
    lines = [f"cannot be read: {path}: {why}" for path, why in found["unreadable"].items()]
    for name, outcome in found["stages"].items():
        if outcome and outcome["state"] not in (*QUIET, expected.get(name)):
            lines.append(f"{name}: {outcome['state']}; the end of logs/{name}.log:")
            lines += [f"    {line}" for line in outcome["tail"].splitlines()[-LOG_LINES:]]
    return lines

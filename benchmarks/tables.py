"""The report's markdown, from recorded results: the README's short tables and a GPU's complete ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .recorded import Cell, Run, contributing, shown
from .schema import LEVELS, OPPONENTS, short_model, troubles

NOTHING_MEASURED = "No GPU figure has been measured yet."
TITLES = {
    "kernel": "Kernels", "token": "Token half", "channel": "Channel half", "block": "One block",
    "model": "Whole model", "fused_lean": "fused, lean", "fused_frozen": "fused, frozen",
    "compile": "torch.compile", "compile_max_autotune": "max-autotune", "cublas": "cuBLAS alone",
    "copy": "device copy", "flax": "Flax", "vit": "ViT",
}  # fmt: skip
LEVEL_TITLES = {name: TITLES[name] for name in LEVELS}
OPPONENT_TITLES = {name: TITLES.get(name, name) for name in OPPONENTS}
README_LEVELS = ("block", "model")
README_OPPONENTS = ("fused", "eager", "compile", "compile_max_autotune")
NONE = "-"
NOTES = (
    "ms: the median of the calls, host included; in parentheses, of the replay of a CUDA graph, whose "
    "launches cost the host nothing, and how many times longer the call takes: well above 1 it waits for the "
    "host.",
    "of roofline: the least time that FLOPs and bytes allow, by the ceilings measured in the same run, as a "
    "share of the time taken.",
    "vs best: the time of the fastest of eager and torch.compile by that of fused, of graphs where both have "
    "one; above 1 fused is faster.",
    "predicted ms: what the cost model expects of fused. A prediction, not a measurement.",
)
README_FOOTNOTES = ("graph_ms", "bytes", "flops")  # of the runs' own; the complete report has them all
ERROR_NOTE = (
    "error / eager's: the error of the worst tensor against the fp64 truth, by that of eager PyTorch."
)


# ---- the README's part -----------------------------------------------------------------------------------


def readme_part(folders: Mapping[str, Sequence[Cell]]) -> str:
    """What stands between the README's markers.

    folders: the cells of each GPU, by the path of its folder as the README is to link it.
    """
    gpus = [folder for folder, cells in folders.items() if any(cell.key.device != "cpu" for cell in cells)]
    parts = [] if gpus else [NOTHING_MEASURED]
    for folder in sorted(folders, key=lambda folder: folder not in gpus):
        parts += _readme_gpu(folder, folders[folder])
    if folders:
        everything = [cell for cells in folders.values() for cell in cells]
        parts.append(_as_list([*NOTES, *_footnotes(everything, README_FOOTNOTES)]))
    return "\n\n".join(parts)


def _readme_gpu(folder: str, cells: Sequence[Cell]) -> list[str]:
    parts, gpu = [], escape(cells[0].run.gpu)
    for level in README_LEVELS:
        chosen = [cell for cell in shown(cells) if cell.key.level == level]
        raced = [name for name in README_OPPONENTS if any(name in cell.opponents for cell in chosen)]
        if chosen:
            parts += [f"**{LEVEL_TITLES[level]}, {chosen[0].key.dtype}, {gpu}**", _provenance(chosen)]
            parts.append(_measured_table([(cell, _readme_row(cell, raced)) for cell in chosen]))
    link = f"{folder}/REPORT.md"
    return [*parts, f"All that was measured on {gpu}, with plots: [{link}]({link})."]


def _readme_row(cell: Cell, raced: Sequence[str]) -> dict[str, str]:
    """Of the row of fused in the complete report the most telling entries, and beside them the others'."""
    rows = {name: _row(cell, name) for name in (*README_OPPONENTS, "vit")}
    fused, eager = rows["fused"], rows["eager"]
    row = {"Model": fused["Model"], "Batch": fused["Batch"], "Direction": direction(cell.key.direction)}
    row |= {f"{OPPONENT_TITLES[name]} ms": rows[name]["ms"] for name in raced}
    row |= {title: fused[title] for title in ("TFLOP/s", "GB/s", "of roofline")}
    for title in ("peak MB", "launches"):
        unknown = fused[title] == eager[title] == NONE
        row[f"{title}, fused / eager"] = NONE if unknown else f"{fused[title]} / {eager[title]}"
    row |= {"images/s": fused["images/s"], "ViT images/s": rows["vit"]["images/s"]}
    return row | {title: fused[title] for title in ("vs best", "predicted ms")}


# ---- one GPU's complete report ---------------------------------------------------------------------------


def gpu_report(cells: Sequence[Cell], plots: Iterable[str]) -> str:
    """The whole of a GPU's REPORT.md. plots: file names of the pictures beside it."""
    parts = [f"# {escape(cells[0].run.gpu)}"]
    parts += ["Written by `python -m benchmarks.report` from the JSON files beside it."]
    parts += [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})" for name in plots]
    for level, title in LEVEL_TITLES.items():
        chosen = [cell for cell in cells if cell.key.level == level]
        if chosen:
            parts += [f"## {title}", _provenance(chosen), *_level_tables(title, chosen)]
    parts += ["## What the columns mean", _as_list([*NOTES, ERROR_NOTE])]
    parts += ["## How it was counted and measured", _as_list(_footnotes(cells))]
    parts += ["## The runs", *(_run_facts(run) for run in contributing(cells))]
    return "\n\n".join(parts) + "\n"


def _level_tables(title: str, cells: Sequence[Cell]) -> list[str]:
    """A table per dtype, direction and device, and what went wrong below it."""
    groups: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        group = cell.key.dtype, direction(cell.key.direction), cell.key.device
        groups.setdefault(group, []).append(cell)
    parts = []
    for group, chosen in groups.items():
        rows = []
        for cell in chosen:  # where nobody was timed, fused with the reason
            timed = [name for name in OPPONENT_TITLES if name in cell.opponents] or ["fused"]
            timed += sorted(cell.content.get("designs", {}), key=cell.ratio)  # the fastest first
            rows += [(cell, _row(cell, name)) for name in timed]
        notes = [escape(f"{cell.key}: {trouble}") for cell in chosen for trouble in troubles(cell.content)]
        parts += [f"### {title}: {', '.join(group)}", _measured_table(rows)]
        parts += [_as_list(notes)] if notes else []
    return parts


def _row(cell: Cell, name: str) -> dict[str, str]:
    """An opponent's row of the complete report, by the columns' titles."""
    key, content, opponent = cell.key, cell.content, cell.opponents.get(name, {})
    stats, share = opponent.get("ms"), opponent.get("share_of_roofline")
    # Its own where the opponent is another network, otherwise the cell's.
    parameters, flops = (
        content[field] if opponent.get(field) is None else opponent[field]
        for field in ("parameters", "flops")
    )
    of_model = key.level == "model"
    best = name == "fused" and content["best_opponent"]
    return {
        "Op": key.op or NONE,
        "Model": short_model(key.model),
        "Batch": str(key.batch),
        "Who": OPPONENT_TITLES.get(name, name),
        "ms": _milliseconds(cell, name),
        "p20 - p80": f"{stats['p20']:.4g} - {stats['p80']:.4g}" if stats else NONE,
        "TFLOP/s": figure(opponent.get("tflop_per_s")),
        "GB/s": figure(opponent.get("gb_per_s")),
        "of roofline": NONE if share is None else f"{share:.0%}",
        "peak MB": figure(opponent.get("peak_bytes"), 1e6),
        "launches": figure(opponent.get("launches")),
        "images/s": figure(opponent.get("images_per_s")),
        "M parameters": figure(parameters, 1e6) if of_model else NONE,
        "GFLOP": figure(flops, 1e9) if of_model else NONE,
        "ms / fused ms": NONE if name == "fused" else figure(cell.ratio(name)),
        "vs best": f"{figure(content['ratio_to_best'])} ({OPPONENT_TITLES[best]})" if best else NONE,
        "predicted ms": figure(content["predicted_ms"].get(name)),
        "error / eager's": figure(content["parity"].get(name, {}).get("ratio")),
    }


def _milliseconds(cell: Cell, name: str) -> str:
    """An opponent's time, with the graph's and the ratio in parentheses, or in words why there is none."""
    calls, graph = cell.milliseconds(name), cell.milliseconds(name, "graph_ms")
    if calls is not None:
        return figure(calls) + (f" ({figure(graph)}, {calls / graph:.2f}x)" if graph is not None else "")
    if name == "fused" and not cell.content["ok"]:
        red = any(not verdict["ok"] for verdict in cell.content["parity"].values())
        return "parity failed, not timed" if red else "failed, not timed"
    return "failed" if name in cell.content["errors"] else NONE


def _run_facts(run: Run) -> str:
    """The file, when, and everything a figure depends on."""
    content = run.content
    facts = [_origin(run)]
    facts += [
        f"{name}: {_flat(content[name])}" for name in ("protocol", "ceilings", "clocks") if content[name]
    ]
    head = f"**{run.path.name}**, {content['started']} to {content['updated']}"
    return f"{head}\n\n{_as_list(map(escape, facts))}"


def _flat(value: object) -> str:
    """Nested facts on one line."""
    if isinstance(value, Mapping):
        facts = {name: f"({_flat(f)})" if isinstance(f, Mapping) else _flat(f) for name, f in value.items()}
        return ", ".join(f"{name} {fact}" for name, fact in facts.items())
    if isinstance(value, list | tuple):
        return " ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- what both share -------------------------------------------------------------------------------------


def _provenance(cells: Iterable[Cell]) -> str:
    """GPU, date, commit and versions above a table; numbered where the table has several runs."""
    origins = [escape(_origin(run)) for run in contributing(cells)]
    if len(origins) == 1:
        return origins[0]
    return "\n".join(f"{number}. {origin}" for number, origin in enumerate(origins, 1))


def _origin(run: Run) -> str:
    environment = run.content["environment"]
    facts = [run.gpu, f"{run.when:%Y-%m-%d}", f"commit {run.commit}"]
    facts += [f"{name} {version}" for name, version in environment["versions"].items() if version]
    facts += [f"{name.upper()} {environment[name]}" for name in ("cuda", "hip") if environment[name]]
    smi = environment["nvidia_smi"] or {}
    titles = {"driver_version": "driver", "power.limit": "power limit"}
    facts += [f"{title} {smi[name]}" for name, title in titles.items() if name in smi]
    return ", ".join(facts)


def _footnotes(cells: Iterable[Cell], names: Sequence[str] = ()) -> list[str]:
    """The runs' own footnotes, all or those named: how FLOPs and bytes are counted, and the like."""
    notes: dict[str, dict[str, None]] = {}
    for run in contributing(cells):
        for name, text in run.content["footnotes"].items():
            if not names or name in names:
                notes.setdefault(name, {})[text] = None
    return [escape(f"{name}: {'; or: '.join(texts)}") for name, texts in notes.items()]


def _as_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _measured_table(rows: Sequence[tuple[Cell, dict[str, str]]]) -> str:
    """The table without the columns that nothing was measured for.

    Where its rows come from several runs, with the number of each row's run.
    """
    runs = [run.path for run in contributing(cell for cell, _ in rows)]
    numbers = [str(runs.index(cell.run.path) + 1) if len(runs) > 1 else NONE for cell, _ in rows]
    numbered = [row | {"run": number} for (_, row), number in zip(rows, numbers, strict=True)]
    titles = [title for title in numbered[0] if any(row[title] != NONE for row in numbered)]
    return table([{title: row[title] for title in titles} for row in numbered])


def direction(name: str) -> str:
    return name.replace("_", " + ")


def figure(value: float | None, unit: float = 1) -> str:
    """Four significant digits, thousands whole; a dash for what was not measured."""
    if value is None:
        return NONE
    value = value / unit
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def escape(text: str) -> str:
    """Text as one line of markdown that neither ends a table's cell nor opens a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A markdown table of rows by the columns' titles; the columns also line up as plain text."""
    lines = [[escape(entry) for entry in line] for line in (rows[0].keys(), *(row.values() for row in rows))]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([e.ljust(w) for e, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)

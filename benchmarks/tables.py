"""The report's markdown, from recorded results: the README's short tables and a GPU's complete ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from .recorded import Cell, Key, Run, contributing, shown
from .schema import short_model

NOTHING_MEASURED = "No GPU figure has been measured yet."
LEVEL_TITLES = {
    "kernel": "Kernels",
    "token": "Token half",
    "channel": "Channel half",
    "block": "One block",
    "model": "Whole model",
}
OPPONENT_TITLES = {
    "fused": "fused",
    "fused_lean": "fused, lean",
    "fused_frozen": "fused, frozen",
    "eager": "eager",
    "compile": "torch.compile",
    "compile_max_autotune": "max-autotune",
    "lucidrains": "lucidrains",
    "cublas": "cuBLAS alone",
    "copy": "device copy",
    "flax": "Flax",
    "vit": "ViT",
}
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


def readme_part(folders: Mapping[str, Mapping[Key, Cell]]) -> str:
    """What stands between the README's markers.

    folders: the cells of each GPU, by the path of its folder as the README is to link it.
    """
    gpus = {folder: cells for folder, cells in folders.items() if any(key.device != "cpu" for key in cells)}
    parts = [] if gpus else [NOTHING_MEASURED]
    for folder in [*gpus, *(folder for folder in folders if folder not in gpus)]:
        parts += _readme_gpu(folder, folders[folder])
    if folders:
        everything = [cell for cells in folders.values() for cell in cells.values()]
        parts.append(_as_list([*NOTES, *_footnotes(everything, README_FOOTNOTES)]))
    return "\n\n".join(parts)


def _readme_gpu(folder: str, cells: Mapping[Key, Cell]) -> list[str]:
    chosen = shown(cells)
    parts = []
    for level in README_LEVELS:
        of_level = [cell for cell in chosen if cell.key.level == level]
        if of_level:
            parts += [_heading(level, of_level), _provenance(of_level), _readme_table(level, of_level)]
    link = f"{folder}/REPORT.md"
    return [*parts, f"All that was measured on {_gpu(cells)}, with plots: [{link}]({link})."]


def _heading(level: str, cells: Sequence[Cell]) -> str:
    return f"**{LEVEL_TITLES[level]}, {cells[0].key.dtype}, {_gpu({c.key: c for c in cells})}**"


def _gpu(cells: Mapping[Key, Cell]) -> str:
    return escape(next(iter(cells.values())).run.gpu)


def _readme_table(level: str, cells: Sequence[Cell]) -> str:
    raced = [name for name in README_OPPONENTS if any(name in cell.opponents for cell in cells)]
    head = ["Model", "Batch", "Direction", *(f"{OPPONENT_TITLES[name]} ms" for name in raced)]
    head += ["TFLOP/s", "GB/s", "of roofline", "peak MB, fused / eager", "launches, fused / eager"]
    head += ["images/s", "ViT images/s"] * (level == "model") + ["vs best", "predicted ms"]
    rows = []
    for cell in cells:
        row = [short_model(cell.key.model), str(cell.key.batch), direction(cell.key.direction)]
        row += [milliseconds(cell, name) for name in raced]
        row += [*_rates(cell, "fused"), _pair(cell, "peak_bytes", 1e6), _pair(cell, "launches")]
        images = (figure(_of(cell, name, "images_per_s")) for name in ("fused", "vit"))
        row += images if level == "model" else []
        rows.append([*row, _best(cell, "fused"), _predicted(cell, "fused")])
    return _with_source(head, rows, cells)


# ---- one GPU's complete report ---------------------------------------------------------------------------


def gpu_report(cells: Mapping[Key, Cell], plots: Iterable[str]) -> str:
    """The whole of a GPU's REPORT.md. plots: file names of the pictures beside it."""
    parts = [f"# {_gpu(cells)}", "Written by `python -m benchmarks.report` from the JSON files beside it."]
    parts += [f"![{name.removesuffix('.png').replace('-', ' ')}]({name})" for name in plots]
    for level, title in LEVEL_TITLES.items():
        of_level = [cell for key, cell in cells.items() if key.level == level]
        if of_level:
            parts += [f"## {title}", _provenance(of_level), *_level_tables(level, of_level)]
    parts += ["## What the columns mean", _as_list([*NOTES, ERROR_NOTE])]
    parts += ["## How it was counted and measured", _as_list(_footnotes(cells.values()))]
    parts += ["## The runs", *(_run_facts(run) for run in contributing(cells.values()))]
    return "\n\n".join(parts) + "\n"


def _level_tables(level: str, cells: Sequence[Cell]) -> list[str]:
    """A table each dtype, direction and device, and what went wrong below it."""
    parts = []
    groups = dict.fromkeys((cell.key.dtype, cell.key.direction, cell.key.device) for cell in cells)
    for group in groups:
        chosen = [c for c in cells if (c.key.dtype, c.key.direction, c.key.device) == group]
        dtype, way, device = group
        parts += [
            f"### {LEVEL_TITLES[level]}: {dtype}, {direction(way)}, {device}",
            _full_table(level, chosen),
        ]
        troubles = [f"- {trouble}" for cell in chosen for trouble in _troubles(cell)]
        parts += ["\n".join(troubles)] if troubles else []
    return parts


def _full_table(level: str, cells: Sequence[Cell]) -> str:
    head = ["Op"] * (level == "kernel") + ["Model", "Batch", "Who", "ms", "p20 - p80", "TFLOP/s", "GB/s"]
    head += ["of roofline", "peak MB", "launches"] + ["images/s", "M parameters", "GFLOP"] * (
        level == "model"
    )
    head += ["ms / fused ms", "vs best", "predicted ms", "error / eager's"]
    rows, sources = [], []
    for cell in cells:
        for name in _raced(cell):
            row = [cell.key.op or NONE] * (level == "kernel")
            row += [short_model(cell.key.model), str(cell.key.batch), OPPONENT_TITLES[name]]
            row += [milliseconds(cell, name), _spread(cell, name), *_rates(cell, name)]
            row += [figure(_of(cell, name, "peak_bytes"), 1e6), figure(_of(cell, name, "launches"))]
            row += _network(cell, name) if level == "model" else []
            row += [NONE if name == "fused" else figure(cell.ratio(name)), _best(cell, name)]
            rows.append(
                [*row, _predicted(cell, name), figure(cell.content["parity"].get(name, {}).get("ratio"))]
            )
            sources.append(cell)
    return _with_source(head, rows, sources)


def _raced(cell: Cell) -> list[str]:
    """Who was timed, in the order of the titles; "fused" with the reason where nobody was."""
    return [name for name in OPPONENT_TITLES if name in cell.opponents] or ["fused"]


def _network(cell: Cell, name: str) -> list[str]:
    """Images/s, parameters and FLOPs; its own where the opponent is another network, otherwise the cell's."""
    own = {field: _of(cell, name, field) for field in ("parameters", "flops")}
    counts = {field: cell.content[field] if count is None else count for field, count in own.items()}
    images = figure(_of(cell, name, "images_per_s"))
    return [images, figure(counts["parameters"], 1e6), figure(counts["flops"], 1e9)]


def _spread(cell: Cell, name: str) -> str:
    stats = cell.opponents.get(name, {}).get("ms")
    return f"{stats['p20']:.4g} - {stats['p80']:.4g}" if stats else NONE


def _best(cell: Cell, name: str) -> str:
    ratio, best = cell.content["ratio_to_best"], cell.content["best_opponent"]
    if name != "fused" or ratio is None:
        return NONE
    return figure(ratio) + (f" ({OPPONENT_TITLES[best]})" if best else "")


def _troubles(cell: Cell) -> list[str]:
    """Why a cell is red or an opponent is missing from it."""
    found = [f"{name}: {error}" for name, error in cell.content["errors"].items()]
    for name, verdict in cell.content["parity"].items():
        if not verdict["ok"]:
            failed = ", ".join(verdict["failed"])
            found.append(f"{name}: parity failed in {failed}; not timed")
    return [escape(f"{cell.key}: {text}") for text in found]


def _run_facts(run: Run) -> str:
    """The file, when, and everything a figure depends on."""
    content = run.content
    lines = [f"**{run.path.name}**, {content['started']} to {content['updated']}", "", f"- {_origin(run)}"]
    for title in ("protocol", "ceilings", "clocks"):
        if content.get(title):
            lines.append(f"- {title}: {_flat(content[title])}")
    return "\n".join(lines[:2]) + "\n" + "\n".join(escape(line) for line in lines[2:])


def _flat(value: object) -> str:
    """Nested facts on one line."""
    if isinstance(value, Mapping):
        inner = ((name, _flat(fact), isinstance(fact, Mapping)) for name, fact in value.items())
        return ", ".join(f"{name} ({fact})" if nested else f"{name} {fact}" for name, fact, nested in inner)
    if isinstance(value, list | tuple):
        return " ".join(map(_flat, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---- what both share -------------------------------------------------------------------------------------


def _provenance(cells: Iterable[Cell]) -> str:
    """GPU, date, commit and versions above a table; numbered where the table has several runs."""
    runs = contributing(cells)
    if len(runs) == 1:
        return escape(_origin(runs[0]))
    return "\n".join(f"{number}. {escape(_origin(run))}" for number, run in enumerate(runs, 1))


def _origin(run: Run) -> str:
    environment = run.content["environment"]
    facts = [run.gpu, f"{run.when:%Y-%m-%d}", f"commit {run.commit}"]
    facts += [f"{name} {version}" for name, version in environment["versions"].items() if version]
    facts += [f"{name.upper()} {environment[name]}" for name in ("cuda", "hip") if environment.get(name)]
    smi = environment.get("nvidia_smi") or {}
    titles = {"driver_version": "driver", "power.limit": "power limit"}
    facts += [f"{title} {smi[name]}" for name, title in titles.items() if name in smi]
    return ", ".join(facts)


def _footnotes(cells: Iterable[Cell], names: Sequence[str] | None = None) -> list[str]:
    """The runs' own footnotes, all or those named: how FLOPs and bytes are counted, and the like."""
    notes: dict[str, list[str]] = {}
    for run in contributing(cells):
        for name, text in run.content["footnotes"].items():
            texts = notes.setdefault(name, [])
            texts += [text] if text not in texts and (names is None or name in names) else []
    return [escape(f"{name}: {'; or: '.join(texts)}") for name, texts in notes.items() if texts]


def _as_list(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _with_source(head: Sequence[str], rows: Sequence[Sequence[str]], sources: Sequence[Cell]) -> str:
    """The table without the columns that nothing was measured for.

    Where its rows come from several runs, with the number of each row's run.
    """
    kept = [column for column in range(len(head)) if any(row[column] != NONE for row in rows)]
    head, rows = [head[column] for column in kept], [[row[column] for column in kept] for row in rows]
    runs = [run.path for run in contributing(sources)]
    if len(runs) > 1:
        head = [*head, "run"]
        rows = [[*r, str(runs.index(c.run.path) + 1)] for r, c in zip(rows, sources, strict=True)]
    return table(head, rows)


def _rates(cell: Cell, name: str) -> list[str]:
    share = _of(cell, name, "share_of_roofline")
    rates = [figure(_of(cell, name, field)) for field in ("tflop_per_s", "gb_per_s")]
    return [*rates, NONE if share is None else f"{share:.0%}"]


def _pair(cell: Cell, field: str, unit: float = 1) -> str:
    ours, theirs = (figure(_of(cell, name, field), unit) for name in ("fused", "eager"))
    return NONE if ours == theirs == NONE else f"{ours} / {theirs}"


def _predicted(cell: Cell, name: str) -> str:
    return figure(cell.content["predicted_ms"].get(name))


def _of(cell: Cell, name: str, field: str) -> float | None:
    return cell.opponents.get(name, {}).get(field)


def milliseconds(cell: Cell, name: str) -> str:
    """An opponent's time, with the graph's and the ratio in parentheses, or in words why there is none."""
    calls, graph = cell.milliseconds(name), cell.milliseconds(name, "graph_ms")
    if calls is not None:
        return figure(calls) + (f" ({figure(graph)}, {calls / graph:.2f}x)" if graph is not None else "")
    if name == "fused" and not cell.content["ok"]:
        red = any(not verdict["ok"] for verdict in cell.content["parity"].values())
        return "parity failed, not timed" if red else "failed, not timed"
    return "failed" if name in cell.content["errors"] else NONE


def direction(name: str) -> str:
    return {"forward_backward": "forward + backward"}.get(name, name)


def figure(value: float | None, unit: float = 1) -> str:
    """Four significant digits, thousands whole; a dash for what was not measured."""
    if value is None:
        return NONE
    value = value / unit
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def escape(text: str) -> str:
    """Text as one line of markdown that neither ends a table's cell nor opens a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table whose columns also line up as plain text."""
    lines = [[escape(entry) for entry in row] for row in (head, *rows)]
    widths = [max(3, *(len(line[column]) for line in lines)) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([e.ljust(w) for e, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)

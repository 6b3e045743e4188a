"""``python -m benchmarks.blocks``: one Mixer block on a GPU, eager, torch.compile and fused.

Forward only, or with ``--backward`` forward and backward, with the memory that they take. For each of the
paper's seven block shapes and each batch, a cell: the fused block must first pass the parity criterion
(``fastmixer.parity``) on fresh random inputs, with every gradient, or the cell gets no times. Then the
opponents take turns in one run. The file is rewritten after every cell, so a killed run keeps what it
measured, and ``--resume`` continues it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

import fastmixer
from benchmarks import measure
from benchmarks.races import BACKWARD, FORWARD, Case, Race, Subject, gate, make_cases, make_subject
from fastmixer import parity
from fastmixer.cli import DTYPES, positive
from fastmixer.model import MODELS
from fastmixer.verify_backward import share_of_bound
from fastmixer.verify_forward import fused_or_error

BATCHES = (1, 64, 256)
QUICK_MODELS, QUICK_BATCHES = ("mixer_b16_224",), (1, 64)
RESULTS = Path(__file__).resolve().parent / "results"


# ---- one cell --------------------------------------------------------------------------------------------


def measure_cell(
    case: Case, race: Race, timer: measure.Timer, device: torch.device, ceilings: dict | None
) -> dict:
    """One cell of the report. A red gate leaves "ms" empty; an opponent that fails is named in "errors"."""
    cell: dict = {**asdict(case), "flops": race.flops(case), "bytes": race.bytes(case)}
    cell.update(ok=False, parity={}, errors={}, ms={}, ratios={}, peak_bytes={}, clocks=None)
    with torch.set_grad_enabled(race.trains), fastmixer.backend("triton"), fused_or_error():
        try:
            subject = make_subject(case, race, device)
        except failures() as error:
            cell["errors"]["case"] = _first_line(error)
            return cell
        calls = _gated(subject, race, cell)
        fused = [name for name in race.opponents if name.startswith("fused")]
        green = all(cell["parity"][name]["ok"] for name in fused if name in calls)
        cell["ok"] = green and "fused" in calls
        if not cell["ok"]:
            return cell
        try:
            times = timer(calls, subject.inputs)
        except failures() as error:
            cell["errors"]["timer"] = _first_line(error)
            return cell
        cell["clocks"] = measure.clocks() if device.type == "cuda" else None
        del calls
        _weigh(subject, race, cell)
    stats = {name: measure.summarise(values) for name, values in times.items()}
    cell["ms"] = {name: asdict(value) for name, value in stats.items()}
    cell["ratios"] = {
        f"{slow}/{fast}": stats[slow].median / stats[fast].median
        for fast in fused
        for slow in ("eager", "compile")
        if slow in stats and fast in stats
    }
    cell.update(_rates(cell, stats["fused"].median, ceilings))
    return cell


def _gated(subject: Subject, race: Race, cell: dict) -> dict[str, measure.Call]:
    """The calls to time, by opponent; their parity and the errors of the others go into the cell."""
    calls: dict[str, measure.Call] = {}
    for name, make in race.opponents.items():
        try:
            call = make(subject)
            verdicts = gate(subject, race, call)
        except failures() as error:
            cell["errors"][name] = _first_line(error)
            continue
        calls[name] = call
        cell["parity"][name] = _as_json(verdicts)
    return calls


def _weigh(subject: Subject, race: Race, cell: dict) -> None:
    """Measures the peak memory of whoever was timed."""
    for name, make in race.weigh.items():
        if name in cell["errors"]:
            continue
        try:
            peak = measure.peak_bytes(make(subject), subject.inputs[0])
        except failures() as error:
            cell["errors"][f"{name} memory"] = _first_line(error)
            continue
        if peak is not None:
            cell["peak_bytes"][name] = peak


def _rates(cell: dict, milliseconds: float, ceilings: dict | None) -> dict:
    """What the fused block achieves, and its share of what the GPU could."""
    flops, moved = cell["flops"], cell["bytes"]
    rates = {"tflop_per_s": flops / milliseconds / 1e9, "gb_per_s": moved / milliseconds / 1e6}
    if ceilings:
        floor = max(flops / ceilings["product_tflop_per_s"] / 1e9, moved / ceilings["copy_gb_per_s"] / 1e6)
        rates |= {"floor_ms": floor, "share_of_floor": floor / milliseconds}
    return rates


def _as_json(verdicts: dict[str, parity.Parity]) -> dict:
    """The tensor nearest its bound in full, of the others the ratio. JSON knows no inf: it becomes None."""
    worst = max(verdicts, key=lambda name: share_of_bound(verdicts[name]))
    values = {**asdict(verdicts[worst]), "ratio": verdicts[worst].ratio}
    ratios = {name: _finite(verdict.ratio) for name, verdict in verdicts.items()}
    failed = [name for name, verdict in verdicts.items() if not verdict.ok]
    found = {name: _finite(value) for name, value in values.items()}
    return {"ok": not failed, "tensor": worst, **found, "ratios": ratios, "failed": failed}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def failures() -> tuple[type[Exception], ...]:
    """Out of memory, inductor's failures, a kernel that cannot run, a fused block that would run unfused."""
    from triton.errors import TritonError

    return RuntimeError, TritonError, fastmixer.FallbackWarning


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


# ---- the run and its file --------------------------------------------------------------------------------


def run(
    cases: Sequence[Case],
    timer: measure.Timer,
    device: torch.device,
    output: Path,
    *,
    race: Race = FORWARD,
    header: dict | None = None,
    resume: bool = False,
    log: Callable[[str], None] = print,
) -> dict:
    """Measures every case, and returns the report that ``output`` then holds.

    While it runs, the report so far is in ``partial_path(output)``, so that a killed run neither loses its
    cells nor overwrites a complete report.

    Args:
        timer: what measures; see ``benchmarks.measure``.
        race: forward only, or forward and backward.
        header: joins the report; its "environment" must equal a partial report's for that to be resumed.
        resume: keep the partial report's cells, but for those with errors or a red gate.
    """
    partial = partial_path(output)
    report = {"kind": race.kind, "schema": measure.SCHEMA, "started": measure.now(), **(header or {})}
    report |= {"formulas": race.formulas, "complete": False}
    if resume:
        report |= _resumable(partial, report)
    done = {_case_of(cell): cell for cell in report.setdefault("cells", [])}
    log(table_head(race))
    for case in cases:
        cell = done.get(case)
        if cell is None:
            cell = measure_cell(case, race, timer, device, report.get("ceilings"))
            report["cells"].append(cell)
            report["updated"] = measure.now()
            measure.write_atomically(partial, report)
        log(table_row(cell, race))
    report["complete"] = True
    measure.write_atomically(output, report)
    partial.unlink(missing_ok=True)
    return report


def partial_path(output: Path) -> Path:
    return output.with_suffix(".partial.json")


def _resumable(partial: Path, report: dict) -> dict:
    """What to take over from an earlier, killed run of the same code on the same machine: its good cells.

    Its ceilings too, which their "share_of_floor" refers to. Nothing if either run's code was not committed.
    """
    try:
        earlier = json.loads(partial.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if any(earlier.get(key) != report.get(key) for key in ("kind", "schema", "environment", "protocol")):
        return {}
    if (report.get("environment") or {}).get("dirty"):
        return {}
    kept = {key: earlier[key] for key in ("started", "ceilings") if key in earlier}
    return {**kept, "cells": [cell for cell in earlier["cells"] if cell["ok"] and not cell["errors"]]}


def _case_of(cell: dict) -> Case:
    return Case(*(cell[name] for name in Case.__dataclass_fields__))


RATIOS = ("eager/fused", "compile/fused")


def _columns(race: Race) -> dict[str, int]:
    """Titles of the figures, and their widths."""
    short = {name: name.removeprefix("fused_") for name in race.opponents}
    titles = [f"{short[name]} ms" for name in race.opponents] + [*RATIOS, "of floor"]
    titles += [f"{short[name]} MB" for name in race.weigh]
    return {title: max(len(title), 9) + 2 for title in titles}


def table_head(race: Race) -> str:
    """The titles over the rows of ``table_row``."""
    head = f"{'block':<16}{'batch':>6}  {'dtype':<9}{'parity':>7}"
    return head + "".join(f"{title:>{width}}" for title, width in _columns(race).items())


def table_row(cell: dict, race: Race) -> str:
    """A cell as one line under ``table_head``, with what went wrong behind it."""
    p = cell["parity"].get("fused")
    ratio = "-" if p is None or p["ratio"] is None else f"{p['ratio']:.2f}"
    figures = [f"{cell['ms'][name]['median']:.4f}" if name in cell["ms"] else "-" for name in race.opponents]
    figures += [f"{cell['ratios'][name]:.2f}" if name in cell["ratios"] else "-" for name in RATIOS]
    figures.append(f"{cell['share_of_floor']:.0%}" if "share_of_floor" in cell else "-")
    peaks = cell["peak_bytes"]
    figures += [f"{peaks[name] / 1e6:.1f}" if name in peaks else "-" for name in race.weigh]
    text = f"{cell['model']:<16}{cell['batch']:>6}  {cell['dtype']:<9}{ratio:>7}"
    for figure, width in zip(figures, _columns(race).values(), strict=True):
        text += f"{figure:>{width}}"
    for name, verdict in cell["parity"].items():
        if name.startswith("fused") and verdict["failed"]:
            text += f"  PARITY FAILED, not timed: {name}: {', '.join(verdict['failed'])}"
    return text + "".join(f"  {name}: {error}" for name, error in cell["errors"].items())


# ---- command line ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all cells measured; 1: a red gate or a failed opponent; 2: bad usage, or no GPU."""
    options = _parser().parse_args(argv)
    race = BACKWARD if options.backward else FORWARD
    dtype = DTYPES[options.dtype]
    models = options.models or (QUICK_MODELS if options.quick else MODELS)
    batches = options.batch or (QUICK_BATCHES if options.quick else BATCHES)
    try:
        cases = make_cases(models, batches, dtype)
    except ValueError as error:
        print(f"benchmarks.blocks: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print(
            "benchmarks.blocks: needs a CUDA GPU, and torch sees none: nothing was measured", file=sys.stderr
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    timer = measure.CudaTimer(rounds=5, burst=5) if options.quick else measure.CudaTimer()
    environment = measure.environment(device)
    if environment["commit"] is None:
        environment["commit"] = options.commit
    header = {
        "environment": environment,
        "protocol": {
            **asdict(timer),
            "compile": 'torch.compile(mode="max-autotune", dynamic=False)',
            "inputs": "random normal, rotated through twice the L2 cache's size",
        },
        "ceilings": measure.ceilings(device, getattr(torch, dtype)),
        "clocks": measure.clocks(),
    }
    name = f"{race.kind}-quick.json" if options.quick else f"{race.kind}.json"
    output = options.output or RESULTS / measure.slug(measure.device_name(device)) / name
    report = run(cases, timer, device, output, race=race, header=header, resume=options.resume)
    print(f"written to {output}")
    return 0 if all(cell["ok"] and not cell["errors"] for cell in report["cells"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: the paper's seven")
    parser.add_argument("--batch", nargs="+", type=positive, metavar="N", help="default: 1 64 256")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", metavar="DTYPE", help="bf16, fp16 or fp32")
    parser.add_argument("--backward", action="store_true", help="forward and backward, with their memory")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/<gpu>/…")
    parser.add_argument("--quick", action="store_true", help="B/16 at batch 1 and 64, fewer calls")
    parser.add_argument("--resume", action="store_true", help="continue a killed run of the same code")
    parser.add_argument("--commit", metavar="HASH", help="recorded where git cannot say which commit this is")
    return parser


if __name__ == "__main__":
    sys.exit(main())

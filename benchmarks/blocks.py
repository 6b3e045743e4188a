"""``python -m benchmarks.blocks``: one Mixer block forward, eager, torch.compile and fused, on a GPU.

For each of the paper's seven block shapes and each batch, a cell: the fused block must first pass the parity
criterion (``fastmixer.parity``) on fresh random inputs, or the cell gets no times. Then the opponents take
turns in one run. The file is rewritten after every cell, so a killed run keeps what it measured, and
``--resume`` continues it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import fastmixer
from benchmarks import measure
from fastmixer import parity, verify
from fastmixer.cli import DTYPES, did_you_mean, positive
from fastmixer.model import ALIASES, MODELS

BATCHES = (1, 64, 256)
QUICK_MODELS, QUICK_BATCHES = ("mixer_b16_224",), (1, 64)
RESULTS = Path(__file__).resolve().parent / "results"
TRUTH_SAMPLES = 16  # the fp64 truth is computed so many samples at a time, to bound its memory

FORMULAS = {
    "flops": "4 * batch * tokens * channels * (token_hidden + channel_hidden)",
    "bytes": "itemsize * (2 * batch * tokens * channels + parameters): x, weights read once, y written once",
    "floor_ms": "max(flops / product_tflop_per_s, bytes / copy_gb_per_s), with the ceilings of this file",
    "ratios": "median of the one divided by median of the other: above 1 the second is faster",
    "parity": "err = ||a - truth|| / ||truth|| with an fp64 truth; err_fused <= 1.25 err_eager + 8 eps, "
    "max_fused <= 2 max_eager + 16 eps max |truth|",
}


@dataclass(frozen=True)
class Case:
    """One block shape at one batch; sizes B, S, C, D, E in words."""

    model: str
    batch: int
    dtype: str
    tokens: int
    channels: int
    token_hidden: int
    channel_hidden: int

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.tokens * self.channels * (self.token_hidden + self.channel_hidden)

    @property
    def bytes(self) -> int:
        """The fewest bytes the block can move: see FORMULAS."""
        S, C, D, E = self.tokens, self.channels, self.token_hidden, self.channel_hidden
        parameters = 2 * S * D + S + D + 2 * C * E + C + E + 4 * C
        return getattr(torch, self.dtype).itemsize * (2 * self.batch * S * C + parameters)


@dataclass
class Subject:
    """The two blocks of a case, with the same weights, and inputs (N, B, S, C) to rotate through."""

    eager: nn.Module
    fused: nn.Module
    inputs: Tensor


# What races: a function that gets a Subject and returns the call to time.
Opponents = dict[str, Callable[[Subject], measure.Call]]


def _compiled(subject: Subject) -> measure.Call:
    torch._dynamo.reset()  # else the limit on recompilations is reached after a few shapes
    return torch.compile(subject.eager, mode="max-autotune", dynamic=False)


OPPONENTS: Opponents = {
    "eager": lambda subject: subject.eager,
    "compile": _compiled,
    "fused": lambda subject: subject.fused,
    "fused_graph": lambda subject: measure.graphed(subject.fused, subject.inputs[0]),
}


def make_cases(models: Iterable[str], batches: Iterable[int], dtype: str) -> list[Case]:
    """The block of every model (a key of ``fastmixer.model.MODELS``, or "B/16") at every batch.

    Raises ValueError for an unknown model, with the nearest known ones.
    """
    found = []
    batches = tuple(batches)
    for name in models:
        name = ALIASES.get(name, name)
        if name not in MODELS:
            raise ValueError(f"models: unknown model {name!r}; {did_you_mean(name, [*MODELS, *ALIASES])}")
        config = MODELS[name]
        tokens, channels = (224 // config.patch_size) ** 2, config.embed_dim
        found += [
            Case(name, batch, dtype, tokens, channels, channels // 2, 4 * channels) for batch in batches
        ]
    return found


def make_subject(case: Case, device: torch.device) -> Subject:
    """timm's block with random weights, biases and norms, a fused copy, and enough inputs to be L2-cold."""
    from timm.models.mlp_mixer import MixerBlock

    dtype = getattr(torch, case.dtype)
    ratios = case.token_hidden / case.channels, case.channel_hidden / case.channels
    eager = MixerBlock(case.channels, case.tokens, mlp_ratio=ratios)
    verify.randomise(eager)
    eager = eager.to(device, dtype).eval()
    fused = copy.deepcopy(eager)
    fastmixer.fuse(fused, strict=True)
    shape = (case.batch, case.tokens, case.channels)
    copies = measure.cold_copies(math.prod(shape) * dtype.itemsize, device)
    return Subject(eager, fused, torch.randn(copies, *shape, device=device, dtype=dtype))


def gate(subject: Subject, call: measure.Call) -> parity.Parity:
    """The parity of ``call`` against the eager block, upcast to fp64.

    Every check draws an input of its own, so that a right answer to an earlier one, left in reused memory,
    cannot pass for an element that was never written.
    """
    x = torch.randn_like(subject.inputs[0])
    exact = copy.deepcopy(subject.eager).double()
    truth = torch.cat([exact(part.double()) for part in x.split(TRUTH_SAMPLES)])
    return parity.compare(call(x).clone(), subject.eager(x), truth, parity.accumulate_dtype(x.dtype))


def measure_cell(
    case: Case, timer: measure.Timer, device: torch.device, opponents: Opponents, ceilings: dict | None
) -> dict:
    """One cell of the report. A red gate leaves "ms" empty; an opponent that fails is named in "errors"."""
    cell: dict = {**asdict(case), "flops": case.flops, "bytes": case.bytes}
    cell.update(ok=False, parity={}, errors={}, ms={}, ratios={}, clocks=None)
    with torch.no_grad(), fastmixer.backend("triton"):
        try:
            subject = make_subject(case, device)
        except RuntimeError as error:  # out of memory
            cell["errors"]["case"] = _first_line(error)
            return cell
        calls: dict[str, measure.Call] = {}
        for name, make in opponents.items():
            try:
                call = make(subject)
                verdict = gate(subject, call)
            except RuntimeError as error:  # out of memory, inductor's failures, a kernel that cannot run
                cell["errors"][name] = _first_line(error)
                continue
            calls[name] = call
            cell["parity"][name] = _as_json(verdict)
        fused = [name for name in opponents if name.startswith("fused")]
        green = all(
            cell["parity"].get(name, {}).get("ok", False) for name in fused if name not in cell["errors"]
        )
        cell["ok"] = green and "fused" in calls
        if not cell["ok"]:
            return cell
        try:
            times = timer(calls, subject.inputs)
        except RuntimeError as error:
            cell["errors"]["timer"] = _first_line(error)
            return cell
    cell["clocks"] = measure.clocks() if device.type == "cuda" else None
    stats = {name: measure.summarise(values) for name, values in times.items()}
    cell["ms"] = {name: asdict(value) for name, value in stats.items()}
    cell["ratios"] = {
        f"{slow}/{fast}": stats[slow].median / stats[fast].median
        for fast in fused
        for slow in ("eager", "compile")
        if slow in stats and fast in stats
    }
    cell.update(_rates(case, stats["fused"].median, ceilings))
    return cell


def _rates(case: Case, milliseconds: float, ceilings: dict | None) -> dict:
    """What the fused block achieves, and its share of what the GPU could."""
    rates = {"tflop_per_s": case.flops / milliseconds / 1e9, "gb_per_s": case.bytes / milliseconds / 1e6}
    if ceilings:
        floor = max(
            case.flops / ceilings["product_tflop_per_s"] / 1e9, case.bytes / ceilings["copy_gb_per_s"] / 1e6
        )
        rates |= {"floor_ms": floor, "share_of_floor": floor / milliseconds}
    return rates


def _as_json(verdict: parity.Parity) -> dict:
    """JSON knows no inf: it becomes None."""
    values = {**asdict(verdict), "ratio": verdict.ratio, "ok": verdict.ok}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


# ---- the run and its file --------------------------------------------------------------------------------


def run(
    cases: Sequence[Case],
    timer: measure.Timer,
    device: torch.device,
    output: Path,
    *,
    opponents: Opponents = OPPONENTS,
    header: dict | None = None,
    resume: bool = False,
    log: Callable[[str], None] = print,
) -> dict:
    """Measures every case, and returns the report that ``output`` then holds.

    While it runs, the report so far is in ``partial_path(output)``, so that a killed run neither loses its
    cells nor overwrites a complete report.

    Args:
        timer: what measures; see ``benchmarks.measure``.
        opponents: what races. The names that start with "fused" must pass the parity gate.
        header: joins the report; its "environment" must equal a partial report's for that to be resumed.
        resume: keep the partial report's cells, but for those with errors or a red gate.
    """
    partial = partial_path(output)
    report = {"kind": "blocks-forward", "schema": measure.SCHEMA, "started": measure.now(), **(header or {})}
    report |= {"formulas": FORMULAS, "complete": False}
    if resume:
        report |= _resumable(partial, report)
    done = {_case_of(cell): cell for cell in report.setdefault("cells", [])}
    log(TABLE_HEAD)
    for case in cases:
        cell = done.get(case)
        if cell is None:
            cell = measure_cell(case, timer, device, opponents, report.get("ceilings"))
            report["cells"].append(cell)
            report["updated"] = measure.now()
            measure.write_atomically(partial, report)
        log(table_row(cell))
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
    if any(earlier.get(key) != report.get(key) for key in ("schema", "environment", "protocol")):
        return {}
    if (report.get("environment") or {}).get("dirty"):
        return {}
    kept = {key: earlier[key] for key in ("started", "ceilings") if key in earlier}
    return {**kept, "cells": [cell for cell in earlier["cells"] if cell["ok"] and not cell["errors"]]}


def _case_of(cell: dict) -> Case:
    return Case(*(cell[name] for name in Case.__dataclass_fields__))


COLUMNS = ("eager", "compile", "fused", "fused_graph")
TABLE_HEAD = f"{'block':<16}{'batch':>6}  {'dtype':<9}{'parity':>7}" + "".join(
    f"{title:>13}"
    for title in (*(f"{c} ms" for c in COLUMNS[:3]), "graph ms", "eager/fused", "compile/fused", "of floor")
)


def table_row(cell: dict) -> str:
    """A cell as one line under TABLE_HEAD, with what went wrong behind it."""
    p = cell["parity"].get("fused")
    ratio = "-" if p is None or p["ratio"] is None else f"{p['ratio']:.2f}"
    text = f"{cell['model']:<16}{cell['batch']:>6}  {cell['dtype']:<9}{ratio:>7}"
    for name in COLUMNS:
        text += f"{cell['ms'][name]['median']:>13.4f}" if name in cell["ms"] else f"{'-':>13}"
    for name in ("eager/fused", "compile/fused"):
        text += f"{cell['ratios'][name]:>13.2f}" if name in cell["ratios"] else f"{'-':>13}"
    share = cell.get("share_of_floor")
    text += f"{share:>13.0%}" if share is not None else f"{'-':>13}"
    if p is not None and not cell["ok"]:
        text += "  PARITY FAILED: not timed"
    return text + "".join(f"  {name}: {error}" for name, error in cell["errors"].items())


# ---- command line ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: all cells measured; 1: a red gate or a failed opponent; 2: bad usage, or no GPU."""
    options = _parser().parse_args(argv)
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
    name = "blocks-forward-quick.json" if options.quick else "blocks-forward.json"
    output = options.output or RESULTS / measure.slug(measure.device_name(device)) / name
    report = run(cases, timer, device, output, header=header, resume=options.resume)
    print(f"written to {output}")
    return 0 if all(cell["ok"] and not cell["errors"] for cell in report["cells"]) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", metavar="NAME", help="default: the paper's seven")
    parser.add_argument("--batch", nargs="+", type=positive, metavar="N", help="default: 1 64 256")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", metavar="DTYPE", help="bf16, fp16 or fp32")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: benchmarks/results/<gpu>/…")
    parser.add_argument("--quick", action="store_true", help="B/16 at batch 1 and 64, fewer calls")
    parser.add_argument("--resume", action="store_true", help="continue a killed run of the same code")
    parser.add_argument("--commit", metavar="HASH", help="recorded where git cannot say which commit this is")
    return parser


if __name__ == "__main__":
    sys.exit(main())

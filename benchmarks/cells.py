"""One case: the parity gate, then times, memory, launches and rates of whoever races: the cells of the file.

No time without a green gate: the fused side has to pass the parity criterion (``fastmixer.parity``) on fresh
random inputs, with every gradient, and its CUDA graph too. Whatever fails, an opponent, a measurement or the
whole case, is named in the cell's "errors", and the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import math
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import fastmixer
from fastmixer import parity
from fastmixer.dtypes import accumulate_dtype

from . import launches, measure, opponents
from .levels import Case, Subject, make_call, make_subject
from .schema import FUSED, best_opponent

TRUTH_SAMPLES = 16  # the fp64 truth is computed so many samples at a time, to bound its memory
JUDGED_SAMPLES = (
    64  # of a whole model at most: in fp64 a large batch of a large one takes longer than the rest
)
# Of the shortest tensor that is judged, pooled over as many inputs as it takes: the relative error of the 49
# elements of a token half's bias is a matter of luck.
POOLED_ELEMENTS = 256
ON_A_CPU = "fastmixer runs the PyTorch reference: x is on the CPU"


@dataclass(frozen=True)
class Bench:
    """What all cells of a run share.

    timer: what measures; see ``measure``. names: of the opponents that may race.
    ceilings: as in the file, or None. backend: what ``fastmixer.backend`` is told: "auto" is what users get.
    """

    device: torch.device
    timer: measure.Timer
    names: tuple[str, ...]
    ceilings: dict | None = None
    backend: str = "auto"


def measure_case(case: Case, bench: Bench) -> list[dict]:
    """The cells of a case: one, or at level kernel one for every launch. No exception gets out of it."""
    cell = empty_cell(case, bench.device)
    cells = [cell]
    with noted(cell, "predicted_ms"):
        cell["predicted_ms"] = predicted(case, bench.device)
    with (
        noted(cell, "case"),
        torch.set_grad_enabled(case.trains),
        fastmixer.backend(bench.backend),
        fused_or_error(bench.device),
    ):
        if any(name.startswith("compile") for name in bench.names):
            torch._dynamo.reset()  # else the limit on recompilations is reached after a few shapes
        subject = make_subject(case, bench.device)
        if case.level == "kernel":
            cells = _kernel_cells(cell, case, launches.block_subject(subject), bench)
        else:
            _fill(cell, subject, bench)
    return cells


def empty_cell(case: Case, device: torch.device) -> dict:
    """A cell without results."""
    cell = {name: getattr(case, name) for name in ("level", "model", "batch", "dtype", "direction")}
    cell |= {"op": None, "device": device.type, "ok": False, "parity": {}, "errors": {}}
    cell |= {"flops": case.flops, "bytes": case.bytes, "parameters": case.parameters, "opponents": {}}
    return cell | {"predicted_ms": {}, "ratio_to_best": None, "best_opponent": None, "clocks": None}


def _fill(cell: dict, subject: Subject, bench: Bench) -> None:
    """Gates and times everyone, and writes what was found into the cell."""
    contest = opponents.choose(subject.case, bench.names)
    calls: dict[str, measure.Call] = {}
    plain: dict[str, measure.Call] = {}
    own: dict[str, dict] = {}
    for name, opponent in contest.items():
        with noted(cell, name):
            call = opponent.make(subject)
            if opponent.judged and (name in FUSED or subject.judged is None):
                cell["parity"][name] = as_json(gate(subject, call))
            else:
                call(subject.items[0])  # what cannot run must show before anyone is timed
            if opponent.plain:
                plain[name] = call if opponent.plain is opponent.make else opponent.plain(subject)
            own[name] = opponents.own_counts(name, subject.case)
            calls[name] = call
    if green(cell) and "fused" in calls:
        _time(cell, calls, {name: plain[name] for name in plain if name in calls}, subject, bench, own)


def _time(
    cell: dict,
    calls: dict[str, measure.Call],
    plain: dict[str, measure.Call],
    subject: Subject,
    bench: Bench,
    own: dict[str, dict],
) -> None:
    """Times the calls; of those in ``plain`` also CUDA graphs, memory and launches."""
    replays: dict[str, measure.Replay] = {}
    clocks = {"before": measure.clocks(bench.device)}
    graphs = None
    with noted(cell, "timer"):
        times = bench.timer(calls, subject.items)
        if bench.device.type == "cuda":
            short = [name for name in plain if measure.summarise(times[name]).median <= measure.GRAPH_MS]
            replays = _capture(cell, {name: plain[name] for name in short}, subject)
        graphs = measure.graph_times(replays, bench.timer) if green(cell) else None
    if graphs is None:
        return
    clocks["after"] = measure.clocks(bench.device)
    del replays
    cell["clocks"] = clocks if any(clocks.values()) else None
    # All or none: a cell with times and without a verdict would be no valid one.
    cell["opponents"] = {
        name: _figures(cell, values, graphs.get(name), bench, own[name], name)
        | _weighed(cell, name, plain.get(name), subject.items[0], bench.device)
        for name, values in times.items()
    }
    cell["ok"] = True
    cell["best_opponent"], cell["ratio_to_best"] = best_opponent(cell["opponents"])


def _capture(cell: dict, plain: dict[str, measure.Call], subject: Subject) -> dict[str, measure.Replay]:
    """CUDA graphs; those of the fused side have to pass the gate like the call itself."""
    replays = {}
    for name, call in plain.items():
        with noted(cell, f"{name} graph"):
            replay = measure.Replay(call, subject.items)
            if name.startswith("fused") and cell["level"] != "kernel":
                cell["parity"][f"{name}_graph"] = as_json(gate(subject, replay.answer))
            replays[name] = replay
    return replays


def _figures(
    cell: dict,
    times: list[float],
    graph: list[float] | None,
    bench: Bench,
    own: dict[str, int | None],
    name: str,
) -> dict:
    """An opponent's times, and what they come to: rates of the work that it does itself."""
    ms = measure.summarise(times)
    graph_ms = measure.summarise(graph) if graph else None
    median = (graph_ms or ms).median
    other = own["flops"] is not None  # another network, whose bytes nobody counted
    flops, moved = (own["flops"], None) if other else (cell["flops"], cell["bytes"])
    if name == "copy":
        flops = None
    if name == "cublas":
        moved = None
    ceilings = bench.ceilings
    share = None
    if ceilings and cell["dtype"] in ceilings and flops is not None and moved is not None:
        peak = ceilings[cell["dtype"]]["product_tflop_per_s"]
        share = max(flops / peak / 1e9, moved / ceilings["copy_gb_per_s"] / 1e6) / median
    return {
        "ms": asdict(ms),
        "graph_ms": asdict(graph_ms) if graph_ms else None,
        "tflop_per_s": flops / median / 1e9 if flops else None,
        "gb_per_s": moved / median / 1e6 if moved else None,
        "share_of_roofline": share,
        "images_per_s": cell["batch"] / median * 1e3 if cell["level"] == "model" else None,
        **own,
    }


def _weighed(
    cell: dict, name: str, call: measure.Call | None, item: measure.Item, device: torch.device
) -> dict:
    """Peak memory and launches of a call, None where they are not to be had."""
    found: dict[str, int | None] = {"peak_bytes": None, "launches": None}
    if call is not None:
        for field, look in (("peak_bytes", measure.peak_bytes), ("launches", measure.launches)):
            with noted(cell, f"{name} {field}"):
                found[field] = look(call, item, device)
    return found


# ---- the kernel level ------------------------------------------------------------------------------------


def _kernel_cells(whole: dict, case: Case, subject: Subject, bench: Bench) -> list[dict]:
    """A cell for every launch of the block, once the block has passed; if not, ``whole``, which has no op."""
    gated = make_call(subject.fused, case, parameters_of=subject.owner)
    with noted(whole, "fused"):
        whole["parity"]["fused"] = as_json(gate(subject, gated))
    if not (green(whole) and whole["parity"]):
        return [whole]
    ops = launches.record(subject, make_call(subject.fused, case, parameters_of=subject.owner))
    cells = []
    for op in ops:
        cell = empty_cell(case, bench.device) | {"op": op.name, "parity": whole["parity"]}
        cell |= {"flops": op.flops, "bytes": op.bytes, "parameters": None}
        if op.name in whole["predicted_ms"]:
            cell["predicted_ms"] = {"fused": whole["predicted_ms"][op.name]}
        else:
            cell["predicted_ms"] = {}
        cells.append(cell)
        with noted(cell, "case"):
            calls = {"fused": launches.run_again}
            calls |= {name: call for name, call in launches.ceiling(op, case).items() if name in bench.names}
            none = {"flops": None, "parameters": None}
            of_op = replace(subject, items=op.launches)
            _time(cell, calls, calls, of_op, bench, dict.fromkeys(calls, none))
    return cells


# ---- the gate --------------------------------------------------------------------------------------------


def gate(subject: Subject, call: measure.Call) -> dict[str, parity.Parity]:
    """The parity of all that ``call`` returns, by name, against the eager module, upcast to fp64.

    Every check draws an input of its own, so that a right answer to an earlier one, left in reused memory,
    cannot pass for an element that was never written. Where an answer has few elements several are pooled.
    """
    checks = [_answers(subject, call)]
    shortest = min(tensor.numel() for tensor in checks[0].truth.values())
    checks += [_answers(subject, call) for _ in range(1, -(-POOLED_ELEMENTS // shortest))]
    accumulate = accumulate_dtype(subject.case.product_dtype)

    def pooled(name: str) -> list[Tensor]:
        return [torch.cat([side[name].flatten() for side in sides]) for sides in zip(*checks, strict=True)]

    return {name: parity.compare(*pooled(name), accumulate) for name in checks[0].truth}


class Answers(NamedTuple):
    """What the three sides of a check return for one input, by name."""

    fused: dict[str, Tensor]
    eager: dict[str, Tensor]
    truth: dict[str, Tensor]


def _answers(subject: Subject, call: measure.Call) -> Answers:
    item = subject.draw()
    # Cloned, because the memory of a CUDA graph's answers is written by its next replay.
    fused = {name: tensor.clone() for name, tensor in named(call(item)).items()}
    if subject.judged is not None:
        # By sample: no gradient of a parameter is among them. Eager may not have the memory for all of them.
        samples = spread_samples(subject.case.batch, item)
        item = tuple(t[samples] for t in item) if subject.case.trains else item[samples]
        fused = {name: fused[name][samples] for name in subject.judged if name in fused}
    eager = named(make_call(subject.eager, subject.case)(item))
    return Answers(fused, {name: eager[name] for name in fused}, true_answers(subject, item))


def spread_samples(batch: int, item: measure.Item) -> Tensor:
    """Indices of ``JUDGED_SAMPLES`` samples from the first to the last, or of all if there are fewer."""
    count = min(batch, JUDGED_SAMPLES)
    device = measure.as_tuple(item)[0].device
    return torch.linspace(0, batch - 1, count, device=device).round().long()


def named(answer: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"output": answer} if isinstance(answer, Tensor) else answer


def true_answers(subject: Subject, item: measure.Item) -> dict[str, Tensor]:
    """What the fp64 module answers, a few samples at a time: parameters' gradients are sums over samples."""
    exact = make_call(copy.deepcopy(subject.eager).double(), subject.case)
    pieces: dict[str, list[Tensor]] = {"output": [], "x": []}
    sums: dict[str, Tensor] = {}
    for part in zip(*(t.double().split(TRUTH_SAMPLES) for t in measure.as_tuple(item)), strict=True):
        for name, tensor in named(exact(part if subject.case.trains else part[0])).items():
            if name in pieces:
                pieces[name].append(tensor)
            elif subject.judged is None or name in subject.judged:
                sums[name] = sums[name] + tensor if name in sums else tensor
    return {name: torch.cat(tensors) for name, tensors in pieces.items() if tensors} | sums


def green(cell: dict) -> bool:
    """Whether nothing of the fused side has failed the gate so far."""
    return all(found["ok"] for name, found in cell["parity"].items() if name.startswith("fused"))


def as_json(verdicts: dict[str, parity.Parity]) -> dict:
    """The tensor nearest its bound in full, of the others the ratio. JSON knows no inf: it becomes None."""
    worst = max(verdicts, key=lambda name: verdicts[name].share_of_bound)
    values = {**asdict(verdicts[worst]), "ratio": verdicts[worst].ratio}
    ratios = {name: _finite(verdict.ratio) for name, verdict in verdicts.items()}
    failed = [name for name, verdict in verdicts.items() if not verdict.ok]
    found = {name: _finite(value) for name, value in values.items()}
    return {"ok": not failed, "tensor": worst, **found, "ratios": ratios, "failed": failed}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


# ---- failures, predictions -------------------------------------------------------------------------------


@contextlib.contextmanager
def noted(cell: dict, name: str) -> Iterator[None]:
    """An exception inside the block becomes the cell's error of that name."""
    try:
        yield
    except Exception as error:
        cell["errors"][name] = described(error)


def described(error: Exception) -> str:
    """Its type, its first line, and where in this project it was raised, or the call that led to it."""
    own = ("fastmixer", "benchmarks")  # as a package and in a checkout
    frames = [
        f" ({'/'.join(Path(frame.f_code.co_filename).parts[-2:])}:{line})"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] in own
    ]
    said = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {said}{frames[-1] if frames else ''}"


@contextlib.contextmanager
def fused_or_error(device: torch.device) -> Iterator[None]:
    """A block that quietly ran unfused would be timed as fused: makes that warning an error.

    On a CPU the reference is what fastmixer runs, and what is timed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastmixer.FallbackWarning)
        if device.type == "cpu":
            warnings.filterwarnings("ignore", message=ON_A_CPU, category=fastmixer.FallbackWarning)
        yield


def predicted(case: Case, device: torch.device) -> dict[str, float]:
    """Milliseconds by the cost model: of "fused" and, by name, of its launches, which are its summands.

    Of a model the launches of all blocks; of a half its own and the row moments that it computes alone. {} on
    a CPU and for a GPU of which nothing is known.
    """
    if device.type != "cuda":
        return {}
    from fastmixer.configs import target_of
    from fastmixer.configs.predict import cost
    from fastmixer.ops.launch import Context

    shape, target = case.shape, target_of(device)
    found = cost.predict_block(
        shape.tokens, shape.channels, shape.token_hidden, shape.channel_hidden, case.batch,
        case.product_dtype, case.x_dtype, target, training=case.trains, select=Context(target).select,
    )  # fmt: skip
    times = case.shape.blocks if case.level == "model" else 1
    wanted = tuple(f"{half}_" for half in case.halves) + ("row_moments",)
    found = {k: times * v.seconds * 1e3 for k, v in found.items() if k.startswith(wanted)}
    return {"fused": sum(found.values()), **found} if found else {}

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

import torch
from torch import Tensor

import fastmixer
from fastmixer import configs, parity, timing
from fastmixer.configs import Problem
from fastmixer.configs.ops import TRAINING
from fastmixer.configs.predict import cost
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Context

from . import designs, launches, measure, opponents
from .levels import Case, Subject, make_call, make_subject
from .schema import FUSED, best_opponent, is_design

TRUTH_SAMPLES = 16  # the fp64 truth is computed so many samples at a time, to bound its memory
# Of a whole model at most: in fp64 a large batch of a large one takes longer than all the rest.
JUDGED_SAMPLES = 64
# Of the shortest tensor that is judged, pooled over as many inputs as it takes: the relative error of the 49
# elements of a token half's bias is a matter of luck.
POOLED_ELEMENTS = 256
ON_A_CPU = "fastmixer runs the PyTorch reference: x is on the CPU"


@dataclass(frozen=True)
class Bench:
    """What all cells of a run share.

    timer: what measures; see ``measure``. names: of the opponents that may race.
    ceilings: as in the file, or None. backend: what ``fastmixer.backend`` is told: "auto" is what users get.
    designs: the ops whose designs race too.
    """

    device: torch.device
    timer: measure.Timer
    names: tuple[str, ...]
    ceilings: dict | None = None
    backend: str = "auto"
    designs: tuple[str, ...] = ()


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
            cells = _kernel_cells(cell, subject, bench)
        else:
            _fill(cell, subject, bench)
    return cells


def empty_cell(case: Case, device: torch.device) -> dict:
    """A cell without results."""
    cell = {name: getattr(case, name) for name in ("level", "model", "batch", "dtype", "direction")}
    cell |= {"op": None, "device": device.type, "ok": False, "parity": {}, "errors": {}}
    cell |= {"flops": case.flops, "bytes": case.bytes, "parameters": case.parameters, "opponents": {}}
    return cell | {"predicted_ms": {}, "ratio_to_best": None, "best_opponent": None, "clocks": None}


@dataclass(frozen=True)
class Racer:
    """Who is timed.

    call: what is timed. weighed: what is captured into a CUDA graph and weighed; None: neither is done.
    counts: as ``opponents.own_counts``.
    """

    call: measure.Call
    weighed: measure.Call | None
    counts: dict[str, int | None]


def _fill(cell: dict, subject: Subject, bench: Bench) -> None:
    """Gates and times everyone, and writes the results into the cell."""
    racers: dict[str, Racer] = {}
    raced = designs.raced(subject.case, bench.designs, bench.device)
    for name, opponent in (opponents.choose(subject.case, bench.names) | raced).items():
        with noted(cell, name):
            call = opponent.make(subject)
            if opponent.judged and (name in FUSED or subject.case.judged is None):
                cell["parity"][name] = verdict = as_json(gate(subject, call))
                _refuse_wrong_design(name, verdict)
            else:
                call(subject.items[0])  # what cannot run must show before anyone is timed
            plain = opponent.plain(subject) if opponent.plain else call
            weighed = plain if opponent.weighed else None
            racers[name] = Racer(call, weighed, opponents.own_counts(name, subject.case))
    if green(cell) and "fused" in racers:
        _time(cell, racers, subject, bench)


def _time(cell: dict, racers: dict[str, Racer], subject: Subject, bench: Bench) -> None:
    """Times all, and of what is weighed also CUDA graphs, memory and launches."""
    clocks = {"before": measure.clocks(bench.device)}
    graphs = None
    with noted(cell, "timer"):
        times = bench.timer({name: racer.call for name, racer in racers.items()}, subject.items)
        replays = {}
        if bench.device.type == "cuda":
            weighed = {name: racer.weighed for name, racer in racers.items() if racer.weighed}
            medians = {name: timing.summarise(times[name]).median for name in weighed}
            short = {name: weighed[name] for name in weighed if medians[name] <= measure.GRAPH_MS}
            replays = _capture(cell, short, subject)
        graphs = measure.graph_times(replays, bench.timer) if green(cell) else None
        del replays  # and the graphs' memory, before anyone is weighed
    if graphs is None:
        return
    clocks["after"] = measure.clocks(bench.device)
    cell["clocks"] = clocks if any(clocks.values()) else None
    # All or none: a cell with times and without a verdict would be no valid one.
    figures = {}
    for name, racer in racers.items():
        figures[name] = _figures(cell, name, racer.counts, times[name], graphs.get(name), bench)
        for weight in ("peak_bytes", "launches") if racer.weighed else ():
            with noted(cell, f"{name} {weight}"):
                measured = getattr(measure, weight)(racer.weighed, subject.items[0], bench.device)
                figures[name][weight] = measured
    cell["opponents"] = {name: entry for name, entry in figures.items() if not is_design(name)}
    if bench.designs:
        graph_failed = {name.removesuffix(" graph") for name in cell["errors"]}
        raced = {name: entry for name, entry in figures.items() if is_design(name)}
        cell["designs"] = {name: entry for name, entry in raced.items() if name not in graph_failed}
    cell["ok"] = True
    cell["best_opponent"], cell["ratio_to_best"] = best_opponent(cell["opponents"])


def _capture(cell: dict, calls: dict[str, measure.Call], subject: Subject) -> dict[str, measure.Replay]:
    """CUDA graphs; those of the fused side have to pass the gate like the call itself."""
    replays = {}
    for name, call in calls.items():
        with noted(cell, f"{name} graph"):
            replay = measure.Replay(call, subject.items)
            if (name.startswith("fused") or is_design(name)) and cell["level"] != "kernel":
                cell["parity"][f"{name}_graph"] = verdict = as_json(gate(subject, replay.answer))
                _refuse_wrong_design(name, verdict)
            replays[name] = replay
    return replays


def _refuse_wrong_design(name: str, verdict: dict) -> None:
    """The others race without it; that fused itself is wrong ends the cell."""
    if is_design(name) and not verdict["ok"]:
        raise ValueError("this design is wrong: it does not race")


def _figures(
    cell: dict, name: str, counts: dict, times: list[float], graph: list[float] | None, bench: Bench
) -> dict:
    """An opponent's times, and what they come to: rates of the work that it does itself."""
    ms = timing.summarise(times)
    graph_ms = timing.summarise(graph) if graph else None
    median = (graph_ms or ms).median
    flops, moved = cell["flops"], cell["bytes"]
    if counts["flops"] is not None:  # another network, whose bytes nobody counted
        flops, moved = counts["flops"], None
    if name == "copy":
        flops = None
    if name == "cublas":
        moved = None
    share, ceilings = None, bench.ceilings or {}
    if cell["dtype"] in ceilings and None not in (flops, moved):
        peak = ceilings[cell["dtype"]]["product_tflop_per_s"]
        share = max(flops / peak / 1e9, moved / ceilings["copy_gb_per_s"] / 1e6) / median
    return {
        "ms": asdict(ms),
        "graph_ms": asdict(graph_ms) if graph_ms else None,
        "tflop_per_s": flops / median / 1e9 if flops else None,
        "gb_per_s": moved / median / 1e6 if moved else None,
        "share_of_roofline": share,
        "images_per_s": cell["batch"] / median * 1e3 if cell["level"] == "model" else None,
        "peak_bytes": None,
        "launches": None,
        **counts,
    }


def _kernel_cells(whole: dict, subject: Subject, bench: Bench) -> list[dict]:
    """A cell for every launch of the block, once the block has passed; if not, ``whole``, which has no op."""
    case = subject.case
    subject = replace(subject, fused=launches.RecordedBlock(subject.eager))
    call = make_call(subject.fused, case)
    with noted(whole, "fused"):
        whole["parity"]["fused"] = as_json(gate(subject, call))
    if not (green(whole) and whole["parity"]):
        return [whole]
    cells = []
    for op in launches.record(subject, call):
        cell = empty_cell(case, bench.device) | {"op": op.name, "parity": whole["parity"]}
        cell |= {"flops": op.flops, "bytes": op.bytes, "parameters": None}
        if op.name in whole["predicted_ms"]:
            cell["predicted_ms"] = {"fused": whole["predicted_ms"][op.name]}
        cells.append(cell)
        with noted(cell, "case"):
            calls = {"fused": launches.execute}
            calls |= {name: call for name, call in launches.ceiling(op, case).items() if name in bench.names}
            racers = {name: Racer(call, call, opponents.SAME_COUNTS) for name, call in calls.items()}
            _time(cell, racers, replace(subject, items=op.launches), bench)
    return cells


# ---- the gate --------------------------------------------------------------------------------------------


def gate(subject: Subject, call: measure.Call) -> dict[str, parity.Parity]:
    """The parity of all that ``call`` returns, by name, against the eager module, upcast to fp64.

    Every check draws an input of its own, so that a right answer to an earlier one, left in reused memory,
    cannot pass for an element that was never written. Where an answer has few elements several are pooled.
    """
    checks = [_answers(subject, call)]
    shortest = min(truth.numel() for _, _, truth in checks[0].values())
    checks += [_answers(subject, call) for _ in range(1, configs.cdiv(POOLED_ELEMENTS, shortest))]
    accumulate = accumulate_dtype(subject.case.product_dtype)

    def pooled(name: str) -> list[Tensor]:
        sides = zip(*(check[name] for check in checks), strict=True)
        return [torch.cat([tensor.flatten() for tensor in side]) for side in sides]

    return {name: parity.compare(*pooled(name), accumulate) for name in checks[0]}


def _answers(subject: Subject, call: measure.Call) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What ``call``, the eager module and the fp64 one answer to a fresh input, by name."""
    case, (item,) = subject.case, subject.draw(1)
    # Cloned, because the memory of a CUDA graph's answers is written by its next replay.
    fused = {name: tensor.clone() for name, tensor in named(call(item)).items()}
    if case.judged is not None:
        # By sample: no gradient of a parameter is among them. Eager may not have the memory for all of them.
        samples = spread_samples(case.batch, item)
        item = tuple(t[samples] for t in item) if case.trains else item[samples]
        fused = {name: fused[name][samples] for name in case.judged if name in fused}
    eager, truth = named(make_call(subject.eager, case)(item)), true_answers(subject, item)
    return {name: (fused[name], eager[name], truth[name]) for name in truth}


def spread_samples(batch: int, item: measure.Item) -> Tensor:
    """Indices of ``JUDGED_SAMPLES`` samples from the first to the last, or of all if there are fewer."""
    count = min(batch, JUDGED_SAMPLES)
    device = measure.as_tuple(item)[0].device
    return torch.linspace(0, batch - 1, count, device=device).round().long()


def named(answer: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"output": answer} if isinstance(answer, Tensor) else answer


def true_answers(subject: Subject, item: measure.Item) -> dict[str, Tensor]:
    """What the fp64 module answers, a few samples at a time: parameters' gradients are sums over samples."""
    case, pieces = subject.case, {}
    exact = make_call(copy.deepcopy(subject.eager).double(), case)
    for part in zip(*(t.double().split(TRUTH_SAMPLES) for t in measure.as_tuple(item)), strict=True):
        for name, tensor in named(exact(part if case.trains else part[0])).items():
            if name in ("output", "x"):
                pieces.setdefault(name, []).append(tensor)
            elif case.judged is None:
                pieces[name] = pieces[name] + tensor if name in pieces else tensor
    return {name: torch.cat(piece) if isinstance(piece, list) else piece for name, piece in pieces.items()}


def green(cell: dict) -> bool:
    """Whether nothing of the fused side has failed the gate so far."""
    return all(found["ok"] for name, found in cell["parity"].items() if name.startswith("fused"))


def as_json(verdicts: dict[str, parity.Parity]) -> dict:
    """The tensor nearest its bound in full, of the others the ratio. JSON knows no inf: it becomes None."""
    worst = max(verdicts, key=lambda name: verdicts[name].share_of_bound)
    ratios = {name: verdict.ratio for name, verdict in verdicts.items()}
    failed = [name for name, verdict in verdicts.items() if not verdict.ok]

    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    figures = finite({**asdict(verdicts[worst]), "ratio": ratios[worst]})
    return {"ok": not failed, "tensor": worst, **figures, "ratios": finite(ratios), "failed": failed}


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
    shape, target = case.shape, configs.target_of(device)
    sizes = case.batch, shape.tokens, shape.channels
    halves = {
        half + "_half" + TRAINING * case.trains: Problem(*sizes, hidden, case.x_dtype, case.product_dtype)
        for half, hidden in (("token", shape.token_hidden), ("channel", shape.channel_hidden))
    }
    found = cost.predict_halves(halves, target, Context(target).choose)
    times = case.shape.blocks if case.level == "model" else 1
    wanted = tuple(f"{half}_" for half in case.halves) + ("row_moments",)
    found = {k: times * v.seconds * 1e3 for k, v in found.items() if k.startswith(wanted)}
    return {"fused": sum(found.values()), **found} if found else {}

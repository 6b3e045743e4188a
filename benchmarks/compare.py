"""What moved between two runs beyond their spread: ``python -m benchmarks.report --compare A B``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from .recorded import Cell, Key, ResultError, Run, newest_cells, read_all, tell
from .tables import figure, table

MOVED = 0.02  # a median that changed by less counts as the same, whatever the spread
KINDS = {"ms": "calls", "graph_ms": "graph"}


@dataclass(frozen=True)
class Move:
    """A fused time that changed beyond the spread, in milliseconds."""

    key: Key
    name: str
    kind: str
    old: float
    new: float

    @property
    def slower(self) -> bool:
        return self.new > self.old


@dataclass(frozen=True)
class Comparison:
    """moves: the worst first. lost: times that B no longer has, with the reason. added: cells only B has."""

    moves: list[Move]
    lost: list[str]
    added: int
    same: int
    drift: float | None  # of eager: the median over the cells of its new time by its old one

    @property
    def regressed(self) -> bool:
        return bool(self.lost) or any(move.slower for move in self.moves)


def compare(old: Mapping[Key, Cell], new: Mapping[Key, Cell]) -> Comparison:
    """Compares the fused times, cell by cell; those of the opponents only show how the machine drifted."""
    moves, lost, same, drifts = [], [], 0, []
    for key, before in old.items():
        if not before.content["ok"]:
            continue
        after = new.get(key)
        if after is None or not after.content["ok"]:
            lost.append(f"{key}: {'missing' if after is None else 'red: ' + _why_red(after)}")
            continue
        for name, kind, was in _fused_times(before):
            now = after.opponents.get(name, {}).get(kind)
            if now is None:
                lost.append(f"{key}: {name}, {KINDS[kind]}: no longer timed: {_why_lost(after, name)}")
            elif _moved(was, now):
                moves.append(Move(key, name, kind, was["median"], now["median"]))
            else:
                same += 1
        if before.milliseconds("eager") and after.milliseconds("eager"):
            drifts.append(after.milliseconds("eager") / before.milliseconds("eager"))
    moves.sort(key=lambda move: move.old / move.new)
    drift = statistics.median(drifts) if drifts else None
    return Comparison(moves, lost, len(new.keys() - old.keys()), same, drift)


def _fused_times(cell: Cell) -> Iterator[tuple[str, str, Mapping]]:
    for name, figures in cell.opponents.items():
        for kind in KINDS:
            if name.startswith("fused") and figures.get(kind) is not None:
                yield name, kind, figures[kind]


def _moved(was: Mapping, now: Mapping) -> bool:
    """Whether the intervals p20..p80 are disjoint and the median changed by more than 2%."""
    disjoint = now["p20"] > was["p80"] or now["p80"] < was["p20"]
    return disjoint and abs(now["median"] / was["median"] - 1) > MOVED


def _why_red(cell: Cell) -> str:
    red = [f"parity of {name}" for name, verdict in cell.content["parity"].items() if not verdict["ok"]]
    errors = [f"{name}: {error}" for name, error in cell.content["errors"].items()]
    return "; ".join(red + errors) or "no reason recorded"


def _why_lost(cell: Cell, name: str) -> str:
    return cell.content["errors"].get(name, "no reason recorded")


# ---- two files or folders --------------------------------------------------------------------------------


def show(old: Path, new: Path, *, force: bool = False) -> int:
    """Prints what moved from ``old`` to ``new``, two files or two folders of one GPU.

    Returns 0 without a regression, 1 with one: something slower, red or missing; 2 where the two must not be
    compared, unless ``force``: other GPUs, other schemas, or a run that was killed. Raises ResultError for
    what cannot be read at all.
    """
    runs = [_runs(path) for path in (old, new)]
    reasons = _differences(*runs)
    for reason in reasons:
        tell(reason)
    if reasons and not force:
        tell("not compared; --force does so all the same")
        return 2
    found = compare(*map(newest_cells, runs))
    print("\n".join(lines(found)))
    return 1 if found.regressed else 0


def _runs(path: Path) -> list[Run]:
    runs = read_all([path])
    if not runs:
        raise ResultError(f"{path}: holds no complete result")
    return runs


def _differences(old: list[Run], new: list[Run]) -> list[str]:
    """Why figures of the two say nothing about each other."""
    found = []
    for what, of in (("GPU", lambda run: run.gpu), ("schema", lambda run: run.content["schema"])):
        before, after = (sorted({str(of(run)) for run in runs}) for runs in (old, new))
        if before != after:
            found.append(f"another {what}: {', '.join(before)} against {', '.join(after)}")
    before, after = ({cell["device"] for run in runs for cell in run.content["cells"]} for runs in (old, new))
    if before and after and not before & after:
        found.append(f"another device: {', '.join(sorted(before))} against {', '.join(sorted(after))}")
    return found + [
        f"{run.path}: the run is not complete" for run in old + new if not run.content["complete"]
    ]


def lines(found: Comparison) -> list[str]:
    """The comparison as text."""
    text = []
    if found.moves:
        head = ["Cell", "Who", "Time", "old ms", "new ms", "new / old", ""]
        text += table(head, [_row(move) for move in found.moves]).splitlines()
    text += [f"LOST  {what}" for what in found.lost]
    slower = sum(move.slower for move in found.moves)
    text.append(
        f"{slower} slower, {len(found.moves) - slower} faster, {found.same} within the spread or "
        f"{MOVED:.0%}, {len(found.lost)} lost, {found.added} only in the second"
    )
    if found.drift is not None and abs(found.drift - 1) > MOVED:
        text.append(
            f"eager itself takes {found.drift:.3f} times what it took: another machine or other clocks"
        )
    return text


def _row(move: Move) -> list[str]:
    verdict = "SLOWER" if move.slower else "faster"
    times = [figure(move.old), figure(move.new), f"{move.new / move.old:.3f}"]
    return [str(move.key), move.name, KINDS[move.kind], *times, verdict]

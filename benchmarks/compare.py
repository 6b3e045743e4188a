"""What moved between two runs beyond their spread: ``python -m benchmarks.report --compare A B``."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .recorded import Cell, Key, ResultError, Run, newest_cells, read_all, tell
from .tables import figure, table

MOVED = 0.02  # a median that changed by less counts as the same, whatever the spread
KINDS = {"ms": "calls", "graph_ms": "graph"}


def show(old: Path, new: Path, *, force: bool = False) -> int:
    """Prints what moved from ``old`` to ``new``, two files or two folders of one GPU.

    Returns 0 without a regression, 1 with one: something slower, red or missing; 2 where the two must not be
    compared, unless ``force``: other GPUs, other devices, or a run that was killed. Raises ResultError for
    what cannot be read at all.
    """
    runs = read_all([old]), read_all([new])
    for path, of_path in zip((old, new), runs, strict=True):
        if not of_path:
            raise ResultError(f"{path}: holds no complete result")
    reasons = _differences(*runs)
    for reason in reasons:
        tell(reason)
    if reasons and not force:
        tell("not compared; --force does so all the same")
        return 2
    text, regressed = compare(*map(newest_cells, runs))
    print(text)
    return 1 if regressed else 0


def _differences(old: Sequence[Run], new: Sequence[Run]) -> list[str]:
    """Why figures of the two say nothing about each other."""
    reasons = []
    for what, values in (
        ("GPU", lambda run: {run.gpu}),
        ("device", lambda run: {cell["device"] for cell in run.content["cells"]}),
    ):
        before, after = (set().union(*map(values, runs)) for runs in (old, new))
        if before and after and not before & after:
            reasons.append(f"another {what}: {', '.join(sorted(before))} against {', '.join(sorted(after))}")
    killed = [run for run in (*old, *new) if not run.content["complete"]]
    return reasons + [f"{run.path}: the run is not complete" for run in killed]


class Time(NamedTuple):
    """A fused time of a cell in both runs; ``old`` and ``new`` are statistics, ``new`` None where lost."""

    key: Key
    name: str
    kind: str
    old: Mapping
    new: Mapping | None

    @property
    def growth(self) -> float:
        return self.new["median"] / self.old["median"]

    @property
    def moved(self) -> bool:
        """Whether the intervals p20..p80 are disjoint and the median changed by more than 2%."""
        disjoint = self.new["p20"] > self.old["p80"] or self.new["p80"] < self.old["p20"]
        return disjoint and abs(self.growth - 1) > MOVED

    def row(self) -> dict[str, str]:
        return {
            "Cell": str(self.key),
            "Who": self.name,
            "Time": KINDS[self.kind],
            "old ms": figure(self.old["median"]),
            "new ms": figure(self.new["median"]),
            "new / old": f"{self.growth:.3f}",
            "": "SLOWER" if self.growth > 1 else "faster",
        }


def compare(old: Mapping[Key, Cell], new: Mapping[Key, Cell]) -> tuple[str, bool]:
    """What moved, as text, and whether a fused time got longer, red or missing.

    The opponents' times only show how the machine drifted.
    """
    lost, times, drifts = [], [], []
    for key, before in old.items():
        after = new.get(key)
        if not before.content["ok"]:
            continue
        if after is None or not after.content["ok"]:
            lost.append(f"{key}: {'missing' if after is None else 'red: ' + _why_red(after)}")
            continue
        errors = after.content["errors"]
        for time in _fused_times(before, after):
            if time.new is None:
                reason = errors.get(time.name, "no reason recorded")
                lost.append(f"{key}: {time.name}, {KINDS[time.kind]}: no longer timed: {reason}")
            else:
                times.append(time)
        if before.milliseconds("eager") and after.milliseconds("eager"):
            drifts.append(after.milliseconds("eager") / before.milliseconds("eager"))

    moved = sorted((time for time in times if time.moved), key=lambda time: -time.growth)
    lines = [table([time.row() for time in moved])] if moved else []
    lines += [f"LOST  {what}" for what in lost]
    slower = sum(time.growth > 1 for time in moved)
    lines.append(
        f"{slower} slower, {len(moved) - slower} faster, {len(times) - len(moved)} within the spread or "
        f"{MOVED:.0%}, {len(lost)} lost, {len(new.keys() - old.keys())} only in the second"
    )
    drift = statistics.median(drifts) if drifts else 1.0
    if abs(drift - 1) > MOVED:
        lines.append(f"eager itself takes {drift:.3f} times what it took: another machine or other clocks")
    return "\n".join(lines), bool(lost or slower)


def _fused_times(before: Cell, after: Cell) -> Iterator[Time]:
    for name, figures in before.opponents.items():
        for kind in KINDS:
            if name.startswith("fused") and figures[kind] is not None:
                yield Time(before.key, name, kind, figures[kind], after.figure(name, kind))


def _why_red(cell: Cell) -> str:
    red = [f"parity of {name}" for name, verdict in cell.content["parity"].items() if not verdict["ok"]]
    errors = [f"{name}: {error}" for name, error in cell.content["errors"].items()]
    return "; ".join(red + errors) or "no reason recorded"

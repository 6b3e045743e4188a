"""What moved between two runs beyond their spread: ``python -m benchmarks.report --compare A B``."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from .recorded import Cell, ResultError, Run, newest_cells, read_all, tell
from .schema import troubles
from .tables import figure, table

MOVED = 0.02  # a median that changed by less counts as the same, whatever the spread
KINDS = {"ms": "calls", "graph_ms": "graph"}
TITLES = ("Cell", "Who", "Time", "old ms", "new ms", "new / old", "")


def show(old: Path, new: Path, *, force: bool = False) -> int:
    """Prints what moved from ``old`` to ``new``, two files or two folders of one GPU.

    Returns 0 without a regression, 1 with one: something slower, red or missing; 2 where the two must not be
    compared, unless ``force``: other GPUs, other devices, or a run that was killed. Raises ResultError for
    what cannot be read at all.
    """
    runs = read_all([old]), read_all([new])
    for path, complete in zip((old, new), runs, strict=True):
        if not complete:
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


def compare(old: Sequence[Cell], new: Sequence[Cell]) -> tuple[str, bool]:
    """What moved, the worst first, as text, and whether a fused time got longer, red or missing.

    The opponents' times only show how the machine drifted.
    """
    moves, lost, same, drifts = [], [], 0, []
    candidates = {cell.key: cell for cell in new}
    for before in old:
        key, after = before.key, candidates.pop(before.key, None)
        if not before.content["ok"]:
            continue
        if after is None:
            lost.append(f"{key}: missing")
            continue
        if not after.content["ok"]:
            lost.append(f"{key}: red: {'; '.join(troubles(after.content)) or 'no reason recorded'}")
            continue
        for name, kind in itertools.product(before.opponents, KINDS):
            was, now = before.figure(name, kind), after.figure(name, kind)
            if was is None or not name.startswith("fused"):
                continue
            if now is None:
                reason = after.content["errors"].get(name, "no reason recorded")
                lost.append(f"{key}: {name}, {KINDS[kind]}: no longer timed: {reason}")
            elif _moved(was, now):
                times = was["median"], now["median"], now["median"] / was["median"]
                moves.append((f"{key}", name, KINDS[kind], *times))
            else:
                same += 1
        if before.milliseconds("eager") and after.milliseconds("eager"):
            drifts.append(after.milliseconds("eager") / before.milliseconds("eager"))

    moves.sort(key=lambda move: move[-1], reverse=True)
    rows = [
        (*what, figure(old_ms), figure(new_ms), f"{growth:.3f}", "SLOWER" if growth > 1 else "faster")
        for *what, old_ms, new_ms, growth in moves
    ]
    lines = [table([dict(zip(TITLES, row, strict=True)) for row in rows])] if rows else []
    lines += [f"LOST  {what}" for what in lost]
    slower = sum(growth > 1 for *_, growth in moves)
    lines.append(
        f"{slower} slower, {len(moves) - slower} faster, {same} within the spread or {MOVED:.0%}, "
        f"{len(lost)} lost, {len(candidates)} only in the second"
    )
    drift = statistics.median(drifts) if drifts else 1.0
    if abs(drift - 1) > MOVED:
        lines.append(f"eager itself takes {drift:.3f} times what it took: another machine or other clocks")
    return "\n".join(lines), bool(lost or slower)


def _moved(was: Mapping, now: Mapping) -> bool:
    """Whether the intervals p20..p80 are disjoint and the median changed by more than 2%."""
    disjoint = now["p20"] > was["p80"] or now["p80"] < was["p20"]
    return disjoint and abs(now["median"] / was["median"] - 1) > MOVED

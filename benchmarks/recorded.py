"""What result files hold, for whoever shows them: read, judged by the schema, merged to one cell per key.

Nothing here measures, and nothing here needs torch: a report is made where the files are.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from .schema import DIRECTIONS, DTYPES, LEVELS, RIVALS, Key, time_ratio, validate

SHOWN_BATCH = 256  # where a short table or a plot has room for one batch: the largest up to this one


class ResultError(ValueError):
    """What cannot be shown, or shown in it; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Run:
    """One result file."""

    path: Path
    content: dict

    @property
    def gpu(self) -> str:
        return self.content["environment"]["gpu"]

    @property
    def when(self) -> datetime:
        """The end of the run, in UTC. "Z" is spelled out for Python 3.10."""
        text = self.content["updated"].replace("Z", "+00:00")
        return datetime.fromisoformat(text).astimezone(timezone.utc)

    @property
    def commit(self) -> str:
        """Short, and honest about changes that no commit holds."""
        environment = self.content["environment"]
        commit = (environment["commit"] or "unknown")[:10]
        return f"{commit} with uncommitted changes" if environment["dirty"] else commit


@dataclass(frozen=True)
class Cell:
    """One cell, and the run that measured it."""

    run: Run
    content: Mapping

    @property
    def key(self) -> Key:
        return Key.of_cell(self.content)

    @property
    def opponents(self) -> Mapping[str, Mapping]:
        """Who was timed: opponents, and designs by "op=design"."""
        return {**self.content["opponents"], **self.content.get("designs", {})}

    def figure(self, name: str, field: str) -> float | None:
        """What was recorded of an opponent; None where it was not timed."""
        return self.opponents.get(name, {}).get(field)

    def milliseconds(self, name: str, kind: str = "ms") -> float | None:
        """An opponent's median; ``kind`` "ms" is the time of calls, "graph_ms" of a CUDA graph's replay."""
        stats = self.figure(name, kind)
        return None if stats is None else stats["median"]

    def ratio(self, name: str) -> float | None:
        """How many times as long as fused an opponent takes."""
        return time_ratio(self.opponents, name)


def read_all(paths: Iterable[Path]) -> list[Run]:
    """The runs of one GPU in files and folders, the newest first; each file left out is told on stderr.

    Of a folder and the folders in it the complete runs, and none of what another program wrote; a file that
    is named counts as it is. Raises ResultError for a file that is no valid result, and for two GPUs.
    """
    runs = []
    for given in paths:
        for path in sorted(given.rglob("*.json")) if given.is_dir() else [given]:
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise ResultError(f"{path}: cannot be read as JSON: {error}") from error
            if path != given and not (isinstance(content, Mapping) and content.get("kind") == "bench"):
                tell(f"{path}: left out: not of bench")
                continue
            run = Run(path, content)
            try:
                validate(content)
                run.when  # noqa: B018 (a ValueError where it is no time)
            except ValueError as error:
                raise ResultError(f"{path}: not a valid result: {error}") from error
            if path == given or run.content["complete"]:
                runs.append(run)
            else:
                tell(f"{path}: left out: the run is not complete")
    runs = newest_first(runs)
    for run in runs:
        if run.gpu != runs[0].gpu:
            raise ResultError(
                f"{run.path}: measured on {run.gpu!r}, but {runs[0].path} on {runs[0].gpu!r}; "
                "a folder holds the results of one GPU"
            )
    return runs


def newest_first(runs: Iterable[Run]) -> list[Run]:
    return sorted(runs, key=lambda run: (run.when, run.path.name), reverse=True)


def cells_of(run: Run) -> list[Cell]:
    return [Cell(run, content) for content in run.content["cells"]]


def newest_cells(runs: Iterable[Run]) -> list[Cell]:
    """The cells of each case from the newest of the runs that show most of it; ``runs`` the newest first.

    More than another shows a run with more rivals, then one of committed code, then one that was not quick. A
    case's kernels stay together: where it is red there is one cell, which no older green kernel may join.
    In the order of the tables: by level, dtype and direction, the models and ops as they were measured.
    """
    cases: dict[Key, dict[Path, list[Cell]]] = {}
    for cell in (cell for run in runs for cell in cells_of(run)):
        case = cases.setdefault(cell.key._replace(op=None), {})
        case.setdefault(cell.run.path, []).append(cell)
    chosen: dict[Key, Cell] = {}
    for newest, *older in (case.values() for case in cases.values()):
        most_telling = max([newest, *filter(_green, older)], key=_worth)  # of equals the first
        chosen |= {cell.key: cell for cell in most_telling}
    measured = list(dict.fromkeys((key.level, key.op, key.model) for key in chosen))

    def place(key: Key) -> tuple:
        kind = LEVELS.index(key.level), DTYPES.index(key.dtype), DIRECTIONS.index(key.direction)
        return *kind, measured.index((key.level, key.op, key.model)), key.batch, key.device

    return [chosen[key] for key in sorted(chosen, key=place)]


def _green(cells: Sequence[Cell]) -> bool:
    return all(cell.content["ok"] for cell in cells)


def _worth(cells: Sequence[Cell]) -> tuple[int, bool, bool]:
    """Orders runs of one case by how much they show: rivals, committed code, not quick.

    A rival that failed was there. Nobody races where the newest is red, and nothing narrower may hide that.
    """
    run, content = cells[0].run.content, cells[0].content
    clean, quick = not run["environment"]["dirty"], run["protocol"].get("quick", False)
    if not _green(cells):
        return len(RIVALS), clean, True
    return sum(name in content["opponents"] or name in content["errors"] for name in RIVALS), clean, not quick


def shown(cells: Sequence[Cell]) -> list[Cell]:
    """The cells for a short table or a plot: one dtype, and one batch per subject.

    bfloat16, or where nothing was measured in it the first dtype there is; the largest batch up to 256, or
    the smallest there is.
    """
    dtype, subjects = shown_dtype(cells), {}
    for cell in cells:
        if cell.key.dtype == dtype:
            subjects.setdefault(cell.key._replace(batch=0), []).append(cell.key.batch)
    best = {
        subject._replace(batch=max((b for b in batches if b <= SHOWN_BATCH), default=min(batches)))
        for subject, batches in subjects.items()
    }
    return [cell for cell in cells if cell.key in best]


def shown_dtype(cells: Iterable[Cell]) -> str | None:
    return min((cell.key.dtype for cell in cells), key=DTYPES.index, default=None)


def contributing(cells: Iterable[Cell]) -> list[Run]:
    """The runs that cells come from, the newest first."""
    return newest_first({cell.run.path: cell.run for cell in cells}.values())


def tell(text: object) -> None:
    """A line on stderr."""
    print(f"benchmarks.report: {text}", file=sys.stderr)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` unless there is an error.

    A reader, or whoever looks after a crash, finds the old file or the new one. Links and permissions stay.
    """
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

"""What result files hold, for whoever shows them: read, judged by the schema, merged to one cell a key.

Nothing here measures, and nothing here needs torch: a report is made where the files are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

from .schema import DIRECTIONS, DTYPES, KEY, LEVELS, RIVALS, SchemaError, shown_ms, validate

SHOWN_BATCH = 256  # where a short table or a plot has room for one batch: the largest up to this one


class ResultError(ValueError):
    """A result file that cannot be shown; the message names the file and what is wrong with it."""


class Key(NamedTuple):
    """What was measured, as schema.KEY: cells of two runs with the same key are about the same thing."""

    level: str
    op: str | None
    model: str
    batch: int
    dtype: str
    direction: str
    device: str

    def __str__(self) -> str:
        what = f"{self.level} {self.op}" if self.op else self.level
        direction = self.direction.replace("_", "+")
        return f"{what} {short_model(self.model)} x{self.batch} {self.dtype} {direction} {self.device}"


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
        return _time(self.content["updated"])

    @property
    def commit(self) -> str:
        """Short, and honest about changes that no commit holds."""
        environment = self.content["environment"]
        commit = (environment.get("commit") or "unknown")[:10]
        return f"{commit} with uncommitted changes" if environment.get("dirty") else commit


@dataclass(frozen=True)
class Cell:
    """One cell, and the run that measured it."""

    run: Run
    content: Mapping

    @property
    def key(self) -> Key:
        return Key(*(self.content[name] for name in KEY))

    @property
    def opponents(self) -> Mapping[str, Mapping]:
        return self.content["opponents"]

    def milliseconds(self, name: str, kind: str = "ms") -> float | None:
        """An opponent's median; ``kind`` "ms" is the time of calls, "graph_ms" of a CUDA graph's replay."""
        stats = self.opponents.get(name, {}).get(kind)
        return None if stats is None else stats["median"]

    def ratio(self, slow: str, fast: str = "fused") -> float | None:
        """How many times longer ``slow`` takes: by the graphs where both have one, else by calls."""
        if slow not in self.opponents or fast not in self.opponents:
            return None
        theirs, ours = shown_ms(self.opponents[slow], self.opponents[fast])
        return theirs / ours


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: cannot be read as JSON: {error}") from error


def _valid(path: Path, content: object) -> Run:
    """The run, complete or not. ResultError where it is no valid one, naming the file."""
    try:
        validate(content)
        _time(content["updated"])
    except (SchemaError, ValueError) as error:
        raise ResultError(f"{path}: not a valid result: {error}") from error
    return Run(path, content)


def read_all(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs of one GPU in files and folders, the newest first, and a note about each file left out.

    Of a folder and the folders in it the complete runs, and none of what another program wrote; a file that
    is named counts as it is. Raises ResultError for a file that is no valid result, and for two GPUs.
    """
    runs, notes = [], []
    for given in paths:
        for path in sorted(given.rglob("*.json")) if given.is_dir() else [given]:
            content = _json(path)
            if path != given and not (isinstance(content, Mapping) and content.get("kind") == "bench"):
                notes.append(f"{path}: left out: not of bench")
                continue
            run = _valid(path, content)
            if path == given or run.content["complete"]:
                runs.append(run)
            else:
                notes.append(f"{path}: left out: the run is not complete")
    runs.sort(key=lambda run: (run.when, run.path.name), reverse=True)
    for run in runs:
        if run.gpu != runs[0].gpu:
            raise ResultError(
                f"{run.path}: measured on {run.gpu!r}, but {runs[0].path} on {runs[0].gpu!r}; "
                "a folder holds the results of one GPU"
            )
    return runs, notes


def cells_of(run: Run) -> list[Cell]:
    return [Cell(run, content) for content in run.content["cells"]]


def newest_cells(runs: Iterable[Run]) -> dict[Key, Cell]:
    """The cells of each case from the newest of the runs that show most of it; ``runs`` the newest first.

    More than another shows a run with more rivals, then one of committed code, then one that was not quick. A
    case's kernels stay together: where it is red there is one cell, which no older green kernel may join.
    In the order of the tables: by level, dtype and direction, the models and ops as they were measured.
    """
    cases: dict[Key, list[list[Cell]]] = {}
    for run in runs:
        here: dict[Key, list[Cell]] = {}
        for cell in cells_of(run):
            here.setdefault(cell.key._replace(op=None), []).append(cell)
        for case, cells in here.items():
            cases.setdefault(case, []).append(cells)
    found = {cell.key: cell for runs_of in cases.values() for cell in _most_telling(runs_of)}
    measured = list(dict.fromkeys((key.level, key.op, key.model) for key in found))

    def place(key: Key) -> tuple:
        kind = LEVELS.index(key.level), DTYPES.index(key.dtype), DIRECTIONS.index(key.direction)
        return *kind, measured.index((key.level, key.op, key.model)), key.batch, key.device

    return {key: found[key] for key in sorted(found, key=place)}


def _most_telling(runs_of: Sequence[Sequence[Cell]]) -> Sequence[Cell]:
    """Of one case's cells in several runs, the newest first: that, or older green ones that show more."""
    older = [cells for cells in runs_of[1:] if _green(cells)]
    return max([runs_of[0], *older], key=_worth)  # of equals the first


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


def shown(cells: Mapping[Key, Cell]) -> list[Cell]:
    """The cells for a short table or a plot: one dtype, and of each subject one batch.

    bfloat16, or where nothing was measured in it the first dtype there is; the largest batch up to 256, or
    the smallest there is.
    """
    dtype = shown_dtype(cells)
    batches: dict[Key, list[int]] = {}
    for key in cells:
        batches.setdefault(key._replace(batch=0), []).append(key.batch)
    best = {subject: max(found, key=_fitness) for subject, found in batches.items()}
    return [
        cell for key, cell in cells.items() if key.dtype == dtype and key.batch == best[key._replace(batch=0)]
    ]


def shown_dtype(cells: Iterable[Key]) -> str | None:
    return min((key.dtype for key in cells), key=DTYPES.index, default=None)


def _fitness(batch: int) -> tuple[bool, int]:
    """Orders batches by how much they deserve the one place."""
    return (True, batch) if batch <= SHOWN_BATCH else (False, -batch)


def contributing(cells: Iterable[Cell]) -> list[Run]:
    """The runs that cells come from, the newest first."""
    runs = {cell.run.path: cell.run for cell in cells}
    return sorted(runs.values(), key=lambda run: (run.when, run.path.name), reverse=True)


def short_model(name: str) -> str:
    """B/16 for mixer_b16_224; another name as it is."""
    match = re.fullmatch(r"mixer_([a-z])(\d+)_\d+", name)
    return f"{match[1].upper()}/{match[2]}" if match else name


def _time(text: str) -> datetime:
    """ISO 8601, in UTC. "Z" is spelled out for Python 3.10."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(timezone.utc)

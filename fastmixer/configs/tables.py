"""What was measured to be fast on which GPU: tables shipped with fastmixer, and the user's own.

A table is one JSON file per GPU, ``<slug>.json``. Each entry says what ran fastest for one op and problem,
and on which device code and Triton that was measured: an entry of other code is kept and not used. The
user's file is only ever replaced as a whole and under a lock, so that two tuners may write at once and a
killed one loses nothing but the measurement it was in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from fastmixer.configs import resources
from fastmixer.configs.device_code import kernels_hash, triton_version
from fastmixer.configs.problem import Choice, Problem, TileConfig
from fastmixer.configs.table_file import (
    SCHEMA,
    Entry,
    Key,
    OtherSchemaError,
    Table,
    TableError,
    as_json,
    key_of,
    load,
)
from fastmixer.configs.targets import Target
from fastmixer.notices import warn

SHOWN = 3  # entries that a warning names
LOCK_SECONDS = 60  # a lock is held for one small file's reading and writing
SHIPPED = Path(__file__).parent


class TableWarning(UserWarning):
    """A table, or some of its entries, are not used; the message says which and why."""


def shipped_path(slug: str) -> Path:
    """The table that comes with fastmixer, if there is one for this GPU."""
    return SHIPPED / f"{_checked(slug)}.json"


def user_path(slug: str) -> Path:
    """The user's own table, in $FASTMIXER_CACHE_DIR, $XDG_CACHE_HOME/fastmixer or ~/.cache/fastmixer.

    Where another version of fastmixer keeps a table of another schema under the name, ours has the schema in
    its name and lies beside it.

    Raises:
        FileNotFoundError: neither is set, and the user has no home directory.
    """
    path = _user_folder() / "configs" / f"{_checked(slug)}.json"
    beside = path.with_name(f"{slug}.schema-{SCHEMA}.json")
    if beside.exists():
        return beside
    try:
        load(path)
    except OtherSchemaError:
        return beside
    except (TableError, OSError):
        pass
    return path


def _user_folder() -> Path:
    if folder := os.environ.get("FASTMIXER_CACHE_DIR"):
        return Path(folder)
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(caches):  # the standard has a relative one ignored
        return Path(caches, "fastmixer")
    try:
        return Path.home() / ".cache" / "fastmixer"
    except RuntimeError as error:
        raise FileNotFoundError(
            "FASTMIXER_CACHE_DIR is not set, and there is no home directory to keep a table in"
        ) from error


def _checked(slug: str) -> str:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
        raise ValueError(f'slug: expected a GPU\'s name as in "nvidia-h200", got {slug!r}')
    return slug


@functools.cache
def table_of(target: Target) -> Mapping[Key, Choice]:
    """The choices measured for ``target``: the user's, then the shipped ones. Read once per process.

    Measured with the running device code, and with the target's Triton. Warns, once, of a file or of entries
    that are not used. Files are read and never changed: that is for ``record``.
    """
    slug = target.name
    if not slug:
        return MappingProxyType({})
    # The user's last: entry by entry, what the user measured counts.
    files = (shipped_path, read_shipped(slug)), (user_path, read_user(slug))
    merged: dict[Key, Choice] = {}
    for path_of, table in files:
        chosen, refused = choices(table, target)
        merged |= chosen
        if refused:
            more = f" and {len(refused) - SHOWN} more" * (len(refused) > SHOWN)
            _warn(
                f"{path_of(slug)}: {len(refused)} of its entries cannot be run and are not used: "
                f"{'; '.join(refused[:SHOWN])}{more}"
            )
    for path_of, table in files:
        others = {entry.key for entry in table.all_entries if not _is_for(entry, target)} if table else set()
        if lost := others - merged.keys():
            _warn(
                f"{path_of(slug)}: {len(lost)} of its entries were measured with other kernels or another "
                "Triton and are not used; python -m fastmixer tune measures again"
            )
    return MappingProxyType(merged)


def choices(table: Table | None, target: Target) -> tuple[dict[Key, Choice], list[str]]:
    """What a table says for ``target``, the later of two for a key, and why not of what cannot be run."""
    chosen: dict[Key, Choice] = {}
    refused: list[str] = []
    for _, entry, reason in table.rows if table else ():
        if entry is None:
            refused.append(reason)
        elif _is_for(entry, target):
            tiles = entry.choice if isinstance(entry.choice, TileConfig) else None
            if tiles and (reason := resources.why_not(entry.op, entry.problem, tiles, target)):
                refused.append(f"{entry.op} of {entry.problem[:4]}: {reason}")
            else:
                chosen[entry.key] = entry.choice
    return chosen, refused


def _is_for(entry: Entry, target: Target) -> bool:
    """Whether it was measured on this device code, and with the Triton that the target means."""
    if not target.triton:
        return entry.is_current
    release = resources.release
    return entry.kernels == kernels_hash() and release(entry.triton) == release(target.triton)


def source(op: str, problem: Problem, target: Target) -> str | None:
    """Which table has a choice as the files are now: "user" or "shipped"; None: neither."""
    for name, read in (("user", read_user), ("shipped", read_shipped)):
        if key_of(op, problem) in choices(read(target.name), target)[0]:
            return name
    return None


def clear() -> None:
    """Forgets what was read, so that the next lookup reads the files again."""
    table_of.cache_clear()


def read_shipped(slug: str) -> Table | None:
    """The shipped table, or None where there is none; warns of one that cannot be read."""
    return _read(shipped_path, slug, "a shipped table")


def read_user(slug: str) -> Table | None:
    """The user's table, or None where there is none; warns of one that cannot be read, and leaves it."""
    return _read(user_path, slug, "the user's table")


def _read(path_of: Callable[[str], Path], slug: str, name: str) -> Table | None:
    try:
        path = path_of(slug)
        other = path.with_name(f"{slug}.json")
        if path != other and not path.exists():
            _warn(
                f"{name} {other} is another version's, of another schema: it is not used and left "
                f"alone, and python -m fastmixer tune writes {path.name} beside it"
            )
        return load(path)
    except FileNotFoundError:
        return None
    except (TableError, OSError) as error:
        _warn(f"{name} is not used: {error}")
        return None


def _load_or_set_aside(path: Path) -> Table | None:
    """The table at ``path``; what is damaged there is renamed, not lost. The lock must be held.

    Raises OtherSchemaError for another version's table, which is left alone.
    """
    try:
        return load(path)
    except FileNotFoundError:
        return None
    except OtherSchemaError:
        raise
    except TableError as error:
        names = (path.with_name(f"{path.name}.corrupt-{n}") for n in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        os.rename(path, aside)
        _warn(f"{error}; it is kept as {aside.name}, and what was tuned in it has to be tuned again")
        return None


def _warn(message: str) -> None:
    warn(f"fastmixer: {message}", TableWarning)


def record(slug: str, entry: Entry, device: str = "") -> None:
    """Puts one entry, as measured now with this code, into the user's table of a GPU.

    It replaces an earlier one of the same op, problem and code; nothing else that is in the file is touched.
    A file that is damaged is renamed before, with a warning.

    Args:
        slug, device: the GPU's slug, and its name as torch reports it.
        entry: the batch is rounded up to a power of two; ``kernels`` and ``triton`` are filled in.

    Raises:
        OSError: the file cannot be written, or another process holds its lock (filelock.Timeout).
    """
    op, problem = key_of(entry.op, entry.problem)
    entry = dataclasses.replace(entry, problem=problem, kernels=kernels_hash(), triton=triton_version())
    values = as_json(entry)
    try:
        _put(user_path(slug), slug, values, device)
    except OtherSchemaError:  # which another version put there between the look and the lock
        _put(user_path(slug), slug, values, device)
    clear()


def _put(path: Path, slug: str, values: dict, device: str) -> None:
    from fastmixer import __version__

    with locked(path):
        before = _load_or_set_aside(path)
        kept: list[object] = []
        if before is not None:
            device = device or before.device
            # Each names its own code from now on: the header is about to name another.
            named = ({**before.code, **raw} if isinstance(raw, dict) else raw for raw, *_ in before.rows)
            kept = [raw for raw in named if _identity(raw) != _identity(values)]
        versions = {"torch": torch.__version__, "triton": values["triton"], "fastmixer": __version__}
        content = {"schema": SCHEMA, "device": device, "slug": slug, "versions": versions}
        content |= {"kernels": values["kernels"], "entries": [*kept, values]}
        _replace(path, json.dumps(content, indent=1) + "\n")


def _identity(values: object) -> object:
    """What tells two entries of a file apart, those that are refused included."""
    fields = ("op", "problem", "kernels", "triton")
    return [values.get(name) for name in fields] if isinstance(values, dict) else None


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock beside ``path``, whose folder is made; OSError if that cannot be."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock", timeout=LOCK_SECONDS, poll_interval=0.01):
        yield


def _replace(path: Path, text: str) -> None:
    """Whoever looks, also after a crash, finds the old file or the new one. The lock must be held."""
    temporary = path.with_name(f"{path.name}.tmp")  # one name: what a killed writer left is written over
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    if hasattr(os, "O_DIRECTORY"):
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

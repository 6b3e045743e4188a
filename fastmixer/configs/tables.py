"""What was measured to be fast on which GPU: tables shipped with fastmixer, and the user's own.

A table is one JSON file per GPU, ``<slug>.json``. Each entry says what ran fastest for one op and problem,
and on which device code and Triton that was measured: an entry of other code is kept and not used. The
user's file is only ever replaced as a whole and under a lock, so that two tuners may write at once and a
killed one loses nothing but the measurement it was in.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import MappingProxyType

import torch

from fastmixer.configs import resources
from fastmixer.configs.device_code import kernels_hash, triton_version
from fastmixer.configs.problem import Choice, Problem, TileConfig, bucketed
from fastmixer.configs.table_file import (
    SCHEMA,
    Entry,
    Key,
    OtherSchemaError,
    Table,
    TableError,
    as_json,
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
    # The user's last: entry by entry, what the user measured counts.
    files = [read(source, target.name) for source in ("shipped", "user")] if target.name else []
    files = [table for table in files if table is not None]
    merged: dict[Key, Choice] = {}
    for table in files:
        chosen, refused = choices(table, target)
        merged |= chosen
        if refused:
            more = f" and {len(refused) - SHOWN} more" * (len(refused) > SHOWN)
            _warn(
                f"{table.path}: {len(refused)} of its entries cannot be run and are not used: "
                f"{'; '.join(refused[:SHOWN])}{more}"
            )
    for table in files:
        others = {entry.key for entry in table.entries if not _is_for(entry, target)}
        if lost := others - merged.keys():
            _warn(
                f"{table.path}: {len(lost)} of its entries were measured with other kernels or another "
                "Triton and are not used; python -m fastmixer tune measures again"
            )
    return MappingProxyType(merged)


_edition = 0


def edition() -> int:
    """Grows whenever a table may have changed: what was made of choices is valid as long as it does not."""
    return _edition


def choices(table: Table, target: Target) -> tuple[dict[Key, Choice], list[str]]:
    """What a table says for ``target``, the later of two for a key, and why not of what cannot be run."""
    chosen: dict[Key, Choice] = {}
    refused: list[str] = []
    for _, entry, reason in table.rows:
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
    if entry.kernels != kernels_hash():
        return False
    if not target.triton:
        return entry.triton == triton_version()
    return resources.release(entry.triton) == resources.release(target.triton)


def source(op: str, problem: Problem, target: Target) -> str | None:
    """Which table has a choice as the files are now: "user" or "shipped"; None: neither."""
    for name in ("user", "shipped"):
        table = read(name, target.name)
        if table and (op, bucketed(problem)) in choices(table, target)[0]:
            return name
    return None


def read(source: str, slug: str) -> Table | None:
    """The "shipped" or the "user" table of a GPU; None where there is none; warns of an unreadable one."""
    title = "the user's table" if source == "user" else "a shipped table"
    try:
        path = user_path(slug) if source == "user" else shipped_path(slug)
        other = path.with_name(f"{slug}.json")
        if path != other and not path.exists():
            _warn(
                f"{title} {other} is another version's, of another schema: it is not used and left "
                f"alone, and python -m fastmixer tune writes {path.name} beside it"
            )
        return load(path)
    except FileNotFoundError:
        return None
    except (TableError, OtherSchemaError, OSError) as error:
        _warn(f"{title} is not used: {error}")
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
    from fastmixer import __version__

    code = {"kernels": kernels_hash(), "triton": triton_version()}
    values = as_json(dataclasses.replace(entry, problem=bucketed(entry.problem), **code))
    with locked(user_path(slug).with_name(f"{slug}.json")):  # of every version, whatever lies there
        path = user_path(slug)
        before = _load_or_set_aside(path)
        # Each names its own code from now on: the header is about to name another.
        named = ({**before.code, **raw} if isinstance(raw, dict) else raw for raw, *_ in before.rows)
        kept = [raw for raw in named if _identity(raw) != _identity(values)]
        versions = {"torch": torch.__version__, "triton": code["triton"], "fastmixer": __version__}
        content = {"schema": SCHEMA, "device": device or before.device, "slug": slug, "versions": versions}
        content |= {"kernels": code["kernels"], "entries": [*kept, values]}
        _replace(path, json.dumps(content, indent=1) + "\n")
    global _edition
    table_of.cache_clear()  # the next lookup reads the files again
    _edition += 1


def _load_or_set_aside(path: Path) -> Table:
    """The table at ``path``, or an empty one; a damaged file is renamed, not lost. The lock must be held."""
    try:
        return load(path)
    except FileNotFoundError:
        pass
    except TableError as error:
        names = (path.with_name(f"{path.name}.corrupt-{n}") for n in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        os.rename(path, aside)
        _warn(f"{error}; it is kept as {aside.name}, and what was tuned in it has to be tuned again")
    return Table(path, "", {}, ())


def _identity(values: object) -> object:
    """What tells two entries of a file apart, those that are refused included."""
    fields = ("op", "problem", "kernels", "triton")
    return [values.get(name) for name in fields] if isinstance(values, dict) else None


def locked(path: Path) -> AbstractContextManager:
    """The lock beside ``path``, whose folder is made; OSError, also on entering, if that cannot be."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=LOCK_SECONDS, poll_interval=0.01)


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

"""What was measured to be fast on which GPU: tables shipped with fastmixer, and the user's own.

A table is one JSON file a GPU, ``<slug>.json``. Each entry says what ran fastest for one op and problem, and
on which device code and Triton that was measured: an entry of other code is kept and not used. The user's
file is only ever replaced as a whole and under a lock, so that two tuners may write at once and a killed one
loses nothing but the measurement it was in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from .device_code import kernels_hash, triton_version, versions
from .table_file import SCHEMA, Entry, Key, Table, TableError, as_json, key_of, load
from .targets import Target
from .tiles import Choice

__all__ = [
    "Entry",
    "Key",
    "Table",
    "TableError",
    "TableWarning",
    "clear",
    "key_of",
    "load",
    "locked",
    "merge",
    "read_shipped",
    "read_user",
    "record",
    "shipped_path",
    "table_of",
    "user_path",
]

LOCK_SECONDS = 60  # a lock is held for one small file's reading and writing
SHIPPED = Path(__file__).parent


class TableWarning(UserWarning):
    """A table, or some of its entries, are not used; the message says which and why."""


# ---- where ------------------------------------------------------------------------------------------------


def shipped_path(slug: str) -> Path:
    """The table that comes with fastmixer, if there is one for this GPU."""
    return SHIPPED / f"{_checked(slug)}.json"


def user_path(slug: str) -> Path:
    """The user's own table, in $FASTMIXER_CACHE_DIR, $XDG_CACHE_HOME/fastmixer or ~/.cache/fastmixer.

    Raises:
        FileNotFoundError: neither is set, and the user has no home directory.
    """
    return _user_folder() / "configs" / f"{_checked(slug)}.json"


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


# ---- looking up -------------------------------------------------------------------------------------------


def table_of(target: Target) -> Mapping[Key, Choice]:
    """The choices measured for ``target``: the shipped ones, then the user's. Read once a process.

    Warns, once, of a file or of entries that are not used; a user's file that cannot be read is renamed.
    """
    return _merged(target.name) if target.name else MappingProxyType({})


@functools.cache
def _merged(slug: str) -> Mapping[Key, Choice]:
    shipped, user = read_shipped(slug), read_user(slug)
    found = merge(shipped.entries if shipped else {}, user.entries if user else {})
    for table, path_of in (shipped, shipped_path), (user, user_path):
        lost = {entry.key for entry in table.all_entries if entry.key not in found} if table else ()
        if lost:
            _warn(
                f"{path_of(slug)}: {len(lost)} of its entries were measured with other kernels or another "
                "Triton and are not used; python -m fastmixer tune measures again"
            )
    return MappingProxyType(found)


def clear() -> None:
    """Forgets what was read, so that the next lookup reads the files again."""
    _merged.cache_clear()


def merge(shipped: Mapping[Key, Choice], user: Mapping[Key, Choice]) -> dict[Key, Choice]:
    """Both tables as one, entry by entry; where both have one, the shipped counts."""
    return {**user, **shipped}


def read_shipped(slug: str) -> Table | None:
    """The shipped table, or None where there is none; warns of one that cannot be read."""
    try:
        return load(shipped_path(slug))
    except FileNotFoundError:
        return None
    except (TableError, OSError) as error:
        _warn(f"a shipped table is not used: {error}")
        return None


def read_user(slug: str) -> Table | None:
    """The user's table, or None where there is none. One that is no table is renamed, with a warning."""
    try:
        path = user_path(slug)
        return load(path)
    except FileNotFoundError:
        return None
    except TableError:
        pass
    except OSError as error:
        _warn(f"the user's table is not used: {error}")
        return None
    try:
        with locked(path):  # by now another process may have put a good one in its place
            return _load_or_set_aside(path)
    except OSError as error:
        _warn(f"the user's table {path} is not one, is not used and could not be renamed: {error}")
        return None


def _load_or_set_aside(path: Path) -> Table | None:
    """The table at ``path``; what is there and no table is renamed. The lock must be held."""
    try:
        return load(path)
    except FileNotFoundError:
        return None
    except TableError as error:
        names = (path.with_name(f"{path.name}.corrupt-{n}") for n in itertools.count(1))
        aside = next(name for name in names if not os.path.lexists(name))
        os.rename(path, aside)
        _warn(f"{error}; it is kept as {aside.name}, and what was tuned in it has to be tuned again")
        return None


def _warn(message: str) -> None:
    warnings.warn(f"fastmixer: {message}", TableWarning, stacklevel=4)


# ---- writing ----------------------------------------------------------------------------------------------


def record(slug: str, entry: Entry, device: str = "") -> None:
    """Puts one entry, as measured now with this code, into the user's table of a GPU.

    It replaces an earlier one of the same op, problem and code; nothing else that is in the file is touched.

    Args:
        slug, device: the GPU's slug, and its name as torch reports it.
        entry: the batch is rounded up to a power of two; ``kernels`` and ``triton`` are filled in.

    Raises:
        OSError: the file cannot be written, or another process holds its lock (filelock.Timeout).
    """
    op, problem = entry.key
    code = {"kernels": kernels_hash(), "triton": triton_version()}
    entry = dataclasses.replace(entry, problem=problem, **code)
    path = user_path(slug)
    with locked(path):
        kept, before = [], _load_or_set_aside(path)
        if before is not None:
            raw = json.loads(path.read_bytes())["entries"]
            for values, known in zip(raw, before.all_entries, strict=True):
                if (known.key, known.kernels, known.triton) != ((op, problem), *code.values()):
                    kept.append({**values, "kernels": known.kernels, "triton": known.triton})
            device = device or before.device
        content = {"schema": SCHEMA, "device": device, "slug": slug, "versions": dict(versions())}
        content |= {"kernels": entry.kernels, "entries": [*kept, as_json(entry)]}
        _replace(path, json.dumps(content, indent=1, allow_nan=False) + "\n")
    clear()


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

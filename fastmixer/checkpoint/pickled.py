"""What ``torch.save`` wrote, read without any class or function that the file names."""

from __future__ import annotations

import pickle
import re
import threading
import zipfile
from pathlib import Path

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

_lock = threading.Lock()  # torch's list of allowed classes is the process's
BLOCKED = re.compile(r"GLOBAL (\S+) (?:was not an allowed global|whose module)")


class Unread:
    """Stands for an object of a class that the file names. It takes what it is given and keeps nothing."""

    name = ""  # of the class in the file

    def __new__(cls, *args: object, **kwargs: object) -> Unread:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class Refused(ValueError):
    """torch makes nothing of the file even with stand-ins for the classes and functions that it names."""


def load(path: Path) -> tuple[object, tuple[str, ...]]:
    """The file's content, and the names of the classes whose objects are ``Unread`` in it.

    ``weights_only=True`` makes tensors and plain containers, and refuses a file that names anything else:
    timm's an argparse.Namespace, others a NumPy scalar or a callback. Such a name is given a stand-in rather
    than allowed. So it does not matter whether that class is harmless, or installed: it is never looked up,
    and nothing that the file names is called.

    Raises:
        Refused: stand-ins do not do, as for a subclass of dict or Tensor; or torch blocks the function.
        Exception: of a dozen kinds, from damaged bytes.
    """
    # torch lists them for a zip archive; its old format is tried again for each, before weights are read.
    names = set(get_unsafe_globals_in_checkpoint(str(path))) if zipfile.is_zipfile(path) else set()
    while True:
        stand_ins = [(type("Unread", (Unread,), {"name": name}), name) for name in sorted(names)]
        try:
            # A file, not its name: by the suffix .safetensors torch would take it for one.
            with path.open("rb") as file, _lock, safe_globals(stand_ins):
                return torch.load(file, map_location="cpu", weights_only=True), tuple(sorted(names))
        except (pickle.UnpicklingError, TypeError) as error:  # TypeError: a stand-in for a tensor's class
            name = _blocked(error)
            if name is None and not names:  # damaged
                raise
            if name is None or name in names or "is blocked" in str(error):
                refused = ", ".join(sorted(names | {name} - {None}))
                raise Refused(
                    f"{path} is not a checkpoint that can be read without executing anything: "
                    f"weights_only=True refuses it, and it names {refused}, which are never used; save the "
                    "model's .state_dict() alone"
                ) from error
            names.add(name)


def _blocked(error: BaseException) -> str | None:
    """The class or function for which torch refused a file, if that is what it says."""
    match = BLOCKED.search(str(error))
    if match is None:
        return None
    return match[1] if "." in match[1] else f"builtins.{match[1]}"  # torch leaves "builtins." out


def kind(value: object) -> str:
    """What an entry is, for messages."""
    return f"pickled {value.name}" if isinstance(value, Unread) else type(value).__name__


def is_read(value: object) -> bool:
    """Whether nothing in a value of plain containers is ``Unread``."""
    if isinstance(value, dict):
        return is_read(list(value.items()))
    if isinstance(value, (list, tuple, set)):
        return all(is_read(part) for part in value)
    return not isinstance(value, Unread)

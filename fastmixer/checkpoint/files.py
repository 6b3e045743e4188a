"""The named tensors in a checkpoint file, whichever of the three formats it has."""

from __future__ import annotations

import json
import pickle
import re
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

# Keys under which training scripts keep the weights, and their exponential moving average.
WRAPPERS = ("state_dict", "model", "model_state_dict")
EMA_WRAPPERS = ("state_dict_ema", "model_ema")
NPZ_WRAPPERS = ("opt/target/", "params/")  # prefixes of the weights in an .npz that holds a training state
EXTRA_STATE = "_extra_state"  # the end of the key of what torch.nn.Module.get_extra_state returns
SHOWN = 4  # names that an error message gives as examples

# How files begin that are often taken for a checkpoint, and what they are.
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch that with git lfs pull",
    b"<!doctype html": "a web page: the download failed, or needs a login",
    b"<html": "a web page: the download failed, or needs a login",
    b"\x89hdf": "an HDF5 file, as of Keras",
    b"gguf": "a GGUF file",
}

_lock = threading.Lock()  # torch's list of allowed classes is the process's


class Content(NamedTuple):
    """What the file at ``path`` holds.

    tensors: by name; under a name that ends with "_extra_state" it may be anything. flax: it is an .npz,
    with Flax's names and layouts. wrapper: the key that the tensors were found under, "" if at the top.
    unread: classes and functions that the file names besides, none of which was used.
    """

    path: Path
    tensors: dict[str, Tensor]
    flax: bool = False
    wrapper: str = ""
    unread: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The file and the key, for messages."""
        return f"{self.path} ({self.wrapper})" if self.wrapper else str(self.path)


class Refused(ValueError):
    """The file is whole, and holds what is not read."""


class Unread:
    """Stands for an object of a class that the file names. It takes what it is given and keeps nothing."""

    name = ""  # of the class in the file

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def read(path: Path, use_ema: bool) -> Content:
    """What the file holds, unwrapped; ValueError or OSError with the reason if it is no checkpoint."""
    if path.is_dir():
        dcp = ", written by torch.distributed.checkpoint: load it with that" * (path / ".metadata").exists()
        raise IsADirectoryError(f"{path} is a folder{dcp}, not a checkpoint file")
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as file:  # what the operating system objects to is not the content's fault
        head = file.read(64)
    members = _members(path)
    if kind := _foreign_kind(path, head, members):
        raise ValueError(f"{path} is not a checkpoint: it is {kind}")
    absent = "no .safetensors file, no .npz and no state dict that torch.save wrote"
    try:
        # A .safetensors begins, whatever its name, with eight bytes of length, and JSON of that length.
        length = int.from_bytes(head[:8], "little")
        is_safetensors = head[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8
        if not members and (is_safetensors or path.suffix == ".safetensors"):
            content, unread = _read_safetensors(path), ()
        elif _is_npz(path, members):
            absent = "no .npz archive of arrays"
            return Content(path, _read_npz(path), flax=True)
        else:
            content, unread = _read_pickled(path)
    except (Refused, ImportError):
        raise
    except Exception as error:  # damaged bytes raise many kinds
        # torch's own text advises weights_only=False: never for a file that is not understood.
        raise ValueError(
            f"{path} is not a checkpoint: {absent} "
            f"({type(error).__name__} while reading {path.stat().st_size} bytes)"
        ) from error
    content, wrapper = _unwrapped(content, use_ema)
    unwrapped = Content(path, content, False, wrapper, unread)
    _check_tensors(content, unwrapped.where, use_ema)
    return unwrapped


# ---- which format ----------------------------------------------------------------------------------------


def _members(path: Path) -> list[str]:
    """The names in a zip archive, which an .npz and what torch.save writes are; none if it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):  # damaged: its reader will say so
        return []


def _foreign_kind(path: Path, head: bytes, members: list[str]) -> str | None:
    """What a file is that is whole, and something else than a checkpoint; None for any other."""
    ends = {name.partition("/")[2] for name in members}
    if "constants.pkl" in ends:
        return "a TorchScript program, which torch.jit.save wrote: save its .state_dict() with torch.save"
    if "archive_format" in ends:
        return "a program that torch.export.save wrote: save the .state_dict of it with torch.save"
    if path.suffix != ".json" or not head.lstrip().startswith(b"{"):
        return next((kind for start, kind in FOREIGN.items() if head.lower().startswith(start)), None)
    try:  # the index of Hugging Face's sharded checkpoints
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        return "a JSON file"
    names = ", ".join(map(str, shards[:SHOWN])) + ", ..." * (len(shards) > SHOWN)
    return (
        f"the index of a sharded checkpoint, whose weights lie in {names}: put the dictionaries of these "
        "files into one, and save that"
    )


def _is_npz(path: Path, members: list[str]) -> bool:
    """By its members, or by its name where torch.save did not write it."""
    if members and all(name.endswith(".npy") for name in members):
        return True
    return path.suffix == ".npz" and not any(name.endswith("/data.pkl") for name in members)


# ---- reading ---------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    return load_file(path, device="cpu")


def _read_npz(path: Path) -> dict[str, Tensor]:
    """The arrays in the file as tensors, by Flax's names without a prefix, in Flax's layouts."""
    with np.load(path, allow_pickle=False) as file:
        prefix = next((p for p in NPZ_WRAPPERS if any(name.startswith(p) for name in file.files)), "")
        names = [name for name in file.files if name.startswith(prefix)]
        return {name.removeprefix(prefix): _tensor(file, name, path) for name in names}


def _tensor(file: Mapping[str, object], name: str, path: Path) -> Tensor:
    """An entry of an .npz; Refused unless it is an array of floating-point numbers."""
    try:
        entry = file[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        entry = None
    if not isinstance(entry, np.ndarray):
        raise Refused(f"{path}: entry {name!r} is no array of numbers; pickled objects are never loaded")
    dtype = entry.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None:
        # NumPy has no bfloat16: JAX's arrays of it are stored as two bytes without a type.
        return torch.from_numpy(entry.view(np.int16)).view(torch.bfloat16)
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise Refused(f"{path}: entry {name!r} has the dtype {dtype}, not one of floating-point weights")
    return torch.from_numpy(entry.astype(dtype.newbyteorder("="), copy=False))


def _read_pickled(path: Path) -> tuple[object, tuple[str, ...]]:
    """What ``torch.save`` wrote, and the names of the classes whose objects are ``Unread`` in it.

    ``weights_only=True`` refuses a file that names anything but tensors and plain containers: timm's an
    argparse.Namespace, others a NumPy scalar. Such a name gets a stand-in, so whether that class is harmless,
    or installed, does not matter: it is never looked up, and nothing that the file names is called. Refused
    where stand-ins do not do, as for a subclass of dict or Tensor, or where torch blocks the function.
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
            refused = re.findall(r"GLOBAL (\S+) (?:was not an allowed global|whose module)", str(error))
            refused = {name if "." in name else f"builtins.{name}" for name in refused}  # torch omits that
            if not names | refused:  # damaged
                raise
            if refused <= names or "is blocked" in str(error):
                raise Refused(
                    f"{path} is not a checkpoint that can be read without executing anything: weights_only="
                    f"True refuses it, and it names {', '.join(sorted(names | refused))}, which are never "
                    "used; save the model's .state_dict() alone"
                ) from error
            names |= refused


def _unwrapped(content: object, use_ema: bool) -> tuple[object, str]:
    """``content`` out of its wrappers, and their keys, joined by dots."""
    for key in (*EMA_WRAPPERS, *WRAPPERS) if use_ema else WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content, inner = _unwrapped(content[key], use_ema)
            return content, f"{key}.{inner}" if inner else key
    return content, ""


def _check_tensors(content: object, where: str, use_ema: bool) -> None:
    """Raises ValueError unless ``content`` is a dictionary of named tensors that have values."""
    if not isinstance(content, Mapping):
        whole = ", a whole object" if isinstance(content, Unread) else ""
        raise ValueError(
            f"{where} holds a {_kind(content)}{whole}, not a dictionary of named tensors: where the model's "
            "class is at hand, save its .state_dict() with torch.save"
        )
    for name, value in content.items():
        if isinstance(name, str) and name.rpartition(".")[2] == EXTRA_STATE and _is_read(value):
            continue
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{where} is no dictionary of named tensors: its entry {name!r} is a "
                f"{_kind(value)}{_elsewhere(content, use_ema)}"
            )
        if value.is_meta:
            raise ValueError(f"{where}: its entry {name!r} was saved from the meta device and has no values")
        if value.is_quantized or value.layout is not torch.strided or value.is_nested:
            layout = str(value.layout).removeprefix("torch.")
            raise ValueError(f"{where}: its entry {name!r} is quantised or {layout}, not a dense tensor")


def _kind(value: object) -> str:
    return f"pickled {value.name}" if isinstance(value, Unread) else type(value).__name__


def _is_read(value: object) -> bool:
    """Whether nothing in a value of plain containers is ``Unread``."""
    if isinstance(value, dict):
        return _is_read(list(value.items()))
    if isinstance(value, (list, tuple, set)):
        return all(_is_read(part) for part in value)
    return not isinstance(value, Unread)


def _elsewhere(content: Mapping, use_ema: bool) -> str:
    """Where in the file there are weights, if not where they are looked for; else nothing."""
    for key in (*WRAPPERS, *EMA_WRAPPERS):
        if isinstance(content.get(key), Unread):
            return f"; {key!r} is a {_kind(content[key])}, not its .state_dict()"
    nested = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values())
    ]
    if not nested:
        return ""
    if nested[0] in EMA_WRAPPERS and not use_ema:
        return f"; use_ema=True loads {nested[0]!r}"
    return f"; weights are under {', '.join(map(repr, nested[:SHOWN]))}: save that dictionary alone"

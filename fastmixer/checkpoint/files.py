"""The named tensors in a checkpoint file, whichever of the three formats it has."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmixer.checkpoint import flax as checkpoint_flax
from fastmixer.checkpoint import pickled

# Keys under which training scripts keep the weights, and their exponential moving average.
WRAPPERS = ("state_dict", "model", "model_state_dict")
EMA_WRAPPERS = ("state_dict_ema", "model_ema")
EXTRA_STATE = "_extra_state"  # the end of the key of what torch.nn.Module.get_extra_state returns
SHOWN = 4  # names that an error message gives as examples

# How files begin that are often taken for a checkpoint, and what they are.
FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: fetch that with git lfs pull",
    b"<!doctype html": "a web page: the download failed, or needs a login",
    b"<html": "a web page: the download failed, or needs a login",
    b"\x89HDF": "an HDF5 file, as of Keras",
    b"GGUF": "a GGUF file",
}


class Content(NamedTuple):
    """Of a file.

    tensors: by name; under a name that ends with "_extra_state" it may be anything. flax: it is an .npz,
    with Flax's names and layouts. wrapper: the key that the tensors were found under, "" if at the top.
    unread: classes and functions that the file names besides, none of which was used.
    """

    tensors: dict[str, Tensor]
    flax: bool = False
    wrapper: str = ""
    unread: tuple[str, ...] = ()


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
    _refuse_foreign(path, head, members)
    saved = any(name.endswith("/data.pkl") for name in members)
    npy = bool(members) and all(name.endswith(".npy") for name in members)
    if not members and (_is_safetensors(path, head) or path.suffix == ".safetensors"):
        return Content(_tensors_only(_read_safetensors(path), path))
    if npy or (path.suffix == ".npz" and not saved):
        return Content(checkpoint_flax.read_npz(path), flax=True)
    content, unread = _read_saved(path)
    content, wrapper = _unwrapped(content, use_ema)
    return Content(_tensors_only(content, path, wrapper, use_ema), False, wrapper, unread)


def _members(path: Path) -> list[str]:
    """The names in a zip archive, which an .npz and what torch.save writes are; none if it is not one."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):  # damaged: its reader will say so
        return []


def _refuse_foreign(path: Path, head: bytes, members: list[str]) -> None:
    """Raises ValueError for a file that is whole, and something else than a checkpoint."""
    kind = next((kind for start, kind in FOREIGN.items() if head.lower().startswith(start.lower())), None)
    ends = {name.partition("/")[2] for name in members}
    if "constants.pkl" in ends:
        kind = "a TorchScript program, which torch.jit.save wrote: save its .state_dict() with torch.save"
    elif "archive_format" in ends:
        kind = "a program that torch.export.save wrote: save the .state_dict of it with torch.save"
    elif path.suffix == ".json" and head.lstrip().startswith(b"{"):
        kind = _index(path)
    if kind is not None:
        raise ValueError(f"{path} is not a checkpoint: it is {kind}")


def _index(path: Path) -> str:
    """What a JSON file is: the index of Hugging Face's sharded checkpoints, or any other."""
    try:
        shards = sorted(set(json.loads(path.read_bytes())["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError):
        return "a JSON file"
    names = ", ".join(map(str, shards[:SHOWN])) + ", ..." * (len(shards) > SHOWN)
    return (
        f"the index of a sharded checkpoint, whose weights lie in {names}: put the dictionaries of these "
        "files into one, and save that"
    )


def _is_safetensors(path: Path, head: bytes) -> bool:
    """Whether it begins like one, whatever its name: eight bytes of length, and JSON of that length."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs the package safetensors: pip install safetensors") from error
    try:
        return load_file(path, device="cpu")
    except Exception as error:
        raise _damaged(path, error) from error


def _read_saved(path: Path) -> tuple[object, tuple[str, ...]]:
    try:
        return pickled.load(path)
    except Exception as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    # torch's own text advises weights_only=False: never for a file that is not understood.
    if isinstance(error, pickled.Refused):
        return ValueError(
            f"{path} is not a checkpoint that can be read without executing anything: weights_only=True "
            f"refuses it, and it names {error}, which are never used; save the model's .state_dict() alone"
        )
    return ValueError(
        f"{path} is not a checkpoint: no .safetensors file, no .npz and no state dict that torch.save "
        f"wrote ({type(error).__name__} while reading {path.stat().st_size} bytes)"
    )


def _unwrapped(content: object, use_ema: bool) -> tuple[object, str]:
    """``content`` out of its wrappers, and their keys, joined by dots."""
    keys: list[str] = []
    wrappers = (*EMA_WRAPPERS, *WRAPPERS) if use_ema else WRAPPERS
    while isinstance(content, Mapping):
        key = next((key for key in wrappers if isinstance(content.get(key), Mapping)), None)
        if key is None:
            break
        keys.append(key)
        content = content[key]
    return content, ".".join(keys)


def _tensors_only(content: object, path: Path, wrapper: str = "", use_ema: bool = True) -> dict[str, Tensor]:
    """``content`` if it is a dictionary of named tensors that have values; ValueError if not."""
    where = f"{path} ({wrapper})" if wrapper else str(path)
    if isinstance(content, pickled.Unread):
        raise ValueError(
            f"{where} holds a {pickled.kind(content)}, a whole object, not a dictionary of named "
            "tensors: where its class is at hand, save the model's .state_dict() with torch.save"
        )
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} holds a {type(content).__name__}, not a dictionary of named tensors")
    for name, value in content.items():
        if isinstance(name, str) and name.rpartition(".")[2] == EXTRA_STATE and pickled.is_read(value):
            continue
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{where} is no dictionary of named tensors: its entry {name!r} is a "
                f"{pickled.kind(value)}{_elsewhere(content, use_ema)}"
            )
        problem = (
            "was saved from the meta device and has no values"
            if value.is_meta
            else f"is quantised or {str(value.layout).removeprefix('torch.')}, not a dense tensor"
            if value.is_quantized or value.layout is not torch.strided or value.is_nested
            else ""
        )
        if problem:
            raise ValueError(f"{where}: its entry {name!r} {problem}")
    return dict(content)


def _elsewhere(content: Mapping, use_ema: bool) -> str:
    """Where in the file there are weights, if not where they are looked for; else nothing."""
    whole = [key for key in (*WRAPPERS, *EMA_WRAPPERS) if isinstance(content.get(key), pickled.Unread)]
    if whole:
        return f"; {whole[0]!r} is a {pickled.kind(content[whole[0]])}, not its .state_dict()"
    nested = [
        key
        for key, value in content.items()
        if isinstance(value, Mapping) and value and all(isinstance(v, Tensor) for v in value.values())
    ]
    if not nested:
        return ""
    ema = "; use_ema=True loads " if not use_ema and nested[0] in EMA_WRAPPERS else ""
    if ema:
        return f"{ema}{nested[0]!r}"
    return f"; weights are under {', '.join(map(repr, nested[:SHOWN]))}: save that dictionary alone"


def shard_of(path: Path) -> str:
    """What to say of a file that, by its name, is one of several."""
    if re.search(r"-\d+-of-\d+$", path.stem) is None:
        return ""
    return (
        f"By its name {path.name} is one of several files of a sharded checkpoint: put all of them into one."
    )

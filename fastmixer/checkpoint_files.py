"""The named tensors in a checkpoint file, whichever of the three formats it has."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastmixer import checkpoint_flax

WRAPPERS = ("state_dict", "model")  # keys under which training scripts keep the weights


def read(path: Path) -> tuple[dict[str, Tensor], bool]:
    """The named tensors in the file, unwrapped, and whether it is an .npz, with Flax's names and layouts."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    path.open("rb").close()  # what the operating system objects to is not the content's fault
    if path.suffix == ".npz" or _holds_npy(path):
        return checkpoint_flax.read_npz(path), True
    return _named_tensors(_read_state_dict(path), path), False


def _holds_npy(path: Path) -> bool:
    """Whether the file is an .npz under another name; what torch.save wrote is a zip archive too."""
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):  # damaged: the reader that the suffix asks for will say so
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_state_dict(path: Path) -> object:
    """What a .safetensors file or one that torch.save wrote holds."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(
                f"reading {path} needs the package safetensors: pip install safetensors"
            ) from error
    try:
        if path.suffix == ".safetensors":
            return load_file(path, device="cpu")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # from damaged bytes the readers raise errors of a dozen kinds, OSError too
        # torch's own text advises weights_only=False here: never for a file that is not understood.
        raise ValueError(
            f"{path} is not a checkpoint: no .safetensors file, no .npz and no state dict that torch.save "
            f"wrote ({type(error).__name__} while reading {path.stat().st_size} bytes)"
        ) from error


def _named_tensors(content: object, path: Path) -> dict[str, Tensor]:
    """The state dict in ``content``, out of its wrapper."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dictionary of named tensors")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            kind = type(value).__name__
            raise ValueError(f"{path} is no dictionary of named tensors: its entry {name!r} is a {kind}")
    return dict(content)

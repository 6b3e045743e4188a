"""Loading a checkpoint file into a model: all of it, or nothing and a clear error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model")  # keys under which training scripts keep the weights
SHOWN = 20  # keys of each kind that an error message lists


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Loads the weights in the file at ``path`` into ``model``, which must have exactly those parameters.

    Args:
        model: any module; its parameters keep their dtype and device.
        path: a ``.safetensors`` file, or one that ``torch.save`` wrote, which is read with
            ``weights_only=True``: nothing in it is executed. It may hold the weights under "state_dict" or
            "model".

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a .safetensors file, and the safetensors package is not installed.
        ValueError: the file cannot be read, holds something else, or its keys or shapes are not the model's
            (the message lists them). The model is then as it was.
    """
    path = Path(path)
    weights = _read(path)
    _check_fits(model, weights, path)
    model.load_state_dict(weights, strict=True)


def _read(path: Path) -> dict[str, Tensor]:
    """The named tensors in the file, unwrapped."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    path.open("rb").close()  # what the operating system objects to is not the content's fault
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(
                f"reading {path} needs the package safetensors: pip install safetensors"
            ) from error
    try:
        if path.suffix == ".safetensors":
            content = load_file(path, device="cpu")
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # from damaged bytes the readers raise errors of a dozen kinds, OSError too
        # torch's own text advises weights_only=False here: never for a file that is not understood.
        raise ValueError(
            f"{path} is not a checkpoint: neither a .safetensors file nor a state dict that torch.save wrote "
            f"({type(error).__name__} while reading {path.stat().st_size} bytes)"
        ) from error
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


def _check_fits(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """Raises ValueError listing missing and unexpected keys and wrong shapes, if there are any."""
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    mismatches = [
        f"{name}: {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = [
        _listing("missing", [name for name in expected if name not in weights]),
        _listing("unexpected", [name for name in weights if name not in expected]),
        _listing("of another shape", mismatches),
    ]
    text = "\n".join(problem for problem in problems if problem)
    if text:
        raise ValueError(f"{path} does not fit the {type(model).__name__}, which is unchanged.\n{text}")


def _listing(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = [f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "\n  ".join([f"{title} ({len(items)}):", *items[:SHOWN], *more])

"""Loading a checkpoint file into a model: all of it, or nothing and a clear error."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from fastmixer import checkpoint_files, checkpoint_flax, checkpoint_resize

SHOWN = 20  # keys of each kind that an error message lists
GELUS = ("auto", "keep", "tanh")
RESIZES = (None, "block_diagonal")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and what of the model it changed besides the weights. ``print(report)`` says it.

    Attributes:
        path: of the file.
        tensors: how many were loaded.
        flax: whether the names and layouts were those of Google's files.
        gelus: GELUs that compute the tanh approximation now and did not before.
        scale: the K of a resize: the image is K times as high and wide as the file's; 1: as in the file.
    """

    path: Path
    tensors: int
    flax: bool
    gelus: int
    scale: int

    def __str__(self) -> str:
        lines = [f"{self.tensors} tensors from {self.path}" + (" (Flax's names)" if self.flax else "")]
        if self.gelus:
            lines.append(f"{self.gelus} GELUs set to approximate='tanh'")
        if self.scale > 1:
            lines.append(f"token MLPs made block-diagonal for images {self.scale} times as high and wide")
        return "; ".join(lines)


def load_checkpoint(
    model: nn.Module, path: str | os.PathLike[str], *, resize: str | None = None, gelu: str = "auto"
) -> LoadReport:
    """Loads the weights in the file at ``path`` into ``model``, which must have exactly those parameters.

    Args:
        model: any module; its parameters keep their dtype and device, whatever those of the file. For an
            ``.npz`` it is a ``MlpMixer``, fastmixer's or timm's, fused or not.
        path: a ``.safetensors`` file; one that ``torch.save`` wrote, read with ``weights_only=True``, which
            may hold the weights under "state_dict" or "model"; or an ``.npz`` of Google's
            (https://github.com/google-research/vision_transformer), read with ``allow_pickle=False``, where
            they may be under "opt/target/" or "params/". Nothing in a file is ever executed.
        resize: ``"block_diagonal"``: if the model is for images K times as high and wide as the file's, K an
            integer, each of the K x K parts of the image gets a copy of the token MLPs (appendix C of
            https://arxiv.org/abs/2105.01601). The model's must have K^2 times the file's hidden units. Where
            the token counts agree it does nothing. None: they must agree.
        gelu: ``"auto"``: an ``.npz`` sets every GELU to the tanh approximation, which Flax computes; other
            files leave it alone. ``"tanh"``: set it for any file, as for timm's copies of Google's weights.
            ``"keep"``: leave it alone, and accept an ``eps`` other than Flax's 1e-6.

    Returns:
        What was loaded and changed.

    Raises:
        FileNotFoundError: there is no such file; another OSError if it may not be opened.
        ImportError: a .safetensors file, and the safetensors package is not installed.
        ValueError: the file cannot be read, holds something else, or its keys or shapes are not the model's
            (the message lists them); the model cannot compute Flax's function; an unknown ``resize`` or
            ``gelu``. The model is then as it was.
    """
    for name, value, known in (("resize", resize, RESIZES), ("gelu", gelu, GELUS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    path = Path(path)
    weights, flax = checkpoint_files.read(path)
    expected = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    if flax:
        weights = checkpoint_flax.as_torch(weights, expected, path)
    scale = 1
    if resize is not None:
        weights, scale = checkpoint_resize.resized(weights, expected, checkpoint_resize.grid_of(model), path)
    _check_fits(model, expected, weights, path, checkpoint_flax.with_flax_name if flax else str)
    if flax and gelu == "auto":
        checkpoint_flax.check_eps(model)
    to_set = checkpoint_flax.exact_gelus(model) if gelu == "tanh" or (flax and gelu == "auto") else []
    model.load_state_dict(weights, strict=True)
    for activation in to_set:
        activation.approximate = "tanh"
    return LoadReport(path, len(weights), flax, len(to_set), scale)


def load_npz(
    model: nn.Module, path: str | os.PathLike[str], *, resize: str | None = None, gelu: str = "auto"
) -> LoadReport:
    """Loads one of Google's ``.npz`` checkpoints: :func:`load_checkpoint` by the name one looks for.

    The same call in every respect: timm's and fastmixer's ``.safetensors`` and ``.pth`` load through it too.

    Args:
        model, path, resize, gelu: as for ``load_checkpoint``.

    Raises:
        FileNotFoundError, ImportError, ValueError: as ``load_checkpoint``.
    """
    return load_checkpoint(model, path, resize=resize, gelu=gelu)


def _check_fits(
    model: nn.Module,
    expected: dict[str, Tensor],
    weights: dict[str, Tensor],
    path: Path,
    label: Callable[[str], str],
) -> None:
    """Raises ValueError listing missing and unexpected keys and wrong shapes, if there are any."""
    mismatches = [
        f"{label(name)}: {tuple(weights[name].shape)} in the file, {tuple(value.shape)} in the model"
        for name, value in expected.items()
        if name in weights and weights[name].shape != value.shape
    ]
    problems = [
        _listing("missing", [label(name) for name in expected if name not in weights]),
        _listing("unexpected", [label(name) for name in weights if name not in expected]),
        _listing("of another shape", mismatches),
    ]
    problems = [problem for problem in problems if problem]
    if not problems:
        return
    hints = [
        checkpoint_resize.advice(weights, expected, checkpoint_resize.grid_of(model)),
        _advice_on_head(weights, expected),
    ]
    text = "\n".join([*problems, *(hint for hint in hints if hint)])
    raise ValueError(f"{path} does not fit the {type(model).__name__}, which is unchanged.\n{text}")


def _advice_on_head(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """What to do if the head in the file has another number of classes than the model's; 0: no head."""
    classes, asked = (len(tensors.get("head.weight", ())) for tensors in (weights, expected))
    if classes == asked:
        return ""
    return (
        f"The head in the file has {classes} classes, the model's has {asked}: create the model with "
        f"num_classes={classes}, load, and then replace model.head if you want another one."
    )


def _listing(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = [f"... and {len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return "\n  ".join([f"{title} ({len(items)}):", *items[:SHOWN], *more])

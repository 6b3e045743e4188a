"""Loading a checkpoint file into a model: all of it, or nothing and a clear error."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmixer.checkpoint import files, fit, flax
from fastmixer.checkpoint import resize as resizing

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
        wrapper: the key that the file has the weights under, as "state_dict_ema"; "": under none.
        left: entries of the file that do not stand under ``strip_prefix``, and were not loaded.
        unread: classes that the file names beside tensors, as "argparse.Namespace"; none of it was used.
    """

    path: Path
    tensors: int
    flax: bool
    gelus: int
    scale: int
    wrapper: str = ""
    left: int = 0
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        origin = "Flax's names" if self.flax else self.wrapper
        images = f"images {self.scale} times as high and wide"
        notes = [
            (True, f"{self.tensors} tensors from {self.path}" + (f" ({origin})" if origin else "")),
            (self.left, f"{self.left} entries do not stand under the prefix and were left"),
            (self.unread, f"not read: {', '.join(self.unread)}"),
            (self.gelus, f"{self.gelus} GELUs set to approximate='tanh'"),
            (self.scale > 1, f"token MLPs made block-diagonal for {images}"),
        ]
        return "; ".join(note for applies, note in notes if applies)


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    resize: str | None = None,
    gelu: str = "auto",
    strip_prefix: str | None = None,
    use_ema: bool = True,
) -> LoadReport:
    """Loads the weights in the file at ``path`` into ``model``, which must have exactly those parameters.

    Args:
        model: any module; its parameters keep their dtype and device, whatever those of the file. For an
            ``.npz`` it is a ``MlpMixer``, fastmixer's or timm's, fused or not.
        path: a ``.safetensors`` file; one that ``torch.save`` wrote, read with ``weights_only=True``, which
            may hold the weights under "state_dict", "model" or "model_state_dict"; or an ``.npz`` of Google's
            (https://github.com/google-research/vision_transformer), read with ``allow_pickle=False``, where
            they may be under "opt/target/" or "params/". Nothing in a file is ever executed: objects of
            classes other than tensors, as training scripts put beside the weights, are not made.
        resize: ``"block_diagonal"``: if the model is for images K times as high and wide as the file's, K an
            integer, each of the K x K parts of the image gets a copy of the token MLPs (appendix C of
            https://arxiv.org/abs/2105.01601). The model's must have K^2 times the file's hidden units. Where
            the token counts agree it does nothing. None: they must agree.
        gelu: ``"auto"``: an ``.npz`` sets every GELU to the tanh approximation, which Flax computes; other
            files leave it alone. ``"tanh"``: set it for any file, as for timm's copies of Google's weights.
            ``"keep"``: leave it alone, and accept an ``eps`` other than Flax's 1e-6.
        strip_prefix: takes only what stands under this prefix, without it: "module." of DataParallel and
            DistributedDataParallel, "_orig_mod." of torch.compile, "model." of Lightning. None: all.
        use_ema: as in timm: where the file also has averaged weights, "state_dict_ema" or "model_ema", load
            those. False: the others.

    Returns:
        What was loaded and changed. Every parameter and buffer then holds the file's values, rounded to its
        dtype.

    Raises:
        FileNotFoundError: there is no such file; another OSError if it may not be opened or is a folder.
        ImportError: a .safetensors file, and the safetensors package is not installed.
        TypeError: ``model`` is no module, or ``strip_prefix`` no string.
        ValueError: the file cannot be read, holds something else, or its keys, shapes or kinds of numbers are
            not the model's (the message lists them, and names a prefix in the way); the model cannot compute
            Flax's function, holds no values yet (meta, lazy) or refuses some; an unknown ``resize`` or
            ``gelu``. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(strip_prefix, str | None):
        raise TypeError(f"strip_prefix must be a string or None, got {type(strip_prefix).__name__}")
    for name, value, known in (("resize", resize, RESIZES), ("gelu", gelu, GELUS)):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    path = Path(path)
    file = files.read(path, use_ema)
    weights, state = file.tensors, fit.state_of(model)
    if file.flax:
        if hint := fit.advice_on_model(flax.OUTER, state):
            raise ValueError(f"{path} does not fit the {type(model).__name__}, which is unchanged.\n{hint}")
        if strip_prefix is not None:
            raise ValueError(f"strip_prefix={strip_prefix!r}: {path} has Flax's names, which need none")
        weights = flax.as_torch(weights, state, path)
    elif strip_prefix is not None:
        weights = fit.stripped(weights, strip_prefix, state, path)
    left = len(file.tensors) - len(weights)
    weights, scale = fit.with_tied(weights, state), 1
    if resize is not None:
        weights, scale = resizing.resized(weights, state, resizing.grid_of(model), path)
    fit.check(model, state, weights, file)
    as_flax = file.flax and gelu == "auto"
    if as_flax:
        flax.check_eps(model)
    gelus = flax.exact_gelus(model) if as_flax or gelu == "tanh" else []
    _set(model, weights, path)
    for module in gelus:
        module.approximate = "tanh"
    return LoadReport(path, len(weights), file.flax, len(gelus), scale, file.wrapper, left, file.unread)


def load_npz(
    model: nn.Module, path: str | os.PathLike[str], *, resize: str | None = None, gelu: str = "auto"
) -> LoadReport:
    """Loads one of Google's ``.npz`` checkpoints: :func:`load_checkpoint` by the name one looks for.

    timm's and fastmixer's ``.safetensors`` and ``.pth`` load through it too.

    Args:
        model, path, resize, gelu: as for ``load_checkpoint``.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as ``load_checkpoint``.
    """
    return load_checkpoint(model, path, resize=resize, gelu=gelu)


# ---- all or nothing --------------------------------------------------------------------------------------


def _set(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """``load_state_dict``, and a comparison; ValueError, and the model is as it was, if either goes wrong."""
    tensors = [*model.parameters(), *model.buffers()]
    # A parameter that was made in inference mode can be written in that mode only.
    inference = torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(inference), torch.no_grad(), _restored_on_error(model, tensors):
        try:
            model.load_state_dict(weights, strict=True)
        except Exception as error:
            lines = "\n".join(str(error).splitlines()[:8])
            raise ValueError(
                f"{path} could not be loaded into the {type(model).__name__}, which is unchanged: "
                f"{type(error).__name__}: {lines}"
            ) from error
        pairs = {name: (own, weights.get(name)) for name, own in model.state_dict().items()}
        wrong = [
            name
            for name, (own, value) in pairs.items()
            if isinstance(own, Tensor) and isinstance(value, Tensor)  # other extra states are the module's
            if not fit.same_values(own, value.to(own.device, own.dtype))
        ]
        if wrong:
            raise ValueError(
                f"after loading, {len(wrong)} tensors of the {type(model).__name__} did not hold the values "
                f"of {path} ({', '.join(wrong[:4])}): a hook changed them, or they are tied and the "
                "file has two values for them. The model is unchanged."
            )


@contextlib.contextmanager
def _restored_on_error(model: nn.Module, tensors: list[Tensor]) -> Iterator[None]:
    """Puts parameters, buffers and extra states back if the body raises, an interrupt included."""
    slots = [slot for module in model.modules() for slot in (module._parameters, module._buffers)]
    contents = [(slot, dict(slot)) for slot in slots]
    tensors = [tensor for tensor in tensors if not tensor.is_meta and not is_lazy(tensor)]
    copies = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in tensors]  # a GPU may be full
    extras = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    try:
        yield
    except BaseException:
        for slot, content in contents:
            slot.clear()
            slot.update(content)
        for pair in copies:
            now, before = (tensor.detach().cpu().reshape(-1).view(torch.uint8) for tensor in pair)
            if not torch.equal(now, before):  # what refuses to be written was not
                pair[0].copy_(pair[1])
        for module, state in extras:
            module.set_extra_state(state)
        raise

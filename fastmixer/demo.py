"""Models and photographs to try things on: what ``verify`` and ``bench`` run. Needs timm and scikit-learn."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmixer.blocks.model import ALIASES, MODELS
from fastmixer.usage import UsageError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image


def build_model(name: str) -> nn.Module:
    """The model that timm calls ``name``, without pretrained weights; or timm's classes as the paper's H/14.

    Raises UsageError for an unknown name, with the nearest known ones.
    """
    import timm

    name = ALIASES.get(name, name)
    if timm.is_model(name):
        try:
            return timm.create_model(name, pretrained=False)
        except RuntimeError as error:  # the part of the name after the dot is not known
            raise UsageError(f"unknown model {name!r}: {error}") from error
    if name in MODELS:
        return timm.models.mlp_mixer.MlpMixer(**asdict(MODELS[name]))
    raise UsageError(f"unknown model {name!r}; {did_you_mean(name, MODELS, timm.list_models())}")


def randomise(model: nn.Module) -> None:
    """Moves every vector parameter off its trivial start and fills matrices of zeros; reproducible.

    A fresh model has LayerNorm weights of 1, biases of about 0 and a head of zeros: with these, code that
    forgot a bias would still agree.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif not parameter.any():
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def photographs(model: nn.Module, batch: int) -> Tensor:
    """(batch, 3, H, W) fp32: scikit-learn's photographs through the model's own preprocessing."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from timm.data import create_transform, resolve_model_data_config

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return torch.stack([transform(_view(photos, index)) for index in range(batch)])


def _view(photos: list[Image], index: int) -> Image:
    """The photographs in turn, whole at first and then another window of each at every further round."""
    lap, which = divmod(index, len(photos))
    photo = photos[which]
    if lap == 0:
        return photo
    width, height = (2 * side // 3 for side in photo.size)
    left, top = lap * 89 % (photo.size[0] - width), lap * 37 % (photo.size[1] - height)
    return photo.crop((left, top, left + width, top + height))

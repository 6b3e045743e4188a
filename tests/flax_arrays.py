"""Google's MLP-Mixer in NumPy, on arrays by the names and in the layouts of flax.linen, and the comparison.

Written from the paper and from what flax.linen documents of Conv, Dense, LayerNorm and gelu, so that a wrong
name or transpose in fastmixer shows as another function, also where JAX is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

import fastmixer
from fastmixer import parity
from fastmixer.blocks.model import MlpMixer

Arrays = dict[str, np.ndarray]


def make_arrays(
    seed: int = 0,
    *,
    patch: int = 4,
    tokens: int = 9,
    channels: int = 8,
    token_hidden: int = 6,
    channel_hidden: int = 20,
    blocks: int = 2,
    classes: int = 3,
) -> Arrays:
    """Random float32 parameters, none of them trivial; 0 classes leave the head out."""
    generator = np.random.default_rng(seed)
    arrays: Arrays = {}

    def layer(name: str, *shape: int) -> None:
        """A Dense layer's or, with four sizes, a convolution's: the last size is that of the output."""
        fan_in = math.prod(shape[:-1])
        arrays[f"{name}/kernel"] = generator.normal(size=shape) / math.sqrt(fan_in)
        arrays[f"{name}/bias"] = 0.3 * generator.normal(size=shape[-1])

    def norm(name: str) -> None:
        arrays[f"{name}/scale"] = 1 + 0.3 * generator.normal(size=channels)
        arrays[f"{name}/bias"] = 0.3 * generator.normal(size=channels)

    layer("stem", patch, patch, 3, channels)
    for block in (f"MixerBlock_{index}" for index in range(blocks)):
        norm(f"{block}/LayerNorm_0")
        layer(f"{block}/token_mixing/Dense_0", tokens, token_hidden)
        layer(f"{block}/token_mixing/Dense_1", token_hidden, tokens)
        norm(f"{block}/LayerNorm_1")
        layer(f"{block}/channel_mixing/Dense_0", channels, channel_hidden)
        layer(f"{block}/channel_mixing/Dense_1", channel_hidden, channels)
    norm("pre_head_layer_norm")
    if classes:
        layer("head", channels, classes)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def settings(arrays: Arrays) -> dict[str, object]:
    """The arguments of a ``MlpMixer`` for these arrays, fastmixer's or timm's; images are square."""
    patch, _, _, channels = arrays["stem/kernel"].shape
    tokens, token_hidden = arrays["MixerBlock_0/token_mixing/Dense_0/kernel"].shape
    channel_hidden = arrays["MixerBlock_0/channel_mixing/Dense_0/kernel"].shape[1]
    return {
        "img_size": patch * math.isqrt(tokens),
        "patch_size": patch,
        "num_blocks": len({name.split("/")[0] for name in arrays if name.startswith("MixerBlock_")}),
        "embed_dim": channels,
        # Half a unit more, as the model rounds ratio times channels down.
        "mlp_ratio": ((token_hidden + 0.5) / channels, (channel_hidden + 0.5) / channels),
        "num_classes": len(arrays["head/bias"]) if "head/bias" in arrays else 0,
    }


def make_model(arrays: Arrays, **kwargs: object) -> MlpMixer:
    """fastmixer's model for these arrays, in eval mode, with other weights."""
    return MlpMixer(**{**settings(arrays), **kwargs}).eval()


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    """flax.linen.gelu as called without arguments: the tanh approximation."""
    factor = x.dtype.type(math.sqrt(2 / math.pi))
    return x * (1 + np.tanh(factor * (x + x.dtype.type(0.044715) * x**3))) / 2


def exact_gelu(x: np.ndarray) -> np.ndarray:
    """flax.linen.gelu with approximate=False."""
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def forward(
    arrays: Arrays,
    images: np.ndarray,
    dtype: type = np.float64,
    gelu: Callable[[np.ndarray], np.ndarray] = tanh_gelu,
) -> np.ndarray:
    """images (B, H, W, 3) -> logits (B, classes), or pooled features (B, C) without a head; all in dtype."""
    weights = {name: array.astype(dtype) for name, array in arrays.items()}
    images = images.astype(dtype)

    def dense(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}/kernel"] + weights[f"{name}/bias"]

    def mlp(name: str, x: np.ndarray) -> np.ndarray:
        return dense(f"{name}/Dense_1", gelu(dense(f"{name}/Dense_0", x)))

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + dtype(1e-6)) * weights[f"{name}/scale"] + weights[f"{name}/bias"]

    patch, _, _, channels = weights["stem/kernel"].shape
    batch, height, width, _ = images.shape
    patches = images.reshape(batch, height // patch, patch, width // patch, patch, 3)
    x = np.einsum("bhiwjc,ijcd->bhwd", patches, weights["stem/kernel"]) + weights["stem/bias"]
    x = x.reshape(batch, -1, channels)
    for block in (f"MixerBlock_{index}" for index in range(settings(arrays)["num_blocks"])):
        mixed = mlp(f"{block}/token_mixing", norm(f"{block}/LayerNorm_0", x).swapaxes(1, 2))
        x = x + mixed.swapaxes(1, 2)
        x = x + mlp(f"{block}/channel_mixing", norm(f"{block}/LayerNorm_1", x))
    pooled = norm("pre_head_layer_norm", x).mean(axis=1)
    return dense("head", pooled) if "head/kernel" in weights else pooled


def save(path: Path, arrays: Arrays, prefix: str = "") -> Path:
    np.savez(path, **{f"{prefix}{name}": array for name, array in arrays.items()})
    return path


def random_images(arrays: Arrays, batch: int = 2, seed: int = 1) -> np.ndarray:
    """images (B, H, W, 3), float32."""
    side = settings(arrays)["img_size"]
    return np.random.default_rng(seed).normal(size=(batch, side, side, 3)).astype(np.float32)


def logits(model: nn.Module, images: np.ndarray, backend: str = "torch") -> torch.Tensor:
    """images (B, H, W, 3), as JAX has them -> (B, classes)."""
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), fastmixer.backend(backend):
        return model(torch.from_numpy(images).permute(0, 3, 1, 2).to(dtype))


def against_flax(
    model: nn.Module, arrays: Arrays, images: np.ndarray, yardstick: np.ndarray | None = None, **kwargs: str
) -> parity.Parity:
    """The model against Google's in fp64; the yardstick is Google's in fp32, by default NumPy's."""
    single = forward(arrays, images, np.float32) if yardstick is None else yardstick
    truth = torch.from_numpy(forward(arrays, images))
    return parity.compare(logits(model, images, **kwargs), torch.from_numpy(single), truth)

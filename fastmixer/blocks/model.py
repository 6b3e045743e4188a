"""MLP-Mixer (https://arxiv.org/abs/2105.01601) and the seven models of the paper, without needing timm."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import asdict

import torch
from torch import Tensor, nn

from fastmixer.blocks.block import MixerBlock
from fastmixer.blocks.layers import LAYER_NORM, Mlp
from fastmixer.configs.models import ALIASES, MODELS


class PatchEmbed(nn.Module):
    """Cuts an image into patches and maps each linearly to a token.

    Args:
        img_size, patch_size: pixels a side; the first must be a multiple of the second.
        in_chans, embed_dim: channels of the image and of a token.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        img_size: int,
        patch_size: int,
        in_chans: int,
        embed_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if patch_size < 1 or img_size < patch_size or img_size % patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size, got {img_size} and {patch_size}")
        if in_chans < 1:
            raise ValueError(f"in_chans must be at least 1, got {in_chans}")
        self.image_shape = (in_chans, img_size, img_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size, device=device, dtype=dtype)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, in_chans, img_size, img_size) -> tokens (B, num_patches, embed_dim), row by row."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(f"images must have shape (B, {expected}), got {tuple(images.shape)}")
        return self.proj(images).flatten(2).transpose(1, 2)


class MlpMixer(nn.Module):
    """MLP-Mixer for image classification, with timm's parameter names, shapes and initial weights.

    The model of https://arxiv.org/abs/2105.01601, figure 1; the defaults are S/16's. Checkpoints of
    timm's mixers load with ``strict=True``, and this model's load into timm's.

    Args:
        num_classes: outputs of the head; 0 leaves the head out and returns the pooled features.
        img_size, patch_size: sides of the images and of the patches (both square), in pixels; tokens
            S = (img_size / patch_size)^2.
        in_chans: channels of the images, at least 1.
        num_blocks, embed_dim: depth, and channels C.
        mlp_ratio: hidden units D of the token MLP and E of the channel MLP, as multiples of ``embed_dim``.
        block_layer, mlp_layer, norm_layer, act_layer: the classes to build from, as in timm.
        drop_rate, proj_drop_rate, drop_path_rate: probabilities of dropout before the head, in the MLPs, and
            of stochastic depth.
        device, dtype: of the parameters.

    Raises:
        ValueError: num_classes or num_blocks is negative, in_chans below 1, img_size not a multiple of
            patch_size, or as ``MixerBlock``.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        img_size: int = 224,
        in_chans: int = 3,
        patch_size: int = 16,
        num_blocks: int = 8,
        embed_dim: int = 512,
        mlp_ratio: float | tuple[float, float] = (0.5, 4.0),
        block_layer: Callable[..., nn.Module] = MixerBlock,
        mlp_layer: Callable[..., nn.Module] = Mlp,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_classes < 0 or num_blocks < 0:
            raise ValueError(
                f"num_classes and num_blocks must not be negative, got {num_classes}, {num_blocks}"
            )
        where = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.stem = PatchEmbed(img_size, patch_size, in_chans, embed_dim, **where)
        blocks = [
            block_layer(
                embed_dim,
                self.stem.num_patches,
                mlp_ratio,
                mlp_layer=mlp_layer,
                norm_layer=norm_layer,
                act_layer=act_layer,
                drop=proj_drop_rate,
                drop_path=drop_path_rate,
                **where,
            )
            for _ in range(num_blocks)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm_layer(embed_dim, **where)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **where) if num_classes > 0 else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Draws all weights anew; the same seed gives the weights that timm's model would have."""
        for name, child in self.named_children():
            _init(child, name)

    def forward_features(self, images: Tensor) -> Tensor:
        """images (B, in_chans, img_size, img_size) -> normalised tokens (B, S, C)."""
        return self.norm(self.blocks(self.stem(images)))

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """tokens (B, S, C) -> logits (B, num_classes); the pooled features (B, C) if ``pre_logits``."""
        pooled = self.head_drop(tokens.mean(dim=1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """images (B, in_chans, img_size, img_size) -> logits (B, num_classes).

        Logits have the parameters' dtype, or autocast's; the pooled features (B, C) come back if num_classes
        is 0. Raises ValueError for images of another shape.
        """
        return self.forward_head(self.forward_features(images))


def create_model(name: str, **kwargs) -> MlpMixer:
    """One of the seven models of https://arxiv.org/abs/2105.01601, table 1, with fresh weights.

    Args:
        name: ``"mixer_X_224"`` with X one of s32, s16, b32, b16, l32, l16 and h14, or the paper's name, as
            ``"B/16"``.
        kwargs: passed on to :class:`MlpMixer`, over the model's own settings.

    Raises:
        TypeError: name is not a string, or MlpMixer has no such argument.
        ValueError: no such model, and the message suggests the nearest; or as ``MlpMixer``.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string such as 'mixer_b16_224', got {type(name).__name__}")
    config = MODELS.get(ALIASES.get(name, name))
    if config is None:
        near = difflib.get_close_matches(name, [*MODELS, *ALIASES], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(MODELS)}"
        raise ValueError(f"name: there is no model {name!r}; {hint}")
    return MlpMixer(**{**asdict(config), **kwargs})


def _init(module: nn.Module, name: str) -> None:
    """The rules that timm uses for Mixer, so that a seed means the same model: children first."""
    for child_name, child in module.named_children():
        _init(child, f"{name}.{child_name}")
    if not isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d)):
        if hasattr(module, "init_weights"):
            module.init_weights()
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Conv2d):
        _lecun_normal_(module.weight)
    elif not isinstance(module, nn.Linear):
        if module.weight is not None:
            nn.init.ones_(module.weight)
    elif name.startswith("head"):
        nn.init.zeros_(module.weight)
    else:
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None and "mlp" in name:
            nn.init.normal_(module.bias, std=1e-6)


def _lecun_normal_(weight: Tensor) -> None:
    """Normal with variance 1 / fan_in, cut off at two standard deviations: Flax's default.

    By inverting the distribution function: ``torch.nn.init.trunc_normal_`` draws differently from one version
    to the next.
    """
    fan_in = weight[0].numel()
    inside = math.erf(2.0 / math.sqrt(2.0))  # the normal's mass between -2 and 2
    spread = 0.87962566103423978  # standard deviation of a standard normal cut off there
    with torch.no_grad():
        weight.uniform_(-inside, inside).erfinv_().mul_(math.sqrt(2.0)).clamp_(-2.0, 2.0)
        weight.mul_(math.sqrt(1.0 / fan_in) / spread)

"""Token MLPs for larger images: appendix C of the MLP-Mixer paper (https://arxiv.org/abs/2105.01601).

For images K times as high and wide, the tokens are cut into K x K parts, each a grid of the old size, and
every part gets a copy of the token MLP: weights that are block-diagonal while the tokens are counted part by
part. A model counts them row by row over the whole image, so rows and columns are put in that order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

Weights = Mapping[str, Tensor]  # by the model's names
Grid = tuple[int, int]  # patches (height, width)


def grid_of(model: nn.Module) -> Grid | None:
    """The model's grid of patches, or None if it does not say."""
    grid = getattr(getattr(model, "stem", None), "grid_size", None)
    return None if grid is None else tuple(grid)


def resized(weights: Weights, state: Weights, grid: Grid | None, path: Path) -> tuple[dict[str, Tensor], int]:
    """The file's weights with token MLPs for the model's ``grid``, and K; as they are, and 1, if they fit it.

    Raises ValueError, with what can be done, if the grid is not K times the file's, if the model, whose state
    dict is ``state``, does not have K^2 times as many hidden units, or if the token MLPs are gated.
    """
    sizes = _token_mlp_sizes(weights)
    if sizes is None or grid is None:
        lacking = "the file holds no plain token MLPs" if sizes is None else "the model has no stem.grid_size"
        raise ValueError(f"{path} cannot be resized: {lacking}. The model is unchanged.")
    tokens, hidden = sizes
    if tokens == grid[0] * grid[1]:
        return dict(weights), 1
    scale = _scale(tokens, grid)
    if scale is None or _token_mlp_sizes(state) != (scale**2 * tokens, scale**2 * hidden):
        hint = advice(weights, state, grid)
        raise ValueError(f"{path} cannot be resized: {hint} The model is unchanged.")
    # For each token of the whole image, row by row, its place when the tokens are counted part by part.
    row_by_row = torch.arange(scale**2 * tokens).view(scale, grid[0] // scale, scale, grid[1] // scale)
    order = row_by_row.transpose(1, 2).flatten().argsort()
    return {name: _enlarged(name, value, sizes, order) for name, value in weights.items()}, scale


def advice(weights: Weights, state: Weights, grid: Grid | None) -> str:
    """What to do about a file whose token MLPs are for another number of tokens; empty if they are not."""
    sizes = _token_mlp_sizes(weights)
    if sizes is None or grid is None or sizes[0] == grid[0] * grid[1]:
        return ""
    tokens, hidden = sizes
    text = f"The file's token MLPs are for {tokens} patches, the model has {grid[0]} x {grid[1]}"
    scale = _scale(tokens, grid)
    if scale is None:
        return (
            f"{text}: resize='block_diagonal' can only make them fit images an integer K times as high and "
            f"wide, of {tokens} K^2 patches."
        )
    text += f", {scale} times as many each way: "
    wanted = scale**2 * hidden
    if _token_mlp_sizes(state) != (scale**2 * tokens, wanted):
        text += (
            f"create the model with {wanted} hidden units per token MLP{_mlp_ratio(weights, wanted)}, and "
        )
    return f"{text}load with resize='block_diagonal'."


def _enlarged(name: str, value: Tensor, sizes: tuple[int, int], order: Tensor) -> Tensor:
    """A parameter of a token MLP, made K^2 times as large; any other, or one of an odd shape, as it is."""
    mlp = re.fullmatch(r"blocks\.\d+\.mlp_tokens\.(fc[12])\.(weight|bias)", name)
    if mlp is None:
        return value
    shape = sizes if mlp[1] == "fc2" else sizes[::-1]
    if value.shape != (shape if mlp[2] == "weight" else shape[:1]):
        return value
    copies = len(order) // sizes[0]
    large = torch.block_diag(*[value] * copies) if value.ndim == 2 else value.repeat(copies)
    if mlp[1] == "fc2":
        return large[order]
    return large[:, order] if mlp[2] == "weight" else large


def _scale(tokens: int, grid: Grid) -> int | None:
    """K, such that the grid is K times as high and wide as one of so many tokens; None if there is none."""
    scale = math.isqrt(grid[0] * grid[1] // tokens)
    fits = scale**2 * tokens == grid[0] * grid[1] and grid[0] % scale == grid[1] % scale == 0
    return scale if fits else None


def _token_mlp_sizes(weights: Weights) -> tuple[int, int] | None:
    """(tokens, hidden units) of the first block's token MLP, or None if there is none or it is gated."""
    fc1, fc2 = (weights.get(f"blocks.0.mlp_tokens.{layer}.weight") for layer in ("fc1", "fc2"))
    if fc1 is None or fc2 is None or fc1.ndim != 2 or fc1.shape != fc2.shape[::-1] or 0 in fc1.shape:
        return None
    return fc1.shape[1], fc1.shape[0]


def _mlp_ratio(weights: Weights, hidden: int) -> str:
    """The argument that makes a model with ``hidden`` units per token MLP, and the file's per channel MLP."""
    fc1 = weights.get("blocks.0.mlp_channels.fc1.weight")
    if fc1 is None or fc1.ndim != 2 or 0 in fc1.shape:
        return ""
    channels = fc1.shape[1]
    ratios = []
    for units in (hidden, len(fc1)):
        exact = int(units / channels * channels) == units  # else the model would round it down
        ratios.append(units / channels if exact else (units + 0.5) / channels)
    return f", mlp_ratio=({ratios[0]}, {ratios[1]})"

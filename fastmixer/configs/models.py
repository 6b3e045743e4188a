"""The paper's seven models (https://arxiv.org/abs/2105.01601, table 1) and the sizes of their blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class BlockShape(NamedTuple):
    """S tokens, C channels, D token-MLP hidden, E channel-MLP hidden."""

    tokens: int
    channels: int
    token_hidden: int
    channel_hidden: int


@dataclass(frozen=True)
class MixerConfig:
    """One row of the paper's table 1; the hidden sizes follow from the default ``mlp_ratio`` of (0.5, 4)."""

    patch_size: int
    num_blocks: int
    embed_dim: int

    def block_shape(self, img_size: int = 224) -> BlockShape:
        """The sizes of each block, for images of ``img_size`` pixels per side."""
        C = self.embed_dim
        return BlockShape((img_size // self.patch_size) ** 2, C, C // 2, 4 * C)


MODELS = {
    "mixer_s32_224": MixerConfig(patch_size=32, num_blocks=8, embed_dim=512),
    "mixer_s16_224": MixerConfig(patch_size=16, num_blocks=8, embed_dim=512),
    "mixer_b32_224": MixerConfig(patch_size=32, num_blocks=12, embed_dim=768),
    "mixer_b16_224": MixerConfig(patch_size=16, num_blocks=12, embed_dim=768),
    "mixer_l32_224": MixerConfig(patch_size=32, num_blocks=24, embed_dim=1024),
    "mixer_l16_224": MixerConfig(patch_size=16, num_blocks=24, embed_dim=1024),
    "mixer_h14_224": MixerConfig(patch_size=14, num_blocks=32, embed_dim=1280),
}

# The paper's own names: "B/16" is mixer_b16_224.
ALIASES = {f"{name[6].upper()}/{config.patch_size}": name for name, config in MODELS.items()}

MODEL_BLOCKS = {alias: MODELS[name].block_shape() for alias, name in ALIASES.items()}

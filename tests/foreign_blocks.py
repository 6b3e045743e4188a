"""Foreign blocks for the tests of fuse: one that is a Mixer block, and others that only look like one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fastmixer
from fastmixer.blocks.layers import Mlp

SEQ, DIM = 16, 24


def make_model(**kwargs) -> nn.Module:
    """A small timm mixer with two blocks and a head that is not all zeros."""
    import timm.models.mlp_mixer as timm_mixer

    settings = {
        "img_size": 16,
        "patch_size": 4,
        "num_blocks": 2,
        "embed_dim": DIM,
        "num_classes": 5,
        **kwargs,
    }
    model = timm_mixer.MlpMixer(**settings)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


class Plain(nn.Module):
    """A foreign block: a Mixer block whose class fastmixer has never seen, with one line to override."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(DIM)
        self.mlp_tokens = Mlp(SEQ, 12)
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp_channels = Mlp(DIM, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class PostNorm(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.mlp_tokens(x.transpose(1, 2)).transpose(1, 2))
        return self.norm2(x + self.mlp_channels(x))


class DropsInTraining(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


class DropPathOnce(Plain):
    """Draws stochastic depth for one half only."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_path = fastmixer.blocks.block.DropPath(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class Raises(Plain):
    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("no forward today")


class Uncopyable(Plain):
    def __deepcopy__(self, memo: dict) -> Uncopyable:
        raise RuntimeError("one of a kind")


class Unreadable(Plain):
    class Setting:
        __slots__ = ()

        def __repr__(self) -> str:
            raise OSError("unreadable")

    def __init__(self) -> None:
        super().__init__()
        self.setting = self.Setting()


class ScaledByAttribute(Plain):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class LearnedScale(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))


class ConsumesRandomNumbers(Plain):
    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return super().forward(x)

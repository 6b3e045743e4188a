"""The layers that a Mixer block is made of, with timm's names, initial weights and random draws."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

LAYER_NORM = partial(nn.LayerNorm, eps=1e-6)


class Mlp(nn.Module):
    """fc2(drop(act(fc1(x)))) over the last axis, with the module names of timm's ``Mlp``.

    Args:
        in_features: size of the last axis of input and output.
        hidden_features: units in between.
        act_layer, drop: the activation's class, and the dropout rate.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features, device=device, dtype=dtype)
        self.act = act_layer()
        self.drop1 = nn.Dropout(drop)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features, device=device, dtype=dtype)
        self.drop2 = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (..., in_features)."""
        hidden = self.norm(self.drop1(self.act(self.fc1(x))))
        return self.drop2(self.fc2(hidden))


class DropPath(nn.Module):
    """Stochastic depth (https://arxiv.org/abs/1603.09382): zeroes samples in training.

    A sample is zeroed with probability ``drop_prob``; the others are divided by the probability of surviving.
    Draws the same random numbers as timm's.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (B, ...)."""
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        factors = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        if keep > 0.0 and self.scale_by_keep:
            factors.div_(keep)
        return x * factors

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"


def loaded_classes(*names: str) -> tuple[type[nn.Module], ...]:
    """The classes of these full names whose module was imported: nothing can be an instance of the others."""
    places = [name.rpartition(".") for name in names]
    return tuple(getattr(sys.modules[module], kind) for module, _, kind in places if module in sys.modules)

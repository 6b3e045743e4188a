"""How linear layers lie in memory for the kernels: as they are, or packed; and what outlives a call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import round_up
from fastmixer.params import MixingParams


class PackedLinear(NamedTuple):
    """A linear layer as the kernels read it: as ``nn.Linear`` keeps it, or packed (``kernels/pack.py``).

    weight: (N_PAD, K_PAD) compute dtype, rows padded, zeros beyond (N, K). bias: (N_PAD,), or as it is (N,);
    None: there is none, or it is in the weight's padding. rank1: (N_PAD,) row sums of the folded weight; None
    where LayerNorm is not folded in. scale: (N_PAD,) what each row of the folded weight is to be multiplied
    by; None: 1.
    """

    weight: Tensor
    bias: Tensor | None
    rank1: Tensor | None = None
    scale: Tensor | None = None


class Layout(NamedTuple):
    """A linear layer, weight (N, K) and bias (N,), and how the kernels read it.

    dtype: of the packed weight. shape: what it is padded to with zeros; None: only the distance between rows
    is padded, to what vectorised loads need. norm: the (gamma, beta) that are folded in. bias_in_padding: the
    bias is packed into columns K and K + 1 of the weight, not padded by itself.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype
    shape: tuple[int, int] | None = None
    norm: tuple[Tensor | None, Tensor | None] | None = None
    bias_in_padding: bool = False

    @property
    def settings(self) -> tuple:
        """What two packings of the same layer differ by."""
        has = self.norm is not None, self.bias is not None
        return self.dtype, self.shape, *has, self.bias_in_padding

    def as_it_lies(self) -> PackedLinear | None:
        """The layer itself, where the kernels can read it."""
        weight = self.weight
        if self.norm is not None or self.bias_in_padding or weight.dtype != self.dtype:
            return None
        if self.shape is None:
            readable = weight.stride(1) == 1 and weight.stride(0) % configs.ALIGNED == 0
        else:
            readable = self.shape == weight.shape and weight.is_contiguous()
        return PackedLinear(weight, self.bias) if readable else None

    def renewed(self, role: str, params: MixingParams) -> Layout:
        """The same layout of the layer that has ``role`` in ``params``."""
        if role.endswith("fc1"):
            norm = None if self.norm is None else (params.norm_weight, params.norm_bias)
            return self._replace(weight=params.fc1_weight, bias=params.fc1_bias, norm=norm)
        return self._replace(weight=params.fc2_weight, bias=None if self.bias is None else params.fc2_bias)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """(N_PAD, K_PAD)."""
        N, K = self.weight.shape
        return self.shape or (N, round_up(K, configs.ALIGNED))


Layouts = dict[str, Layout]  # by role: "token_fc1", "token_fc2", "channel_fc1", "channel_fc2"

MOST_CALLS = 64  # of a block


class Kept:
    """Packed layers that outlive a call. Their owner sees to it that the weights do not change meanwhile."""

    def __init__(self) -> None:
        self._packed: dict[tuple, tuple[Layout, PackedLinear]] = {}
        # By what a plan is kept under: the plan that reads packed layers, and they.
        self.calls: dict[tuple, tuple[Any, list[Tensor | None]]] = {}

    def get(self, role: str, layout: Layout) -> PackedLinear | None:
        """The layer in this layout, if it was kept."""
        _, packed = self._packed.get((role, layout.settings), (None, None))
        return packed

    def keep(self, role: str, layout: Layout, packed: PackedLinear) -> None:
        """Keeps it for the next call."""
        self._packed[role, layout.settings] = layout, packed

    def keep_call(self, key: tuple, plan: Any, layers: list[Tensor | None]) -> None:
        """Keeps what a call like this one needs."""
        if len(self.calls) >= MOST_CALLS:
            self.calls.clear()
        self.calls[key] = plan, layers

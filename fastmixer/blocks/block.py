"""The Mixer block as a module: timm's signature, parameter names and initial weights, without timm."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fastmixer.blocks.fused_forward import TRUSTED_FORWARDS, FusedForward
from fastmixer.blocks.layers import LAYER_NORM, DropPath, Mlp
from fastmixer.blocks.structure import Structure
from fastmixer.notices import constant_in_traces


class MixerBlock(nn.Module):
    """One block of MLP-Mixer (https://arxiv.org/abs/2105.01601), fused wherever its modules allow it.

    A drop-in for timm's block, also as ``timm.models.mlp_mixer.MlpMixer(block_layer=fastmixer.MixerBlock)``:
    the same arguments, parameter names, shapes and initial weights, and the same draws in training. With
    modules that fastmixer cannot fuse (a gated MLP, another activation, dropout in training, hooks on inner
    modules) it computes what they say, one after the other; :meth:`why_not_fused` tells the reason.

    Args:
        dim: channels C.
        seq_len: tokens S.
        mlp_ratio: hidden units D of the token MLP and E of the channel MLP, each as a multiple of ``dim``,
            rounded down; one number serves for both.
        mlp_layer: called as ``mlp_layer(features, hidden, act_layer=, drop=, device=, dtype=)``.
        norm_layer: called as ``norm_layer(dim, device=, dtype=)``.
        act_layer: called without arguments.
        drop: probability of the dropouts inside the MLPs.
        drop_path: probability of stochastic depth, one draw per sample and half.
        device, dtype: of the parameters.

    Raises:
        ValueError: dim, seq_len or a hidden size below 1, an mlp_ratio of more or fewer than two numbers, or
            a probability outside [0, 1].
    """

    def __init__(
        self,
        dim: int,
        seq_len: int,
        mlp_ratio: float | tuple[float, float] = (0.5, 4.0),
        mlp_layer: Callable[..., nn.Module] = Mlp,
        norm_layer: Callable[..., nn.Module] = LAYER_NORM,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        tokens_dim, channels_dim = _hidden_sizes(dim, seq_len, mlp_ratio)
        if not 0.0 <= drop_path <= 1.0:
            raise ValueError(f"drop_path must be a probability between 0 and 1, got {drop_path}")
        where = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **where)
        self.mlp_tokens = mlp_layer(seq_len, tokens_dim, act_layer=act_layer, drop=drop, **where)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = norm_layer(dim, **where)
        self.mlp_channels = mlp_layer(dim, channels_dim, act_layer=act_layer, drop=drop, **where)

    def forward(self, x: Tensor) -> Tensor:
        """x and the result: (B, S, C), one floating dtype. Errors as of ``functional.mixer_block``."""
        if torch.compiler.is_compiling():
            self._make_fused_forward()
        return self._fused_forward()(x)

    def forward_modules(self, x: Tensor) -> Tensor:
        """The same block, module by module, as eager PyTorch runs it."""
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))

    def why_not_fused(self) -> str | None:
        """Why a call would run the modules one by one just now, or None if it would be fused.

        Judged by the modules alone: what a fused call runs, kernels or the reference, the backend decides.
        """
        return self._fused_forward().why_not()

    def _fused_forward(self) -> FusedForward:
        # Made on first use, and anew for a replica or a copy, whose __dict__ may come from another block.
        fused = self.__dict__.get("_fused")
        if fused is None or fused.block is not self:
            fused = self._fused = FusedForward(self, eager="forward_modules")
        return fused

    @constant_in_traces
    def _make_fused_forward(self) -> None:
        """Before a trace, which could not make one."""
        self._fused_forward()

    def __getstate__(self) -> dict[str, object]:
        state, fused = super().__getstate__(), self.__dict__.get("_fused")
        return state if fused is None else fused.without_own(state)  # a copy makes one of its own


TRUSTED_FORWARDS.add(MixerBlock.forward_modules)


def fused_forward_of(module: nn.Module) -> FusedForward | None:
    """What runs ``module`` fused, if it was fused or is a ``MixerBlock``."""
    own = type(module).forward is MixerBlock.forward
    return FusedForward.of(module) or (module._fused_forward() if own else None)


def fused_forwards(model: nn.Module) -> Iterator[tuple[str, FusedForward]]:
    """The name and the forward of every block of ``model`` that was fused; "(model)" is the model itself."""
    for name, module in model.named_modules():
        if (forward := fused_forward_of(module)) is not None:
            yield name or "(model)", forward


def fused_blocks(model: nn.Module) -> Iterator[tuple[str, FusedForward, Structure]]:
    """Those of them that run fused, with what they consist of."""
    for name, forward in fused_forwards(model):
        structure = forward.decide()
        if isinstance(structure, Structure):
            yield name, forward, structure


def _hidden_sizes(dim: int, seq_len: int, mlp_ratio: float | tuple[float, float]) -> tuple[int, int]:
    for name, size in (("dim", dim), ("seq_len", seq_len)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    ratios = (mlp_ratio, mlp_ratio) if isinstance(mlp_ratio, (int, float)) else tuple(mlp_ratio)
    if len(ratios) != 2:
        raise ValueError(f"mlp_ratio must be a number or a pair (tokens, channels), got {mlp_ratio!r}")
    hidden = tuple(int(ratio * dim) for ratio in ratios)
    if min(hidden) < 1:
        raise ValueError(f"mlp_ratio {mlp_ratio!r} leaves no hidden unit for dim={dim}: {hidden}")
    return hidden

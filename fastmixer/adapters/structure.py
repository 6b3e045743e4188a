"""What an adapter found inside a block: the modules of its two halves, and whether they are still there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastmixer.half import Half
from fastmixer.reference import product_dtype

# Parameters swapped by torch.func.functional_call are plain tensors; any other subclass (a quantised or a
# distributed tensor) is something whose storage a kernel may not read.
PLAIN_TENSORS = (nn.Parameter, Tensor)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class HalfModules:
    """The modules of one half. ``mlp`` holds ``fc1``, ``fc2`` and ``act``; dropouts are kept in Structure."""

    norm: nn.LayerNorm
    mlp: nn.Module
    fc1: nn.Linear
    act: nn.GELU
    fc2: nn.Linear

    def half(self, residual_scale: Tensor | None = None) -> Half:
        """The live parameters: read anew at each call, as ``to()`` or ``load_state_dict`` may swap them."""
        # Straight from the dict: nn.Module.__getattr__ would cost half a microsecond a parameter.
        norm, fc1, fc2 = self.norm._parameters, self.fc1._parameters, self.fc2._parameters
        return Half(
            norm["weight"],
            norm["bias"],
            fc1["weight"],
            fc1["bias"],
            fc2["weight"],
            fc2["bias"],
            self.norm.eps,
            self.act.approximate,
            residual_scale,
        )

    def parameters(self) -> Iterator[Tensor | None]:
        """The six parameters, None where there is none or where a name is no longer a parameter's."""
        for module in (self.norm, self.fc1, self.fc2):
            yield module._parameters.get("weight")
            yield module._parameters.get("bias")


@dataclass(frozen=True, eq=False)
class Structure:
    """The modules of a block that fastmixer can compute, in the order its forward uses them.

    It holds no reference to the block itself, so keeping one on the block makes no reference cycle.

    Args:
        token, channel: the modules of the two halves.
        drop_path: the block's stochastic depth, or None.
        dropouts: the ``nn.Dropout`` modules inside the MLPs.
        draws_per_sample: drop_path is known to scale each sample by one random factor, so that its draw can
            be taken apart from its product. With an unknown kind the block runs unfused in training.
        children: the block's own children; with those of the MLPs they must not change.
    """

    token: HalfModules
    channel: HalfModules
    drop_path: nn.Module | None
    dropouts: tuple[nn.Dropout, ...]
    draws_per_sample: bool
    children: tuple[nn.Module, ...]
    _mlps: tuple[tuple[nn.Module, tuple[nn.Module, ...]], ...] = field(init=False)
    _inner: tuple[tuple[nn.Module, type], ...] = field(init=False)

    def __post_init__(self) -> None:
        mlps = tuple((half.mlp, tuple(half.mlp._modules.values())) for half in (self.token, self.channel))
        inner = (*self.children, *(child for _, children in mlps for child in children))
        object.__setattr__(self, "_mlps", mlps)
        object.__setattr__(self, "_inner", tuple((m, type(m)) for m in inner if m is not None))

    def unchanged(self, block: nn.Module) -> bool:
        """Whether ``block`` still consists of just these modules, none hooked, patched or parametrised.

        Runs at every call of a fused block, so it only compares identities: about five microseconds.
        """
        if tuple(block._modules.values()) != self.children or block._parameters or block._buffers:
            return False
        for mlp, children in self._mlps:
            if tuple(mlp._modules.values()) != children:
                return False
        for module, kind in self._inner:
            state = module.__dict__
            # A registered parametrization shows as a new class.
            if (
                type(module) is not kind
                or state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or "forward" in state
            ):
                return False
        for half in (self.token, self.channel):
            for linear in (half.fc1, half.fc2):
                if type(linear._parameters.get("weight")) not in PLAIN_TENSORS:
                    return False
                if "bias" not in linear._parameters:
                    return False
        return True

    def unfused_now(self) -> str | None:
        """Why the block cannot be fused in its present mode (training or eval), or None if it can."""
        for dropout in self.dropouts:
            if dropout.training and dropout.p > 0:
                return f"dropout with p={dropout.p:g} is active in training"
        if self.drop_path is not None and self.drop_path.training and not self.draws_per_sample:
            return f"{type(self.drop_path).__name__} in training may be more than one factor a sample"
        return None

    def halves(self, x: Tensor) -> tuple[Half, Half]:
        """Both halves as they are now, with this call's stochastic-depth factors for x (B, S, C)."""
        token_scale, channel_scale = self._draw(x), self._draw(x)
        return self.token.half(token_scale), self.channel.half(channel_scale)

    def _draw(self, x: Tensor) -> Tensor | None:
        """The factors of each sample, (B, 1, 1), drawn as drop_path itself would; None for all ones.

        drop_path multiplies its input by one factor a sample, of the input's dtype. Applied to ones of the
        dtype that the MLP would have handed to it, it returns those very factors and leaves the random
        generator as the unfused block would leave it.
        """
        if self.drop_path is None or not self.drop_path.training or not isinstance(x, Tensor) or x.ndim == 0:
            return None
        dtype = product_dtype(x.device, self.token.fc2.weight.dtype)
        ones = torch.ones((x.shape[0], 1, 1), dtype=dtype, device=x.device)
        factors = self.drop_path(ones)
        return None if factors is ones else factors

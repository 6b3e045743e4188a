"""What a block consists of: the modules of its two halves, and whether they are still there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from fastmixer.blocks.state import Watch, parameters_of
from fastmixer.dtypes import product_dtype
from fastmixer.params import MixingParams

# Parameters swapped by torch.func.functional_call are plain tensors, by torch.export those of a trace; any
# other subclass (a quantised or a distributed tensor) is something whose storage a kernel may not read.
PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor, FunctionalTensor)

# Where a module keeps the hooks of its calls, and PyTorch, with "_global" before, those of all modules.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class HalfModules:
    """The modules of one half, ``norm``, ``fc1``, ``act``, ``fc2`` in the order of their use.

    fc1 and fc2 may be convolutions of kernel size 1, whose weight (N, K, 1) is used as (N, K) without a copy.
    act: None where the block's forward calls ``torch.nn.functional.gelu``. drop_path: the stochastic depth of
    this half's branch, or None. draws_per_sample: drop_path is known to scale each sample by one random
    factor, so that its draw can be taken apart from its product. replica: they are ``nn.DataParallel``'s.
    """

    norm: nn.LayerNorm
    fc1: nn.Linear | nn.Conv1d
    act: nn.GELU | None
    fc2: nn.Linear | nn.Conv1d
    drop_path: nn.Module | None = None
    draws_per_sample: bool = False
    replica: bool = False

    @property
    def width(self) -> int:
        """The features that fc1 takes and fc2 returns: S in the token half, C in the channel half."""
        return parameters_of(self.fc1)["weight"].shape[1]

    @property
    def hidden(self) -> int:
        """The hidden units, D or E."""
        return parameters_of(self.fc1)["weight"].shape[0]

    def params(self, residual_scale: Tensor | None = None) -> MixingParams:
        """The live parameters: read anew at each call, as ``to()`` or ``load_state_dict`` may swap them."""
        # Straight from the dict: nn.Module.__getattr__ would cost host time per parameter.
        norm, fc1, fc2 = self.norm._parameters, self.fc1._parameters, self.fc2._parameters
        if self.replica:
            norm, fc1, fc2 = parameters_of(self.norm), parameters_of(self.fc1), parameters_of(self.fc2)
        first, second = fc1["weight"], fc2["weight"]
        if first.ndim == 3:
            first = first.squeeze(-1)
        if second.ndim == 3:
            second = second.squeeze(-1)
        return MixingParams(
            norm["weight"],
            norm["bias"],
            first,
            fc1["bias"],
            second,
            fc2["bias"],
            self.norm.eps,
            self.approximate,
            residual_scale,
        )

    @property
    def approximate(self) -> str:
        """GELU's."""
        return "none" if self.act is None else self.act.approximate

    def parameters(self) -> Iterator[Tensor | None]:
        """The six parameters, None where there is none or where a name is no longer a parameter's."""
        for module in (self.norm, self.fc1, self.fc2):
            own = parameters_of(module)
            yield own.get("weight")
            yield own.get("bias")

    def draw(self, x: Tensor) -> Tensor | None:
        """The factors of each sample of x (B, S, C), (B, 1, 1), as drop_path draws them; None for all ones.

        drop_path multiplies its input by one factor per sample, of the input's dtype. Applied to ones of the
        dtype that the MLP would have handed to it, it returns those very factors and leaves the random
        generator as the unfused block would leave it.
        """
        if self.drop_path is None or not self.drop_path.training or not isinstance(x, Tensor) or x.ndim == 0:
            return None
        dtype = product_dtype(x.device, parameters_of(self.fc2)["weight"].dtype)
        ones = torch.ones((x.shape[0], 1, 1), dtype=dtype, device=x.device)
        factors = self.drop_path(ones)
        return None if factors is ones else factors


@dataclass(frozen=True, eq=False)
class Structure:
    """The modules of a block that fastmixer can compute.

    It holds no reference to the block itself, so keeping one on the block makes no reference cycle.

    Args:
        token, channel: the modules of the two halves.
        dropouts: every ``nn.Dropout`` inside.
        children: the block's own children.
        containers: every module inside that has children, with them.
        inner: every module inside, with its class.
        watch: the attributes and classes that the block's forward may read.
        size: tokens and channels, (S, C).
        ndim: axes of the input: 3 for (B, S, C); 4 for (B, V, S, C), which is computed as (B V, S, C).
    """

    token: HalfModules
    channel: HalfModules
    dropouts: tuple[nn.Dropout, ...]
    children: tuple[nn.Module | None, ...]
    containers: tuple[tuple[nn.Module, tuple[nn.Module | None, ...]], ...]
    inner: tuple[tuple[nn.Module, type], ...]
    watch: Watch
    size: tuple[int, int]
    ndim: int = 3

    def unchanged(self, block: nn.Module) -> bool:
        """Whether ``block`` still consists of just these modules, none hooked, patched or parametrised.

        And whether attributes and classes are what they were. Runs at every call of a fused block, so it only
        compares identities.
        """
        for container, children in ((block, self.children), *self.containers):
            state = container.__dict__
            if tuple(state["_modules"].values()) != children or state["_parameters"] or state["_buffers"]:
                return False
        for module, kind in self.inner:
            state = module.__dict__
            # A registered parametrization shows as a new class.
            if type(module) is not kind or "forward" in state:
                return False
            for hooks in HOOKS:
                if state[hooks]:
                    return False
        for half in (self.token, self.channel):
            for linear in (half.fc1, half.fc2):
                own = parameters_of(linear)
                if type(own.get("weight")) not in PLAIN_TENSORS or "bias" not in own:
                    return False
        return self.watch.unchanged(block)

    def unfused_now(self) -> str | None:
        """Why the block cannot be fused in its present mode (training or eval), or None if it can."""
        for dropout in self.dropouts:
            if dropout.training and dropout.p > 0:
                return "dropout is active in training"  # any rate: a trace would make each a program
        for half in (self.token, self.channel):
            drop_path = half.drop_path
            if drop_path is not None and drop_path.training and not half.draws_per_sample:
                return f"{type(drop_path).__name__} in training may be more than one factor per sample"
        return None

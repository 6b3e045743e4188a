"""What is measured: a case at one of the levels, as an eager module, the same one fused, and inputs for both.

The token half, the channel half and the block are cut out of timm's MixerBlock; the model is timm's MlpMixer.
The kernel level (``launches``) starts from a block.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import fastmixer
from fastmixer import configs, demo, timing
from fastmixer.blocks.model import ALIASES, MODELS
from fastmixer.dtypes import product_dtype
from fastmixer.ops import autograd
from fastmixer.ops.launch import Context, Launch
from fastmixer.params import MixingParams
from fastmixer.usage import UsageError, did_you_mean

from . import measure

CLASSES = 1000
# Inputs at most: a model's weights and activations flush L2 by themselves, and at level kernel every launch
# of every input is kept with all its buffers.
MOST_COPIES = {"model": 4, "kernel": 128}
AUTOCAST_DTYPE = torch.bfloat16

Names = Iterable[str]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model: S, C, D, E in words, the number of blocks, and the pixels of a patch's side."""

    tokens: int
    channels: int
    token_hidden: int
    channel_hidden: int
    blocks: int
    patch: int

    @property
    def image(self) -> int:
        return self.patch * math.isqrt(self.tokens)

    @property
    def ratios(self) -> tuple[float, float]:
        return self.token_hidden / self.channels, self.channel_hidden / self.channels


@dataclass(frozen=True)
class Case:
    """What is measured in one go. dtype: a torch dtype's name, or "autocast": fp32 tensors under autocast."""

    level: str
    model: str
    batch: int
    dtype: str
    direction: str
    shape: Shape

    @property
    def key(self) -> tuple:
        return self.level, self.model, self.batch, self.dtype, self.direction

    @property
    def trains(self) -> bool:
        return self.direction == "forward_backward"

    @property
    def x_dtype(self) -> torch.dtype:
        """Of activations and parameters."""
        return torch.float32 if self.dtype == "autocast" else getattr(torch, self.dtype)

    @property
    def product_dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return AUTOCAST_DTYPE if self.dtype == "autocast" else self.x_dtype

    @property
    def judged(self) -> tuple[str, ...] | None:
        """The tensors that the parity gate looks at; None for all.

        As in verify: of a deep model the gradients of inner weights carry the noise of all blocks above.
        """
        return ("output", "x") if self.level == "model" else None

    @property
    def halves(self) -> tuple[str, ...]:
        return (self.level,) if self.level in ("token", "channel") else ("token", "channel")

    @property
    def mlps(self) -> list[tuple[int, int]]:
        """Width and hidden units of each half's MLP."""
        shape = self.shape
        token, channel = (shape.tokens, shape.token_hidden), (shape.channels, shape.channel_hidden)
        return [token if half == "token" else channel for half in self.halves]

    @property
    def flops(self) -> int:
        """Of the matrix products; three times the forward's if it trains. Recomputed ones do not count."""
        S, C, p = self.shape.tokens, self.shape.channels, self.shape.patch
        forward = 4 * self.batch * S * C * sum(hidden for _, hidden in self.mlps)
        if self.level == "model":
            forward = self.shape.blocks * forward + 2 * self.batch * C * (S * 3 * p * p + CLASSES)
        return forward * (3 if self.trains else 1)

    @property
    def bytes(self) -> int:
        """What any implementation must at least read and write; ``schema.FOOTNOTES["bytes"]`` explains."""
        activation = self.batch * self.shape.tokens * self.shape.channels
        times = 5 if self.trains else 2
        elements = times * activation + (3 if self.trains else 1) * self.parameters
        if self.level == "model":
            images = 3 * self.batch * self.shape.image**2
            elements += times * (self.shape.blocks * activation + images)
        return self.x_dtype.itemsize * elements

    @property
    def parameters(self) -> int:
        C, p = self.shape.channels, self.shape.patch
        count = sum(2 * K * N + K + N + 2 * C for K, N in self.mlps)
        if self.level == "model":
            count = self.shape.blocks * count + C * (3 * p * p + 1) + 2 * C + CLASSES * (C + 1)
        return count


def make_cases(
    levels: Names, models: Names, batches: Iterable[int], dtypes: Names, directions: Names
) -> list[Case]:
    """Every combination once, one level after the other; models as for ``make_case``."""
    combinations = itertools.product(levels, directions, dtypes, models, batches)
    cases = (
        make_case(level, model, batch, dtype, direction)
        for level, direction, dtype, model, batch in combinations
    )
    return list(dict.fromkeys(cases))


def make_case(level: str, model: str, batch: int, dtype: str, direction: str) -> Case:
    """A case of one of the paper's models, as in ``fastmixer.blocks.model.MODELS``, or "B/16".

    Raises UsageError for an unknown model, with the nearest known ones.
    """
    return Case(level, ALIASES.get(model, model), batch, dtype, direction, shape_of(model))


def shape_of(name: str) -> Shape:
    """The sizes of one of the paper's models at 224 pixels; UsageError for any other name."""
    config = MODELS.get(ALIASES.get(name, name))
    if config is None:
        raise UsageError(f"models: unknown model {name!r}; {did_you_mean(name, [*MODELS, *ALIASES])}")
    tokens, C = (224 // config.patch_size) ** 2, config.embed_dim
    return Shape(tokens, C, C // 2, 4 * C, config.num_blocks, config.patch_size)


# ---- modules ---------------------------------------------------------------------------------------------


class EagerHalf(nn.Module):
    """One half of a timm MixerBlock, as the block's forward computes it. mixes: "token" or "channel"."""

    def __init__(self, block: nn.Module, mixes: str) -> None:
        super().__init__()
        self.mixes = mixes
        self.norm = block.norm1 if mixes == "token" else block.norm2
        self.mlp = block.mlp_tokens if mixes == "token" else block.mlp_channels

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        return x + (self.mlp(n) if self.mixes == "channel" else self.mlp(n.transpose(1, 2)).transpose(1, 2))

    def params(self) -> MixingParams:
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        return MixingParams(self.norm.weight, self.norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias,
                    self.norm.eps, self.mlp.act.approximate)  # fmt: skip


class FusedHalf(EagerHalf):
    """The same half, with the same parameters, by what ``fastmixer`` launches for it."""

    def forward(self, x: Tensor) -> Tensor:
        return mix(x, {self.mixes: self.params()})


def mix(
    x: Tensor, halves: dict[str, MixingParams], execute: Callable[[Launch], None] | None = None
) -> Tensor:
    """x after the halves, "token" and "channel", each by fastmixer's kernels, even where PyTorch is chosen.

    execute: called with each launch, instead of ``launch.execute``.
    """

    context = Context(configs.target_of(x.device))
    if execute:
        context = replace(context, execute=execute)
    dtype = product_dtype(x.device, next(iter(halves.values())).fc1_weight.dtype)
    return autograd.mix(x, halves, dtype, context, lean=fastmixer.current_memory() == "lean")


# ---- subjects --------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """One case made real: the eager and the fused module, whose parameters have the same names.

    items: what calls are given in turn: x, or where gradients are wanted (x, gradient of the output).
    draw: makes so many more items of fresh random numbers; the tensors of one call lie side by side.
    """

    case: Case
    eager: nn.Module
    fused: nn.Module
    items: list[measure.Item]
    draw: Callable[[int], list[measure.Item]]


def make_subject(case: Case, device: torch.device) -> Subject:
    """timm's module with random weights, biases and norms, the same fused, and L2-cold inputs.

    A case's numbers are the same in every run, whichever cases ran before it.
    """
    torch.manual_seed(0)
    eager = timm_model(case.shape) if case.level == "model" else timm_block(case.shape)
    demo.randomise(eager)
    eager = eager.to(device, case.x_dtype).train(case.trains)
    if case.level in ("token", "channel"):
        eager, fused = (half(eager, case.level).train(case.trains) for half in (EagerHalf, FusedHalf))
    else:
        fused = copy.deepcopy(eager)
        fastmixer.fuse(fused, strict=True)
    draw = partial(_draw, case, device)
    activation = case.batch * case.shape.tokens * case.shape.channels * case.x_dtype.itemsize
    copies = timing.cold_copies(activation * (2 if case.trains else 1), device)
    return Subject(case, eager, fused, draw(min(copies, MOST_COPIES.get(case.level, copies))), draw)


def timm_block(shape: Shape) -> nn.Module:
    from timm.models.mlp_mixer import MixerBlock

    return MixerBlock(shape.channels, shape.tokens, mlp_ratio=shape.ratios)


def timm_model(shape: Shape) -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(
        num_classes=CLASSES, img_size=shape.image, patch_size=shape.patch, num_blocks=shape.blocks,
        embed_dim=shape.channels, mlp_ratio=shape.ratios,
    )  # fmt: skip


def _draw(case: Case, device: torch.device, count: int) -> list[measure.Item]:
    shape = x_shape = (case.batch, case.shape.tokens, case.shape.channels)
    if case.level == "model":
        x_shape, shape = (case.batch, 3, case.shape.image, case.shape.image), (case.batch, CLASSES)

    # Under autocast the logits, and so their gradient, have autocast's dtype: autograd casts.
    shapes = (x_shape, shape) if case.trains else (x_shape,)
    drawn = [torch.randn(count, *each, device=device, dtype=case.x_dtype) for each in shapes]
    return list(zip(*drawn, strict=True)) if case.trains else list(drawn[0])


# ---- calls -----------------------------------------------------------------------------------------------


def make_call(module: nn.Module, case: Case, memory: str = "balanced") -> measure.Call:
    """What is timed of a module: a forward, or a forward and a backward.

    A forward gets x and returns the output. With a backward it gets (x, gradient of the output) and returns
    the output and every gradient by name; the parameters' ``grad`` is None before and after, so that calls
    are alike and keep nothing. memory: what ``fastmixer.memory`` is told.
    """

    def forward(x: Tensor) -> Tensor:
        with autocast(case, x.device):
            return module(x)

    if not case.trains:
        return forward
    # torch.compile puts a prefix before the names.
    parameters = {name.removeprefix("_orig_mod."): p for name, p in module.named_parameters()}

    def step(item: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x = item[0].detach().requires_grad_()
        try:
            with fastmixer.memory(memory):
                output = forward(x)
                torch.autograd.backward(output, item[1].to(output.dtype))
            gradients = {name: parameter.grad for name, parameter in parameters.items()}
            return {"output": output.detach(), "x": x.grad, **gradients}
        finally:  # after a failed backward too: the next call would add to what it left
            for parameter in parameters.values():
                parameter.grad = None

    return step


def autocast(case: Case, device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast where the case asks for it."""
    if case.dtype != "autocast":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPE)

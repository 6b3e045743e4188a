"""What to compile ahead of time: every launch of a block, forward and backward, for real shapes and variants.

The entries are recorded from ``launch`` itself on meta tensors, so what is compiled is what would run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import launch, launch_backward, launch_forward
from .configs import Target
from .half import Half
from .launch import Context, Launch, Moments
from .launch_backward import Needs


class BlockShape(NamedTuple):
    """S tokens, C channels, D token-MLP hidden, E channel-MLP hidden."""

    tokens: int
    channels: int
    token_hidden: int
    channel_hidden: int


# The paper's seven models (arXiv:2105.01601, table 1) at 224 x 224 pixels.
MODEL_BLOCKS = {
    "S/32": BlockShape(49, 512, 256, 2048),
    "S/16": BlockShape(196, 512, 256, 2048),
    "B/32": BlockShape(49, 768, 384, 3072),
    "B/16": BlockShape(196, 768, 384, 3072),
    "L/32": BlockShape(49, 1024, 512, 4096),
    "L/16": BlockShape(196, 1024, 512, 4096),
    "H/14": BlockShape(256, 1280, 640, 5120),
}


@dataclass(frozen=True)
class Case:
    """A block whose launches are compiled: its shape and the options that change the code."""

    name: str
    shape: BlockShape
    dtype: torch.dtype = torch.bfloat16
    x_dtype: torch.dtype | None = None  # None: dtype
    approximate: str = "none"
    bias: bool = True
    scale: bool = False
    tf32: bool = False
    training: bool = True  # the backward too

    @property
    def label(self) -> str:
        parts = [self.name, str(self.dtype).removeprefix("torch.")]
        if self.x_dtype is not None:
            parts.append(f"x {str(self.x_dtype).removeprefix('torch.')}")
        parts += [self.approximate] * (self.approximate != "none") + ["no bias"] * (not self.bias)
        return " ".join(parts + ["scale"] * self.scale + ["tf32"] * self.tf32)


B16 = MODEL_BLOCKS["B/16"]
CASES = [
    *(
        Case(name, shape, training=name in ("S/16", "B/32", "B/16", "H/14"))
        for name, shape in MODEL_BLOCKS.items()
    ),
    Case("B/16", B16, torch.float16),
    Case("B/16", B16, torch.float32),
    Case("B/16", B16, torch.float32, tf32=True),
    Case("B/16", B16, x_dtype=torch.float32),  # autocast
    Case("B/16", B16, approximate="tanh", scale=True),
    Case("B/32", MODEL_BLOCKS["B/32"], torch.float16, approximate="tanh", bias=False),
    Case("B/16 at 448 px", BlockShape(784, 768, 384, 3072)),
    Case("B/16 at 448 px", BlockShape(784, 768, 384, 3072), x_dtype=torch.float32),
    Case("multiples of 8", BlockShape(196, 200, 104, 808), training=False),
    Case("odd", BlockShape(50, 99, 75, 201), scale=True),
]


@dataclass(frozen=True)
class Entry:
    """One launch to compile; ``label`` is the kernel and the case."""

    label: str
    launch: Launch


def catalogue(target: Target, batch: int = 64) -> Iterator[Entry]:
    """The launches of every case, as ``target`` would run them, packing included."""
    for case in CASES:
        recorded = [(item, "") for item in record(case, target, batch)]
        if case.training:
            recorded += record_training(case, target, batch)
        for item, variant in recorded:
            kernel = item.kernel.__name__.strip("_").removesuffix("_kernel") + variant
            yield Entry(f"{kernel} {case.label}", item)


def record(case: Case, target: Target, batch: int) -> list[Launch]:
    """The launches of one case's forward, in order, on meta tensors."""
    launches: list[Launch] = []
    context = Context(target, execute=launches.append)
    x, token, channel = _block(case, batch)
    with _tf32(case.tf32):
        y, moments = launch_forward.token_mixing(x, token, case.dtype, context)
        launch_forward.channel_mixing(y, channel, case.dtype, context, moments)
    return launches


def record_training(case: Case, target: Target, batch: int) -> Iterator[tuple[Launch, str]]:
    """What training launches besides, in both memory modes: each launch, and the variant of its kernel.

    Variants: the fc1 that keeps the pre-activation, and the backward through GELU that recomputes it.
    """
    launches: list[Launch] = []
    context = Context(target, execute=launches.append)
    x, token, channel = _block(case, batch)
    needs = Needs(True, *(parameter is not None for parameter in token[:6]))
    with _tf32(case.tf32):
        y, moments = launch_forward.token_mixing(x, token, case.dtype, context)
        p = launch.empty_hidden(batch * case.shape.tokens, case.shape.channel_hidden, case.dtype, x.device)
        launches.clear()
        launch_forward.channel_mixing(y, channel, case.dtype, context, moments, p=p)
        yield next(item for item in launches if item.kernel is launch.kernels().fc1), " keeping P"
        x_moments = Moments(torch.empty_like(moments.values[:1]), case.shape.channels)
        launches.clear()
        launch_backward.token_mixing(y, x, x_moments, None, token, case.dtype, context, needs)
        for kept in (p, None):
            launch_backward.channel_mixing(y, y, moments, kept, channel, case.dtype, context, needs)
    # What both modes have in common, and packing, is compiled once and need not be listed again.
    seen = set()
    for item in launches:
        recomputes = item.kernel is launch.kernels().mlp_hidden_bwd and item.args["p_ptr"] is None
        name = item.kernel.__name__, recomputes, item.args.get("NUM_BLOCKS")
        if name not in seen and item.kernel is not launch.kernels().pack_linear:
            seen.add(name)
            yield item, " recomputing P" if recomputes else ""


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's own switch for products of fp32."""
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def _block(case: Case, batch: int) -> tuple[Tensor, Half, Half]:
    S, C, D, E = case.shape
    x = torch.empty((batch, S, C), dtype=case.x_dtype or case.dtype, device="meta")
    return x, _half(case, S, D, batch), _half(case, C, E, batch)


def _half(case: Case, width: int, hidden: int, batch: int) -> Half:
    def tensor(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    C = case.shape.channels
    norm = torch.float32 if case.x_dtype == torch.float32 else case.dtype
    return Half(
        tensor(C, dtype=norm),
        tensor(C, dtype=norm) if case.bias else None,
        tensor(hidden, width),
        tensor(hidden) if case.bias else None,
        tensor(width, hidden),
        tensor(width) if case.bias else None,
        approximate=case.approximate,
        residual_scale=tensor(batch, dtype=torch.float32) if case.scale else None,
    )

"""What to compile ahead of time: every launch of a block, forward and backward, for real shapes and variants.

The entries are recorded from ``launch`` itself on meta tensors, so what is compiled is what would run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastmixer.configs import Choice, Library, Problem, Target, select_kernels
from fastmixer.configs.ops import OPS, TUNED
from fastmixer.ops import channel_mixing, launch, packing, token_mixing
from fastmixer.ops.launch import Context, Launch
from fastmixer.ops.row_moments import joined
from fastmixer.params import MixingParams, Needs


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
    Case("B/16", B16, torch.float32, tf32=True, training=False),
    Case("B/16", B16, x_dtype=torch.float32),  # autocast
    Case("B/16", B16, approximate="tanh", scale=True),
    Case("B/32", MODEL_BLOCKS["B/32"], torch.float16, approximate="tanh", bias=False, training=False),
    Case("B/16 at 448 px", BlockShape(784, 768, 384, 3072)),
    Case("B/16 at 448 px", BlockShape(784, 768, 384, 3072), x_dtype=torch.float32, training=False),
    Case("multiples of 8", BlockShape(196, 200, 104, 808), training=False),
    Case("odd", BlockShape(50, 99, 75, 201), scale=True),
]


# Why a kernel leaves Hopper's wgmma, lets its products wait for each other or spills in a loop: the first of
# these patterns that its label matches.
EXCEPTIONS = (
    (r" x float32", "the wide operand is normalised in registers, and the product waits for it"),
    (r"^token_mixing.* float32 tf32", "untuned tiles of 16 x 16: wgmma needs 64 rows"),
    (r" float32$", "fp32 without TF32 multiplies on ordinary cores"),
    (r"^token_mixing_fwd multiples of 8", "channels that are no multiple of 16 are loaded by the element"),
    (r"^fc1_fwd.* 448 px", "the operand is normalised in registers, and the product waits for it"),
)


def exception(label: str, row: dict) -> str | None:
    """Why a compiled kernel on sm_90 is not what it could be: None if it is, "" if nobody knows.

    row: ``Compiled.as_row()`` of the entry ``label``, and whether its kernel "multiplies" matrices.
    """
    on_wgmma = row["hgmma"] and not row["hmma"]
    if not row["multiplies"] or (on_wgmma and not row["serialised"] and not row["loop_spills"]):
        return None
    return next((reason for pattern, reason in EXCEPTIONS if re.search(pattern, label)), "")


@dataclass(frozen=True)
class Entry:
    """One launch to compile; ``label`` is the kernel and the case."""

    label: str
    launch: Launch

    @property
    def multiplies(self) -> bool:
        """Whether its kernel has matrix products."""
        kernels = vars(launch.kernels())
        return any(self.launch.kernel is kernels[OPS[op].kernel] for op in TUNED)


def catalogue(target: Target, batch: int = 64) -> Iterator[Entry]:
    """The launches of every case, as ``target`` would run them, packing included."""
    for case in CASES:
        recorded = [(item, "") for item in record(case, target, batch)]
        if case.training:
            recorded += record_training(case, target, batch)
            recorded += [(item, "") for item in record_library(case, target, batch)]
        for item, variant in recorded:
            kernel = item.kernel.__name__.strip("_").removesuffix("_kernel") + variant
            yield Entry(f"{kernel} {case.label}", item)


def record(case: Case, target: Target, batch: int) -> list[Launch]:
    """The launches of one case's forward, in order, on meta tensors."""
    launches: list[Launch] = []
    context = Context(target, select=select_kernels, execute=launches.append)
    x, token, channel = _block(case, batch)
    with _tf32(case.tf32):
        context = packing.pack_forward(x, {"token": token, "channel": channel}, case.dtype, context)
        y, moments = token_mixing.forward(x, token, case.dtype, context)
        channel_mixing.forward(y, channel, case.dtype, context, moments)
    return launches


def record_training(case: Case, target: Target, batch: int) -> Iterator[tuple[Launch, str]]:
    """What training launches besides, in both memory modes: each launch, and the variant of its kernel.

    Variants: the fc1 that keeps the pre-activation, and the backward through GELU that recomputes it.
    """
    launches: list[Launch] = []
    context = Context(target, select=select_kernels, execute=launches.append)
    x, token, channel = _block(case, batch)
    needs = Needs(True, *(parameter is not None for parameter in token[:6]))
    with _tf32(case.tf32):
        y, moments = token_mixing.forward(x, token, case.dtype, context)
        p = launch.empty_hidden(batch * case.shape.tokens, case.shape.channel_hidden, case.dtype, x.device)
        launches.clear()
        joined(moments, case.shape.channels, context)  # for a trace
        yield from ((item, "") for item in launches)
        launches.clear()
        channel_mixing.forward(y, channel, case.dtype, context, moments, p=p)
        yield next(item for item in launches if item.kernel is launch.kernels().fc1), " keeping P"
        x_moments = torch.empty_like(moments[:1])
        launches.clear()
        token_mixing.backward(y, x, x_moments, token, case.dtype, context, needs)
        for kept in (p, None):
            channel_mixing.backward(y, y, moments, channel, case.dtype, context, needs, p=kept)
    # What both modes have in common, and packing, is compiled once and need not be listed again.
    seen = set()
    for item in launches:
        if item.kernel is launch.kernels().pack_weights:
            continue
        variant = _variant(item)
        name = item.kernel.__name__, variant, item.args.get("NUM_BLOCKS")
        if name not in seen:
            seen.add(name)
            yield item, variant


def record_library(case: Case, target: Target, batch: int) -> list[Launch]:
    """What is left to launch in the channel half where PyTorch makes its products: a pass after each."""
    launches: list[Launch] = []

    def choose(op: str, problem: Problem, target: Target) -> Choice:
        return Library.ATEN if op.startswith("channel_fc") else select_kernels(op, problem, target)

    x, _, channel = _block(case, batch)
    channel_mixing.forward(x, channel, case.dtype, Context(target, None, choose, launches.append))
    passes = launch.kernels().gelu_fwd, launch.kernels().residual_fwd
    return [item for item in launches if any(item.kernel is kernel for kernel in passes)]


def _variant(item: Launch) -> str:
    """Which of a backward kernel's variants a launch is, for its label."""
    if "p_ptr" in item.args and "db1_ptr" in item.args and item.args["p_ptr"] is None:
        return " recomputing P"
    if "dw1_ptr" in item.args:
        wanted = [name for name in ("dw1", "dw2") if item.args[f"{name}_ptr"] is not None]
        return "" if len(wanted) == 2 else f" of {wanted[0]}"
    return ""


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    """PyTorch's own switch for products of fp32."""
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def _block(case: Case, batch: int) -> tuple[Tensor, MixingParams, MixingParams]:
    S, C, D, E = case.shape
    x = torch.empty((batch, S, C), dtype=case.x_dtype or case.dtype, device="meta")
    return x, _params(case, S, D, batch), _params(case, C, E, batch)


def _params(case: Case, width: int, hidden: int, batch: int) -> MixingParams:
    def tensor(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    C = case.shape.channels
    norm = torch.float32 if case.x_dtype == torch.float32 else case.dtype
    return MixingParams(
        tensor(C, dtype=norm),
        tensor(C, dtype=norm) if case.bias else None,
        tensor(hidden, width),
        tensor(hidden) if case.bias else None,
        tensor(width, hidden),
        tensor(width) if case.bias else None,
        approximate=case.approximate,
        residual_scale=tensor(batch, dtype=torch.float32) if case.scale else None,
    )

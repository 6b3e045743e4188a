"""What to compile ahead of time: every launch of a block, forward and backward, for real shapes and variants.

The entries are recorded from ``launch`` itself on meta tensors, so what is compiled is what would run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmixer.aot.recording import meta, meta_params, needs_of, recording
from fastmixer.configs import (
    ONE_PASS_TOKENS,
    Choice,
    Library,
    Problem,
    Target,
    TileConfig,
    cdiv,
    designs_of,
    select_kernels,
)
from fastmixer.configs.designs import DESIGNS, RULE
from fastmixer.configs.models import MODEL_BLOCKS, MODELS, BlockShape
from fastmixer.configs.ops import OPS
from fastmixer.configs.resources import Resources
from fastmixer.ops import autograd, channel_mixing, launch, token_mixing
from fastmixer.ops.launch import Launch
from fastmixer.ops.row_moments import joined
from fastmixer.params import MixingParams


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
B16_AT_448 = MODELS["mixer_b16_224"].block_shape(448)
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
    Case("B/16 at 240 px", BlockShape(225, 768, 384, 3072)),  # 256 padded tokens with b1 among them
    Case("B/16 at 240 px", BlockShape(225, 768, 384, 3072), bias=False),
    Case("B/16 at 448 px", B16_AT_448),
    Case("B/16 at 448 px", B16_AT_448, x_dtype=torch.float32, training=False),
    Case("multiples of 8", BlockShape(196, 200, 104, 808), training=False),
    Case("odd", BlockShape(50, 99, 75, 201), scale=True),
]


# Labels of cases that every design is compiled for: of the channel half's products, or of long sequences.
WITH_DESIGNS = ("B/16 bfloat16", "B/16 float16", "B/16 at 448 px bfloat16")


# Why a kernel leaves Hopper's wgmma or is not clean (``Resources.is_clean``): the first of these patterns
# that its label matches.
EXCEPTIONS = (
    (r" x float32", "the wide operand is normalised in registers, and the product waits for it"),
    (r"^token_.* float32 tf32", "untuned tiles of 16 x 16: wgmma needs 64 rows"),
    (r" float32$", "fp32 without TF32 multiplies on ordinary cores"),
    (r"^fc1.* 448 px", "the operand is normalised in registers, and the product waits for it"),
)


def exception(label: str, row: dict) -> str | None:
    """Why a compiled kernel on sm_90 is not on wgmma and clean: None if it is, "" if nobody knows.

    row: of ``compile.compile_launch`` for the entry ``label``, and whether its kernel "multiplies" matrices.
    """
    if not row["multiplies"]:
        return None
    op = next(name for name, op in OPS.items() if op.kernel == label.split()[0])
    if row["hgmma"] and not row["hmma"] and Resources.of(row).is_clean(op):
        return None
    return next((reason for pattern, reason in EXCEPTIONS if re.search(pattern, label)), "")


def catalogue(target: Target, batch: int = 64) -> Iterator[tuple[str, Launch]]:
    """The launches of every case, as ``target`` would run them, packing included, by kernel and case."""
    for case in CASES:
        launches = record(case, target, batch)
        if case.training:
            launches += record_training(case, target, batch) + record_library(case, target, batch)
        for item in launches:
            yield f"{variant(item)} {case.label}", item
        if case.label in WITH_DESIGNS:
            for name, item in record_designs(case, target, batch):
                yield f"{variant(item)} {case.label} {name}", item


def variant(item: Launch) -> str:
    """The kernel's name and which variant of it is launched.

    Variants are fc1 that stores the pre-activation p, or ones in the hidden's padding, the backward through
    GELU that recomputes p, and the gradient of one weight alone.
    """
    name, args = item.kernel_name, item.args
    if name == "fc1" and args["p_ptr"] is not None:
        return f"{name} storing p"
    if name == "fc1" and args["ONES"]:
        return f"{name} with ones"
    if name == "mlp_hidden_bwd" and args["p_ptr"] is None:
        return f"{name} recomputing p"
    if name == "token_wgrad" and args["dw1_ptr"] is None:
        return f"{name} of dw2"
    if name == "token_wgrad" and args["dw2_ptr"] is None:
        return f"{name} of dw1"
    return name


def record(case: Case, target: Target, batch: int) -> list[Launch]:
    """The launches of one case's forward, in order."""
    x, token, channel = _block(case, batch)
    with recording(target, tf32=case.tf32) as (context, launches):
        autograd.mix(x, {"token": token, "channel": channel}, case.dtype, context)
    return launches


def record_training(case: Case, target: Target, batch: int) -> list[Launch]:
    """What training launches besides, in both memory modes: every kernel and variant once.

    Without packing and fc2, which are in ``record``. Another number of blocks of moments is a variant too.
    """
    x, token, channel = _block(case, batch)
    needs = needs_of(token)
    with recording(target, tf32=case.tf32) as (context, launches):
        y, moments = token_mixing.forward(x, token, case.dtype, context)
        launches.clear()  # it is in ``record``
        joined(moments, case.shape.channels, context)  # for a trace
        p = launch.empty_hidden(batch * case.shape.tokens, case.shape.channel_hidden, case.dtype, x.device)
        channel_mixing.forward(y, channel, case.dtype, context, moments, p=p)
        token_mixing.backward(y, x, torch.empty_like(moments[:1]), token, case.dtype, context, needs)
        for kept in (p, None):
            channel_mixing.backward(y, y, moments, channel, case.dtype, context, needs, p=kept)
    distinct: dict[tuple, Launch] = {}
    for item in launches:
        if item.kernel_name not in ("pack_weights", "fc2"):
            distinct.setdefault((variant(item), item.args.get("NUM_BLOCKS")), item)
    return list(distinct.values())


def record_library(case: Case, target: Target, batch: int) -> list[Launch]:
    """What the channel half launches beside products of PyTorch's: a pass after each, and fc1 for ADDMM."""
    x, _, channel = _block(case, batch)
    distinct: dict[str, Launch] = {}
    for products in (
        {"channel_fc1": Library.ATEN, "channel_fc2": Library.ATEN},
        {"channel_fc2": Library.ADDMM},
    ):

        def choose(op: str, problem: Problem, target: Target, own: dict = products) -> Choice:
            return own.get(op) or select_kernels(op, problem, target)

        with recording(target, choose) as (context, launches):
            channel_mixing.forward(x, channel, case.dtype, context)
        distinct |= {variant(item): item for item in launches}
    return [distinct[name] for name in ("gelu_fwd", "residual_fwd", "fc1 with ones") if name in distinct]


def record_designs(case: Case, target: Target, batch: int) -> list[tuple[str, Launch]]:
    """The launches of one half by every design with tiles of its own, by its name; fc1 with p too.

    Of the token half where the sequence is too long for one pass, else of the channel half.
    """
    S, C, D, E = case.shape
    long = S > ONE_PASS_TOKENS
    half, mixing, hidden = ("token", token_mixing, D) if long else ("channel", channel_mixing, E)
    problem = Problem(batch, S, C, hidden, case.x_dtype or case.dtype, case.dtype)
    x, *params = _block(case, batch)
    own = params[not long]
    moments = meta(1 if long else cdiv(C, 128), 2, batch * S)
    p = None if long else launch.empty_hidden(batch * S, E, case.dtype, x.device)
    found: list[tuple[str, Launch]] = []
    for op in (op for op in DESIGNS if OPS[op].half == half):
        for name, runs in designs_of(op, problem, target).items():
            if name == RULE or not isinstance(runs, TileConfig):
                continue

            def choose(one: str, problem: Problem, target: Target, op=op, runs=runs) -> Choice:
                return runs if one == op else select_kernels(one, problem, target)

            with recording(target, choose) as (context, launches):
                given = own, case.dtype, context
                kept = {} if p is None else {"p": None if OPS[op].products == 2 else p}
                if OPS[op].direction == "backward":
                    mixing.backward(x, x, moments, *given, needs_of(own), **kept)
                else:
                    mixing.forward(x, *given, moments, **kept)
                    mixing.forward(x, *given, moments)
            launched = {variant(item): item for item in launches if item.kernel_name == OPS[op].kernel}
            found += [(name, item) for item in launched.values()]
    return found


def _block(case: Case, batch: int) -> tuple[Tensor, MixingParams, MixingParams]:
    """x and the parameters of both halves."""
    S, C, D, E = case.shape
    x_dtype = case.x_dtype or case.dtype
    token, channel = (
        meta_params(
            half, Problem(batch, S, C, hidden, x_dtype, case.dtype),
            bias=case.bias, scale=case.scale, approximate=case.approximate,
        )
        for half, hidden in (("token", D), ("channel", E))
    )  # fmt: skip
    return meta(batch, S, C, dtype=x_dtype), token, channel

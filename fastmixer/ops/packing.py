"""Packing: which linear layers a half's kernels read in another layout, and the one launch that makes them.

What is packed belongs to one call: it is made of the weights as they are then, and freed behind it. Only
``freeze`` keeps it (``blocks/freezing.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import Library, Problem, cdiv, next_power_of_2, round_up
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Context, kernels, problem_of, run
from fastmixer.ops.layouts import Layout, Layouts, PackedLinear
from fastmixer.params import MixingParams


def pack(layouts: Layouts, context: Context) -> dict[str, PackedLinear]:
    """Every layer as its layout says: as it lies, as it was kept, or packed, all of these in one launch."""
    kept = context.kept
    packed = {
        role: layout.as_it_lies() or (kept and kept.get(role, layout)) for role, layout in layouts.items()
    }
    missing = {role: layouts[role] for role, layer in packed.items() if layer is None}
    made = _launch(missing, context) if missing else {}
    if kept is not None:
        for role, layout in missing.items():
            kept.keep(role, layout, made[role])
    return packed | made


def pack_forward(
    x: Tensor, halves: Mapping[str, MixingParams], dtype: torch.dtype, context: Context
) -> Context:
    """The context with all that the forward of the halves reads, by "token" and "channel": one launch."""
    layouts: Layouts = {}
    for half, params in halves.items():
        layouts |= forward_layouts(half, params.with_dense_vectors(), problem_of(x, params, dtype), context)
    return replace(context, packed=pack(layouts, context))


def pack_half(half: str, params: MixingParams, problem: Problem, context: Context) -> dict[str, PackedLinear]:
    """What the forward of one half reads, where it was not packed for the whole block."""
    return pack(forward_layouts(half, params, problem, context), context)


def forward_layouts(half: str, params: MixingParams, problem: Problem, context: Context) -> Layouts:
    """The layers of the forward of ``half``, "token" or "channel"."""
    if half == "token":
        tiles = context.select("token_mixing", problem, context.target)
        if tiles is not None:
            # 16-bit only: TF32 would round the bias on its way through the product.
            spare = sum(configs.token_pieces(problem.tokens)) >= problem.tokens + 2
            in_padding = params.fc1_bias is not None and problem.dtype.itemsize == 2 and spare
            return _one_pass(params, problem, tiles.block_n, bias_in_padding=in_padding)
    elif folds(problem) and context.select("channel_fc1", problem, context.target) is not Library.ATEN:
        fc1 = Layout(
            params.fc1_weight, params.fc1_bias, problem.dtype, norm=(params.norm_weight, params.norm_bias)
        )
        return _plain(half, params, problem) | {"channel_fc1": fc1}
    return _plain(half, params, problem)


def backward_layouts(
    half: str, params: MixingParams, problem: Problem, context: Context, *, fc1: bool = True
) -> Layouts:
    """The layers of the backward, whose operand is LN(x); fc1: whether that one is read at all.

    No bias in the padding: it would meet zeros, and an infinite one make them NaN.
    """
    if half == "token" and context.select("token_dgrad", problem, context.target) is not None:
        # Powers of two: the largest is a multiple of the others.
        blocks = [context.select(op, problem, context.target).block_n for op in configs.ONE_PASS[1:]]
        return _one_pass(params, problem, max(blocks))
    return _plain(half, params, problem, fc1=fc1)


def folds(problem: Problem) -> bool:
    """Whether fc1 of the channel half runs on the raw x, with LayerNorm folded into its weight.

    Folding rounds the raw x to the compute dtype. In a 16-bit x nothing is lost by that; an fp32 x would lose
    digits as |mean| / std grows: there the operand is normalised before it is rounded.
    """
    return problem.x_dtype == problem.dtype and problem.dtype.itemsize == 2


def _one_pass(
    params: MixingParams, problem: Problem, block_d: int, *, bias_in_padding: bool = False
) -> Layouts:
    """fc1 (D_PAD, S_PAD), fc2 (S_PAD, D_PAD): the pieces of the token axis, whole blocks of hidden units."""
    s_pad, d_pad = sum(configs.token_pieces(problem.tokens)), round_up(problem.hidden, block_d)
    fc1 = Layout(
        params.fc1_weight, params.fc1_bias, problem.dtype, (d_pad, s_pad), bias_in_padding=bias_in_padding
    )
    return {"token_fc1": fc1, "token_fc2": Layout(params.fc2_weight, None, problem.dtype, (s_pad, d_pad))}


def _plain(half: str, params: MixingParams, problem: Problem, *, fc1: bool = True) -> Layouts:
    """As they are, but for rows that are not aligned and another dtype."""
    layouts = {f"{half}_fc2": Layout(params.fc2_weight, params.fc2_bias, problem.dtype)}
    return layouts | (
        {f"{half}_fc1": Layout(params.fc1_weight, params.fc1_bias, problem.dtype)} if fc1 else {}
    )


def _launch(layouts: Layouts, context: Context) -> dict[str, PackedLinear]:
    codes, packed, layers, options, programs = kernels().pack, {}, [], [], 0
    gamma = beta = None
    dtype, device = next((layout.dtype, layout.weight.device) for layout in layouts.values())  # of them all
    acc = accumulate_dtype(dtype)
    for role, layout in layouts.items():
        weight, bias, (n_pad, k_pad) = layout.weight, layout.bias, layout.packed_shape
        bias_to = fold = codes.PLAIN
        if layout.norm is not None:
            gamma, beta = layout.norm
            # bfloat16 has the range of float32, in which the products are summed.
            fold = codes.FOLD_SCALED if dtype == torch.float16 else codes.FOLD
        if layout.bias_in_padding:
            bias_to = codes.BIAS_IN_PADDING
        elif (bias is not None and (fold or layout.shape)) or (fold and beta is not None):
            bias_to = codes.BIAS

        def vector(wanted: bool, size: int = n_pad) -> Tensor | None:
            return torch.empty(size, dtype=acc, device=device) if wanted else None

        written = (
            vector(bias_to == codes.BIAS),
            vector(fold != codes.PLAIN),
            vector(fold == codes.FOLD_SCALED),
        )
        data = torch.empty((n_pad, k_pad), dtype=dtype, device=device)
        packed[role] = PackedLinear(data, bias if bias_to == codes.PLAIN else written[0], *written[1:])
        pointers = (weight if t is None else t for t in (weight, bias, data, *written))
        layers.append((*pointers, *weight.shape, n_pad, k_pad, *weight.stride()))
        block_k = min(next_power_of_2(k_pad), 1024)
        block_n = 256 if context.target.backend == "interpreter" else max(1, 2048 // block_k)
        options.append((bias is not None, bias_to, fold, block_n, block_k))
        programs += cdiv(n_pad, block_n)
    run(
        context, kernels().pack_weights, programs, layers=tuple(layers), gamma_ptr=gamma, beta_ptr=beta,
        OPTIONS=tuple(options), ACC=kernels().dtype[acc],
    )  # fmt: skip
    return packed

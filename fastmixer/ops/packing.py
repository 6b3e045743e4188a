"""Packing: which linear layers a half's kernels read in another layout, and the one launch that makes them.

What is packed belongs to one call: it is made of the weights as they are then, and freed behind it. Only
``freeze`` keeps it (``blocks/freezing.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import Library, cdiv, round_up
from fastmixer.configs.ops import ONE_PASS_BACKWARD, libraries
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import (
    Call,
    Context,
    accumulator,
    context_of,
    dense_vectors,
    kernels,
    padded_hidden,
    pass_tile,
    problem_of,
    run,
)
from fastmixer.ops.layouts import Kept, Layout, Layouts, PackedLinear
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
) -> dict[str, PackedLinear]:
    """All that the forward of the halves, "token" and "channel", reads, by role: in one launch."""
    layouts: Layouts = {}
    for half, params in halves.items():
        call = Call(half, dense_vectors(params, context), problem_of(x, params, dtype), context)
        layouts |= forward_layouts(call)
    return pack(layouts, context)


def roles(halves: Iterable[str]) -> list[str]:
    """The layers of these halves, in order."""
    return [f"{half}_{layer}" for half in halves for layer in ("fc1", "fc2")]


def kept_layers(
    x: Tensor, halves: Mapping[str, MixingParams], dtype: torch.dtype, kept: Kept, *, kernels_only: bool
) -> list[Tensor | None]:
    """What the forward of the halves reads, the fields of each ``PackedLinear``; kept from now on."""
    context = context_of(x.device, kept, kernels_only=kernels_only)
    with torch.no_grad():
        packed = pack_forward(x, halves, dtype, context)
    return [tensor for role in roles(halves) for tensor in packed[role]]


def forward_layers(call: Call) -> tuple[PackedLinear, PackedLinear]:
    """fc1 and fc2 as the forward reads them; packed here where they were not for the whole block."""
    packed = call.context.packed or pack(forward_layouts(call), call.context)
    return packed[f"{call.half}_fc1"], packed[f"{call.half}_fc2"]


def backward_layers(call: Call, *, fc1: bool = True) -> tuple[PackedLinear | None, PackedLinear]:
    """fc1 and fc2 as the backward reads them, whose operand is LN(x); fc1: whether that one is read at all.

    No bias in the padding: it would meet zeros, and an infinite one make them NaN.
    """
    if call.half == "token" and call.tiles("token_dgrad") is not None:
        # Powers of two: the largest is a multiple of the others.
        layouts = _one_pass(call, max(call.tiles(op).block_n for op in ONE_PASS_BACKWARD))
        layouts["token_fc2"] = layouts["token_fc2"]._replace(bias=None)
    else:
        layouts = _plain(call, fc1=fc1)
    packed = pack(layouts, call.context)
    return packed.get(f"{call.half}_fc1"), packed[f"{call.half}_fc2"]


def forward_layouts(call: Call) -> Layouts:
    """The layers of the forward."""
    params, problem = call.params, call.problem
    if call.half == "token":
        tiles = call.tiles("token_mixing")
        if tiles is not None:
            # 16-bit only: TF32 would round the bias on its way through the product.
            spare = sum(configs.token_pieces(problem.tokens)) >= problem.tokens + 2
            in_padding = params.fc1_bias is not None and problem.dtype.itemsize == 2 and spare
            return _one_pass(call, tiles.block_n, bias_in_padding=in_padding)
        return _plain(call)
    # Where LayerNorm is folded into the weight, the raw x is rounded to the products' dtype. In a 16-bit x
    # nothing is lost by that; an fp32 x would lose digits as |mean| / std grows.
    folds = problem.x_dtype == problem.dtype and problem.dtype.itemsize == 2
    by_library, ones = isinstance(call.tiles("channel_fc1"), Library), carries_bias(call)
    layouts = _plain(call, norm=(params.norm_weight, params.norm_bias) if folds and not by_library else None)
    columns = padded_hidden(problem.hidden, ones=ones)
    if by_library and columns != problem.hidden:
        # Rows of zeros for the hidden's padding: cuBLASLt's epilogues write whole tensors only.
        shape = columns, round_up(problem.channels, configs.ALIGNED)
        layouts["channel_fc1"] = layouts["channel_fc1"]._replace(shape=shape)
    if ones:
        padded = dict(shape=(problem.channels, columns), bias_in_padding=True)
        layouts["channel_fc2"] = layouts["channel_fc2"]._replace(**padded)
    return layouts


def adds_to_residual(call: Call) -> bool:
    """Whether fc2 of the channel half is a product that PyTorch adds to x: ``ADDMM``, where that serves.

    A bias goes through the product, which must not round it to TF32.
    """
    choice, params = call.tiles("channel_fc2"), call.params
    serves = choice is Library.ADDMM and choice in libraries("channel_fc2", call.problem)
    if not serves or params.residual_scale is not None:
        return False
    return params.fc2_bias is None or call.product_constants()["INPUT_PRECISION"] != "tf32"


def carries_bias(call: Call) -> bool:
    """Whether there are ones in the hidden's padding for fc2's bias in the padding of its weight."""
    return adds_to_residual(call) and call.params.fc2_bias is not None


def _one_pass(call: Call, block_d: int, *, bias_in_padding: bool = False) -> Layouts:
    """fc1 (D_PAD, S_PAD), fc2 (S_PAD, D_PAD): the pieces of the token axis, whole blocks of hidden units.

    fc2's bias (S_PAD,): kernels mask nothing of it.
    """
    params, problem, dtype = call.params, call.problem, call.problem.dtype
    s_pad, d_pad = sum(configs.token_pieces(problem.tokens)), round_up(problem.hidden, block_d)
    fc1 = Layout(params.fc1_weight, params.fc1_bias, dtype, (d_pad, s_pad), bias_in_padding=bias_in_padding)
    fc2 = Layout(params.fc2_weight, params.fc2_bias, dtype, (s_pad, d_pad))
    return {"token_fc1": fc1, "token_fc2": fc2}


def _plain(
    call: Call, *, fc1: bool = True, norm: tuple[Tensor | None, Tensor | None] | None = None
) -> Layouts:
    """As they are, but for rows that are not aligned and another dtype; ``norm`` as ``Layout`` has it."""
    params, dtype = call.params, call.problem.dtype
    layouts = {f"{call.half}_fc2": Layout(params.fc2_weight, params.fc2_bias, dtype)}
    if fc1:
        layouts[f"{call.half}_fc1"] = Layout(params.fc1_weight, params.fc1_bias, dtype, norm=norm)
    return layouts


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
            fold = codes.FOLD_PER_ROW if dtype == torch.float16 else codes.FOLD_CONSTANT
        if layout.bias_in_padding:
            bias_to = codes.BIAS_IN_PADDING
        elif (bias is not None and (fold or layout.shape)) or (fold and beta is not None):
            bias_to = codes.BIAS

        wanted = bias_to == codes.BIAS, fold != codes.PLAIN, fold == codes.FOLD_PER_ROW
        written = [torch.empty(n_pad, dtype=acc, device=device) if flag else None for flag in wanted]
        data = torch.empty((n_pad, k_pad), dtype=dtype, device=device)
        packed[role] = PackedLinear(data, bias if bias_to == codes.PLAIN else written[0], *written[1:])
        pointers = (weight if t is None else t for t in (weight, bias, data, *written))
        layers.append((*pointers, *weight.shape, n_pad, k_pad, *weight.stride()))
        block_n, block_k = pass_tile(k_pad, context)
        options.append((bias is not None, bias_to, fold, block_n, block_k))
        programs += cdiv(n_pad, block_n)
    run(
        context, kernels().pack_weights, programs, layers=tuple(layers), gamma_ptr=gamma, beta_ptr=beta,
        OPTIONS=tuple(options), ACC=accumulator(dtype),
    )  # fmt: skip
    return packed

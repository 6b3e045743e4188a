"""Packing: which linear layers a half's kernels read in another layout, and the one launch that makes them.

What is packed belongs to one call: it is made of the weights as they are then, and freed behind it. Only
``freeze`` keeps it (``freezing.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import configs
from .configs import Library, Problem, next_power_of_2, round_up
from .half import Half
from .launch import Context, PackedLinear, accumulator, kernels, problem_of, run, with_dense_vectors


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
        return self.dtype, self.shape, self.norm is not None, self.bias_in_padding

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

    def renewed(self, role: str, half: Half) -> Layout:
        """The same layout of the layer that has ``role`` in ``half``."""
        if role.endswith("fc1"):
            norm = None if self.norm is None else (half.norm_weight, half.norm_bias)
            return self._replace(weight=half.fc1_weight, bias=half.fc1_bias, norm=norm)
        return self._replace(weight=half.fc2_weight, bias=None if self.bias is None else half.fc2_bias)

    @property
    def packed_shape(self) -> tuple[int, int]:
        """(N_PAD, K_PAD)."""
        N, K = self.weight.shape
        return self.shape or (N, round_up(K, configs.ALIGNED))


Layouts = dict[str, Layout]  # by role: "token_fc1", "token_fc2", "channel_fc1", "channel_fc2"


class Kept:
    """Packed layers that outlive a call. Their owner sees to it that the weights do not change meanwhile."""

    def __init__(self) -> None:
        self._packed: dict[tuple, tuple[Layout, PackedLinear]] = {}

    def get(self, role: str, layout: Layout) -> PackedLinear | None:
        """The layer in this layout, if it was kept."""
        found = self._packed.get((role, layout.settings))
        return found and found[1]

    def keep(self, role: str, layout: Layout, packed: PackedLinear) -> None:
        """Keeps it for the next call."""
        self._packed[role, layout.settings] = layout, packed


def pack(layouts: Layouts, context: Context) -> dict[str, PackedLinear]:
    """Every layer as its layout says: as it lies, as it was kept, or packed, all of these in one launch."""
    kept = context.kept
    packed = {role: one.as_it_lies() or (kept and kept.get(role, one)) for role, one in layouts.items()}
    missing = {role: layouts[role] for role, found in packed.items() if found is None}
    made = _launch(missing, context) if missing else {}
    if kept is not None:
        for role, layout in missing.items():
            kept.keep(role, layout, made[role])
    return packed | made


def pack_forward(x: Tensor, halves: Mapping[str, Half], dtype: torch.dtype, context: Context) -> Context:
    """The context with all that the forward of the halves reads, by "token" and "channel": one launch."""
    layouts: Layouts = {}
    for of, half in halves.items():
        layouts |= forward_layouts(of, with_dense_vectors(half), problem_of(x, half, dtype), context)
    return replace(context, packed=pack(layouts, context))


def forward_layouts(of: str, half: Half, problem: Problem, context: Context) -> Layouts:
    """The layers of the forward of ``of``, the "token" or "channel" half."""
    if of == "token":
        tiles = context.select("token_mixing", problem, context.target)
        if tiles is not None:
            # 16-bit only: TF32 would round the bias on its way through the product.
            spare = sum(configs.token_pieces(problem.tokens)) >= problem.tokens + 2
            in_padding = half.fc1_bias is not None and problem.dtype.itemsize == 2 and spare
            return _one_pass(half, problem, tiles.block_n, bias_in_padding=in_padding)
    elif folds(problem) and context.select("channel_fc1", problem, context.target) is not Library.ATEN:
        fc1 = Layout(half.fc1_weight, half.fc1_bias, problem.dtype, norm=(half.norm_weight, half.norm_bias))
        return _plain(of, half, problem) | {"channel_fc1": fc1}
    return _plain(of, half, problem)


def backward_layouts(of: str, half: Half, problem: Problem, context: Context, *, fc1: bool = True) -> Layouts:
    """The layers of the backward, whose operand is LN(x); fc1: whether that one is read at all.

    No bias in the padding: it would meet zeros, and an infinite one make them NaN.
    """
    if of == "token" and context.select("token_dgrad", problem, context.target) is not None:
        # Powers of two: the largest is a multiple of the others.
        blocks = [context.select(op, problem, context.target).block_n for op in configs.ONE_PASS[1:]]
        return _one_pass(half, problem, max(blocks))
    return _plain(of, half, problem, fc1=fc1)


def folds(problem: Problem) -> bool:
    """Whether fc1 of the channel half runs on the raw x, with LayerNorm folded into its weight.

    Folding rounds the raw x to the compute dtype. In a 16-bit x nothing is lost by that; an fp32 x would lose
    digits as |mean| / std grows: there the operand is normalised before it is rounded.
    """
    return problem.x_dtype == problem.dtype and problem.dtype.itemsize == 2


def _one_pass(half: Half, problem: Problem, block_d: int, *, bias_in_padding: bool = False) -> Layouts:
    """fc1 (D_PAD, S_PAD), fc2 (S_PAD, D_PAD): the pieces of the token axis, whole blocks of hidden units."""
    s_pad, d_pad = sum(configs.token_pieces(problem.tokens)), round_up(problem.hidden, block_d)
    fc1 = Layout(
        half.fc1_weight, half.fc1_bias, problem.dtype, (d_pad, s_pad), bias_in_padding=bias_in_padding
    )
    return {"token_fc1": fc1, "token_fc2": Layout(half.fc2_weight, None, problem.dtype, (s_pad, d_pad))}


def _plain(of: str, half: Half, problem: Problem, *, fc1: bool = True) -> Layouts:
    """As they are, but for rows that are not aligned and another dtype."""
    layouts = {f"{of}_fc2": Layout(half.fc2_weight, half.fc2_bias, problem.dtype)}
    return layouts | ({f"{of}_fc1": Layout(half.fc1_weight, half.fc1_bias, problem.dtype)} if fc1 else {})


def _launch(layouts: Layouts, context: Context) -> dict[str, PackedLinear]:
    how, packed, layers, options, programs = kernels().pack, {}, [], [], 0
    gamma = beta = None
    dtype, device = next((layout.dtype, layout.weight.device) for layout in layouts.values())  # of them all
    acc = accumulator(dtype)
    for role, layout in layouts.items():
        weight, bias, (n_pad, k_pad) = layout.weight, layout.bias, layout.packed_shape
        bias_to = fold = how.PLAIN
        if layout.norm is not None:
            gamma, beta = layout.norm
            # bfloat16 has the range of float32, in which the products are summed.
            fold = how.FOLD_SCALED if dtype == torch.float16 else how.FOLD
        if layout.bias_in_padding:
            bias_to = how.BIAS_IN_PADDING
        elif (bias is not None and (fold or layout.shape)) or (fold and beta is not None):
            bias_to = how.BIAS

        def vector(wanted: bool, size: int = n_pad) -> Tensor | None:
            return torch.empty(size, dtype=acc, device=device) if wanted else None

        written = vector(bias_to == how.BIAS), vector(fold != how.PLAIN), vector(fold == how.FOLD_SCALED)
        data = torch.empty((n_pad, k_pad), dtype=dtype, device=device)
        packed[role] = PackedLinear(data, bias if bias_to == how.PLAIN else written[0], *written[1:])
        pointers = (weight if t is None else t for t in (weight, bias, data, *written))
        layers.append((*pointers, *weight.shape, n_pad, k_pad, *weight.stride()))
        block_k = min(next_power_of_2(k_pad), 1024)
        block_n = 256 if context.target.backend == "interpreter" else max(1, 2048 // block_k)
        options.append((bias is not None, bias_to, fold, block_n, block_k))
        programs += -(-n_pad // block_n)
    run(
        context, kernels().pack_weights, programs, layers=tuple(layers), gamma_ptr=gamma, beta_ptr=beta,
        OPTIONS=tuple(options), ACC=kernels().dtype[acc],
    )  # fmt: skip
    return packed

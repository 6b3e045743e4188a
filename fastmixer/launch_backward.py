"""Host side of the backward: what to compute for the gradients that are needed, and with which launches.

Plain matrix products are aten's; a kernel runs where it fuses something into a product or a pass. What is
temporary is freed before the next product needs memory: these functions decide the peak of a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs, packing
from .configs import Problem
from .half import Half
from .launch import (
    Context,
    Moments,
    PackedLinear,
    accumulator,
    empty_hidden,
    gelu_constants,
    kernels,
    piece_constants,
    problem_of,
    run,
)
from .launch_norm import branch_gradient, dense, dense_half, finish, sum_partials


class Needs(NamedTuple):
    """Which inputs of a half need a gradient."""

    x: bool
    norm_weight: bool
    norm_bias: bool
    fc1_weight: bool
    fc1_bias: bool
    fc2_weight: bool
    fc2_bias: bool

    @property
    def before_fc1(self) -> bool:
        """Whether LN(x) needs one."""
        return self.x or self.norm_weight or self.norm_bias

    @property
    def before_gelu(self) -> bool:
        """Whether the pre-activation needs one."""
        return self.before_fc1 or self.fc1_weight or self.fc1_bias

    @property
    def hidden(self) -> bool:
        """Whether the hidden is needed at all: only fc2's bias does without."""
        return self.before_gelu or self.fc2_weight


Found = dict[str, Tensor]  # gradients by the names of Needs


def token_mixing(
    g: Tensor,
    x: Tensor | None,
    moments: Moments | None,
    half: Half,
    dtype: torch.dtype,
    context: Context,
    needs: Needs,
) -> Found:
    """Gradients of the token half at x (B, S, C) for its output's gradient g (B, S, C), both any strides.

    x and moments may be None if only fc2's bias needs a gradient.
    """
    half = dense_half(half, g, dtype)
    B, S, C = g.shape
    problem = problem_of(g, half, dtype)
    found: Found = {}
    dn = None
    if needs.hidden:
        one_pass = context.select("token_dgrad", problem, context.target) is not None
        packed = packing.pack(packing.backward_layouts("token", half, problem, context), context)
        fc1, fc2 = packed["token_fc1"], packed["token_fc2"]
        # Long sequences: (B, C, S), so that every product is a plain one between rows of tokens.
        n = dense(x, problem, context, half=half, moments=moments, transposed=not one_pass)
        branch = branch_gradient(g, half, problem, context, transposed=not one_pass)
        if one_pass:
            operands = _token_operands(fc1, fc2, half, problem, context)
            found = _token_wgrad(n, branch, operands, half, problem, context, needs)
            dn = _token_dgrad(n, branch, operands, problem, context) if needs.before_fc1 else None
            del operands
        else:
            dhidden, found = _mlp(
                branch, lambda: n, None, fc1, fc2, half, problem, context, needs, of="token"
            )
            if needs.before_fc1:
                weight = fc1.weight[:, :S].t().expand(B, -1, -1)
                dn = torch.bmm(weight, dhidden.unflatten(0, (B, C)).transpose(1, 2))
            del dhidden
        del n, branch
    found |= finish(g, x, moments, dn, half, problem, context, needs, of="token")
    return found


def channel_mixing(
    g: Tensor,
    x: Tensor | None,
    moments: Moments | None,
    half: Half,
    dtype: torch.dtype,
    context: Context,
    needs: Needs,
    *,
    p: Tensor | None,
) -> Found:
    """Gradients of the channel half at x (B, S, C) for its output's gradient g (B, S, C), both any strides.

    p (B * S, E), rows padded: the pre-activation that the forward kept, or None to recompute it. x and
    moments may be None if p is enough.
    """
    half = dense_half(half, g, dtype)
    B, S, C = g.shape
    problem = problem_of(g, half, dtype)
    found: Found = {}
    dn = None
    if needs.hidden:
        branch = branch_gradient(g, half, problem, context)
        reads_fc1 = p is None or needs.before_fc1
        layouts = packing.backward_layouts("channel", half, problem, context, fc1=reads_fc1)
        packed = packing.pack(layouts, context)
        fc1, fc2 = packed.get("channel_fc1"), packed["channel_fc2"]
        dhidden, found = _mlp(
            branch, lambda: dense(x, problem, context, half=half, moments=moments),
            p, fc1, fc2, half, problem, context, needs, of="channel",
        )  # fmt: skip
        del branch
        if needs.before_fc1:
            dn = torch.mm(dhidden, fc1.weight[:, :C]).view(B, S, C)
        del dhidden
    found |= finish(g, x, moments, dn, half, problem, context, needs, of="channel")
    return found


def _mlp(
    branch: Tensor,
    make_n: Callable[[], Tensor],
    p: Tensor | None,
    fc1: PackedLinear | None,
    fc2: PackedLinear,
    half: Half,
    problem: Problem,
    context: Context,
    needs: Needs,
    *,
    of: str,
) -> tuple[Tensor | None, Found]:
    """The gradient of the pre-activation (M, hidden) and those of the MLP's weights, from dense operands.

    branch, n: (B, R, K) dense, rows maybe padded, K tokens or channels; p: (M, hidden), M = B * R, or None:
    made again with fc1. n is made when it is needed first: with p that is after the hidden is gone.
    """
    dtype, N, K = problem.dtype, problem.hidden, branch.shape[-1]
    branch = branch.flatten(0, 1)
    n = make_n().flatten(0, 1) if p is None else None
    M = branch.shape[0]
    op = "mlp_hidden_bwd" if p is not None else "mlp_hidden_bwd_recompute"
    tiles = context.select(f"{of}_{op}", problem, context.target)
    if p is not None:
        fc1 = None

    like = M, N, dtype, branch.device
    hidden = empty_hidden(*like) if needs.fc2_weight else None
    dhidden = empty_hidden(*like) if needs.before_fc1 or needs.fc1_weight else None
    tiles_m = -(-M // tiles.block_m)
    db1 = None
    if needs.fc1_bias:
        db1 = torch.empty((tiles_m, N), dtype=accumulator(dtype), device=branch.device)
    run(
        context, kernels().mlp_hidden_bwd, tiles_m * -(-N // tiles.block_n), tiles,
        g_ptr=branch, w2_ptr=fc2.weight, p_ptr=p, n_ptr=n,
        w1_ptr=fc1.weight if fc1 else None, b1_ptr=fc1.bias if fc1 else None,
        hidden_ptr=hidden, dhidden_ptr=dhidden, db1_ptr=db1, M=M, N=N, K=K,
        stride_gm=branch.stride(0), stride_w2k=fc2.weight.stride(0),
        stride_pm=p.stride(0) if p is not None else 0,
        stride_nm=n.stride(0) if n is not None else 0, stride_w1n=fc1.weight.stride(0) if fc1 else 0,
        stride_hm=configs.round_up(N, configs.ALIGNED), **gelu_constants(half, dtype, context.target),
        EVEN_K=K % tiles.block_k == 0,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
    )  # fmt: skip
    found: Found = {}
    if hidden is not None:
        found["fc2_weight"] = torch.mm(branch.t(), hidden[:, :N]).to(half.fc2_weight.dtype)
    del hidden
    if dhidden is not None:
        dhidden = dhidden[:, :N]
    if needs.fc1_weight:
        n = make_n().flatten(0, 1) if n is None else n
        found["fc1_weight"] = torch.mm(dhidden.t(), n).to(half.fc1_weight.dtype)
    if db1 is not None:
        found["fc1_bias"] = sum_partials(db1, half.fc1_bias, context)
    return dhidden, found


def _token_operands(
    fc1: PackedLinear, fc2: PackedLinear, half: Half, problem: Problem, context: Context
) -> dict[str, Any]:
    """What both one-pass kernels read besides n and g: packed weights and sizes."""
    return dict(
        w1_ptr=fc1.weight, b1_ptr=fc1.bias, w2_ptr=fc2.weight,
        S=problem.tokens, C=problem.channels, D=fc2.weight.shape[1],
        **piece_constants(problem.tokens), **gelu_constants(half, problem.dtype, context.target),
    )  # fmt: skip


def _token_dgrad(n: Tensor, branch: Tensor, operands: dict, problem: Problem, context: Context) -> Tensor:
    """The gradient of n (B, S, C); n and branch dense."""
    tiles = context.select("token_dgrad", problem, context.target)
    dn = torch.empty_like(n)
    run(
        context, kernels().token_dgrad, problem.batch * -(-problem.channels // tiles.block_m), tiles,
        n_ptr=n, g_ptr=branch, dn_ptr=dn, BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n, **operands,
    )  # fmt: skip
    return dn


def _token_wgrad(
    n: Tensor,
    branch: Tensor,
    operands: dict,
    half: Half,
    problem: Problem,
    context: Context,
    needs: Needs,
) -> Found:
    """Gradients of the token MLP's weights and of fc1's bias, those that are needed."""
    common = n, branch, operands, problem, context
    fc1 = needs.fc1_weight, needs.fc1_bias
    if configs.wgrad_in_one_launch(problem, context.target):
        dw1, db1, dw2 = _token_wgrad_launch("token_wgrad_fc1", *common, *fc1, needs.fc2_weight)
    else:
        dw1, db1, _ = _token_wgrad_launch("token_wgrad_fc1", *common, *fc1, False)
        *_, dw2 = _token_wgrad_launch("token_wgrad_fc2", *common, False, False, needs.fc2_weight)
    found: Found = {}
    if dw1 is not None:
        found["fc1_weight"] = sum_partials(dw1, half.fc1_weight, context)
    if dw2 is not None:
        found["fc2_weight"] = sum_partials(dw2, half.fc2_weight, context, transposed=True)
    if db1 is not None:
        found["fc1_bias"] = sum_partials(db1, half.fc1_bias, context)
    return found


def _token_wgrad_launch(
    op: str,
    n: Tensor,
    branch: Tensor,
    operands: dict,
    problem: Problem,
    context: Context,
    wants_dw1: bool,
    wants_db1: bool,
    wants_dw2: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Partial sums, padded, or None: dW1 (splits, D, S), db1 (splits, D) and dW2^T (splits, D, S)."""
    if not (wants_dw1 or wants_db1 or wants_dw2):
        return None, None, None
    tiles = context.select(op, problem, context.target)
    d_pad, s_pad = operands["w1_ptr"].shape
    blocks_d = d_pad // tiles.block_n
    # As many shares of the (sample, channel block) pairs as fill the GPU. How many decides the order of the
    # sums: it depends on the GPU's size, never on the run.
    pairs = problem.batch * -(-problem.channels // tiles.block_m)
    splits = max(1, min(pairs, configs.WGRAD_WAVES * context.target.multiprocessors // blocks_d))

    def partials(wanted: bool, *shape: int) -> Tensor | None:
        shape = (splits, *shape)
        return torch.empty(shape, dtype=accumulator(problem.dtype), device=n.device) if wanted else None

    dw1, db1, dw2 = (
        partials(wants_dw1, d_pad, s_pad),
        partials(wants_db1, d_pad),
        partials(wants_dw2, d_pad, s_pad),
    )
    run(
        context, kernels().token_wgrad, blocks_d * splits, tiles,
        n_ptr=n, g_ptr=branch, dw1_ptr=dw1, db1_ptr=db1, dw2_ptr=dw2, B=problem.batch, SPLITS=splits,
        BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n, **operands,
    )  # fmt: skip
    return dw1, db1, dw2

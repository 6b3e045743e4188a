"""The token half: x + scale * MLP(LN(x)^T)^T; up to 256 tokens in one pass, else as a two-pass MLP.

Arguments are those of every op: ``params`` the half's parameters, ``dtype`` that of the products, ``moments``
the row moments of x (``row_moments.py``), ``context`` how to launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import Problem, cdiv
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import mlp, packing
from fastmixer.ops.launch import (
    Context,
    gelu_constants,
    kernels,
    piece_constants,
    problem_of,
    run,
    sample_scale,
)
from fastmixer.ops.layer_norm import branch_gradient, dense, dense_params, layer_norm_backward
from fastmixer.ops.layouts import PackedLinear
from fastmixer.ops.reduce import Partial, sum_partials
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import Gradients, MixingParams, Needs


def forward(
    x: Tensor, params: MixingParams, dtype: torch.dtype, context: Context, moments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The token half of x (B, S, C), contiguous, and the row moments of that."""
    params = params.with_dense_vectors()
    B, S, C = x.shape
    problem = problem_of(x, params, dtype)
    tiles = context.select("token_mixing", problem, context.target)
    packed = context.packed or packing.pack_half("token", params, problem, context)
    fc1, fc2 = packed["token_fc1"], packed["token_fc2"]
    moments = row_moments(x, context) if moments is None else moments
    if tiles is None:
        return _forward_in_two_passes(x, params, problem, moments, context, fc1, fc2)

    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    blocks = cdiv(C, tiles.block_m)  # one pass: block_m channels by block_n hidden units
    y_moments = torch.empty((blocks, 2, B * S), dtype=accumulate_dtype(dtype), device=x.device)
    run(
        context, kernels().token_mixing, B * blocks, tiles,
        x_ptr=x, x_moments_ptr=moments, gamma_ptr=params.norm_weight, beta_ptr=params.norm_bias,
        w1_ptr=fc1.weight, b1_ptr=fc1.bias, w2_ptr=fc2.weight, b2_ptr=params.fc2_bias,
        scale_ptr=sample_scale(params, B, dtype, x.device), y_ptr=y, y_moments_ptr=y_moments,
        T=B * S, S=S, C=C, D=fc2.weight.shape[1],
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2), EPS=params.eps,
        BIAS_IN_PADDING=params.fc1_bias is not None and fc1.bias is None, **piece_constants(S),
        **gelu_constants(params, dtype, context.target), BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n,
    )  # fmt: skip
    return y, y_moments


def _forward_in_two_passes(
    x: Tensor,
    params: MixingParams,
    problem: Problem,
    moments: Tensor,
    context: Context,
    fc1: PackedLinear,
    fc2: PackedLinear,
) -> tuple[Tensor, Tensor]:
    """With the hidden (B, C, D) in memory: the MLP kernels on x's transposed strides."""
    B, S, C = x.shape
    rows = x.transpose(1, 2)  # (B, C, S), a view
    tiles = context.select("token_fc2", problem, context.target)
    blocks = cdiv(C, tiles.block_m)
    y_moments = torch.empty((blocks, 2, B * S), dtype=accumulate_dtype(problem.dtype), device=x.device)
    fc1_tiles = context.select("token_fc1", problem, context.target)
    g = mlp.fc1(fc1, rows, params, problem, moments, context, fc1_tiles, norm=kernels().norm.COLUMN)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    mlp.fc2(fc2, g, rows, y.transpose(1, 2), params, problem, context, tiles, y_moments)
    return y, y_moments


def backward(
    g: Tensor,
    x: Tensor | None,
    moments: Tensor | None,
    params: MixingParams,
    dtype: torch.dtype,
    context: Context,
    needs: Needs,
) -> Gradients:
    """The gradients at x (B, S, C) for the output's gradient g (B, S, C), both any strides.

    x and moments may be None if only fc2's bias needs a gradient.
    """
    params = dense_params(params, g, dtype)
    B, S, C = g.shape
    problem = problem_of(g, params, dtype)
    gradients: Gradients = {}
    partials: list[Partial] = []
    dn = None
    if needs.hidden:
        one_pass = context.select("token_dgrad", problem, context.target) is not None
        packed = packing.pack(packing.backward_layouts("token", params, problem, context), context)
        fc1, fc2 = packed["token_fc1"], packed["token_fc2"]
        # Long sequences: (B, C, S), so that every product is a plain one between rows of tokens.
        n = dense(x, problem, context, params=params, moments=moments, transposed=not one_pass)
        branch = branch_gradient(g, params, problem, context, transposed=not one_pass)
        if one_pass:
            operands = _operands(fc1, fc2, params, problem, context)
            partials = _wgrad(n, branch, operands, problem, context, needs)
            dn = _dgrad(n, branch, operands, problem, context) if needs.before_fc1 else None
            del operands
        else:
            dhidden, gradients, partials = mlp.backward(
                branch, lambda: n, None, fc1, fc2, params, problem, context, needs, half="token"
            )
            if needs.before_fc1:
                weight = fc1.weight[:, :S].t().expand(B, -1, -1)
                dn = torch.bmm(weight, dhidden.unflatten(0, (B, C)).transpose(1, 2))
            del dhidden
        del n, branch
    dx, sums = layer_norm_backward(g, x, moments, dn, params, problem, context, needs, half="token")
    return gradients | dx | sum_partials([*partials, *sums], params, context)


def _operands(
    fc1: PackedLinear, fc2: PackedLinear, params: MixingParams, problem: Problem, context: Context
) -> dict[str, Any]:
    """What both one-pass kernels read besides n and g: packed weights and sizes."""
    return dict(
        w1_ptr=fc1.weight, b1_ptr=fc1.bias, w2_ptr=fc2.weight,
        S=problem.tokens, C=problem.channels, D=fc2.weight.shape[1],
        **piece_constants(problem.tokens), **gelu_constants(params, problem.dtype, context.target),
    )  # fmt: skip


def _dgrad(n: Tensor, branch: Tensor, operands: dict, problem: Problem, context: Context) -> Tensor:
    """The gradient of n (B, S, C); n and branch dense."""
    tiles = context.select("token_dgrad", problem, context.target)
    dn = torch.empty_like(n)
    run(
        context, kernels().token_dgrad, problem.batch * cdiv(problem.channels, tiles.block_m), tiles,
        n_ptr=n, g_ptr=branch, dn_ptr=dn, BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n, **operands,
    )  # fmt: skip
    return dn


def _wgrad(
    n: Tensor, branch: Tensor, operands: dict, problem: Problem, context: Context, needs: Needs
) -> list[Partial]:
    """Partial sums of the gradients of the token MLP's weights and of fc1's bias, those that are needed."""
    wanted = [name for name in ("fc1_weight", "fc1_bias", "fc2_weight") if getattr(needs, name)]
    if configs.wgrad_in_one_launch(problem, context.target):
        launches = {"token_wgrad_fc1": wanted}
    else:
        of_fc1 = [name for name in wanted if name.startswith("fc1")]
        launches = {"token_wgrad_fc1": of_fc1, "token_wgrad_fc2": wanted[len(of_fc1) :]}
    return [
        partial
        for op, names in launches.items()
        if names
        for partial in _wgrad_launch(op, names, n, branch, operands, problem, context)
    ]


def _wgrad_launch(
    op: str, names: list[str], n: Tensor, branch: Tensor, operands: dict, problem: Problem, context: Context
) -> list[Partial]:
    """Partial sums, padded: dW1 (splits, D, S), db1 (splits, D) and dW2^T (splits, D, S), by ``names``."""
    tiles = context.select(op, problem, context.target)
    d_pad, s_pad = operands["w1_ptr"].shape
    blocks_d = d_pad // tiles.block_n
    # As many shares of the (sample, channel block) pairs as fill the GPU. How many decides the order of the
    # sums: it depends on the GPU's size, never on the run.
    pairs = problem.batch * cdiv(problem.channels, tiles.block_m)
    splits = max(1, min(pairs, configs.WGRAD_WAVES * context.target.multiprocessors // blocks_d))
    shapes = {"fc1_weight": (d_pad, s_pad), "fc1_bias": (d_pad,), "fc2_weight": (d_pad, s_pad)}
    sums = {
        name: torch.empty((splits, *shapes[name]), dtype=accumulate_dtype(problem.dtype), device=n.device)
        for name in names
    }
    run(
        context, kernels().token_wgrad, blocks_d * splits, tiles, n_ptr=n, g_ptr=branch,
        dw1_ptr=sums.get("fc1_weight"), db1_ptr=sums.get("fc1_bias"), dw2_ptr=sums.get("fc2_weight"),
        B=problem.batch, SPLITS=splits, BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n, **operands,
    )  # fmt: skip
    return [Partial(name, partials, transposed=name == "fc2_weight") for name, partials in sums.items()]

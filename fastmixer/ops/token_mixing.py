"""The token half: x + scale * MLP(LN(x)^T)^T; up to 256 tokens in one pass, else as a two-pass MLP.

Arguments are those of every op: ``params`` the half's parameters, ``dtype`` that of the products, ``moments``
the row moments of x (``row_moments.py``), ``context`` how to launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import TileConfig, cdiv
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import mlp, packing
from fastmixer.ops.launch import Call, Context, call_of, kernels, run
from fastmixer.ops.layer_norm import branch_gradient, dense, layer_norm_backward
from fastmixer.ops.layouts import PackedLinear
from fastmixer.ops.reduce import Partial
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import Gradients, MixingParams, Needs


def forward(
    x: Tensor, params: MixingParams, dtype: torch.dtype, context: Context, moments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The token half of x (B, S, C), any strides: the result, contiguous, and its row moments."""
    call = call_of("token", x, params, dtype, context)
    B, S, C = x.shape
    fc1, fc2 = packing.forward_layers(call)
    moments = row_moments(x, context) if moments is None else moments
    tiles = call.tiles("token_mixing")  # block_m channels by block_n hidden units
    one_pass = tiles is not None
    tiles = tiles or call.tiles("token_fc2")
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    blocks = cdiv(C, tiles.block_m)
    y_moments = torch.empty((blocks, 2, B * S), dtype=accumulate_dtype(dtype), device=x.device)
    if not one_pass:  # the hidden (B, C, D) in memory: the MLP kernels on x's transposed strides
        rows = x.transpose(1, 2)
        hidden = mlp.fc1(call, fc1, rows, moments, call.tiles("token_fc1"))
        mlp.fc2(call, fc2, hidden, rows, y.transpose(1, 2), tiles, y_moments)
        return y, y_moments
    strides = (None, None, None) if x.is_contiguous() else x.stride()
    # Sums that start from x round it at every step, which 16 bits do not notice. The hidden that joins them
    # is scaled, which may be too much for float16. y is read back, and AMD's barrier waits for no store.
    scales_hidden = call.scale is None or dtype != torch.float16
    adds_to_x = x.dtype.itemsize == 2 and scales_hidden and context.target.backend != "hip"
    run(
        context, kernels().token_mixing, B * blocks, tiles,
        x_ptr=x, x_moments_ptr=moments, gamma_ptr=call.params.norm_weight, beta_ptr=call.params.norm_bias,
        b2_ptr=fc2.bias, scale_ptr=call.scale, y_ptr=y, y_moments_ptr=y_moments, T=B * S,
        stride_xb=strides[0], stride_xs=strides[1], stride_xc=strides[2], EPS=params.eps,
        BIAS_IN_PADDING=params.fc1_bias is not None and fc1.bias is None, ADDS_TO_X=adds_to_x,
        **_one_pass_args(call, "token_mixing", fc1, fc2, tiles),
    )  # fmt: skip
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
    call = call_of("token", g, params, dtype, context)
    B, S, C = g.shape
    gradients, partials, dn = {}, [], None
    if needs.hidden:
        tiles = call.tiles("token_dgrad")
        one_pass = tiles is not None
        fc1, fc2 = packing.backward_layers(call)
        # Long sequences: (B, C, S), so that every product is a plain one between rows of tokens.
        n = dense(call, x, moments=moments, transposed=not one_pass)
        do = branch_gradient(call, g, transposed=not one_pass)
        if one_pass:
            operands = dict(n_ptr=n, do_ptr=do)
            partials = _wgrad(call, operands, fc1, fc2, needs)
            if needs.before_fc1:
                dn = torch.empty_like(n)
                run(
                    context, kernels().token_dgrad, B * cdiv(C, tiles.block_m), tiles,
                    dn_ptr=dn, **operands, **_one_pass_args(call, "token_dgrad", fc1, fc2, tiles),
                )  # fmt: skip
            del operands
        else:
            dp, gradients, partials = mlp.backward(call, do, lambda: n, None, fc1, fc2, needs)
            if needs.before_fc1:
                weight = fc1.weight[:, :S].t().expand(B, -1, -1)
                dn = torch.empty((B, S, C), dtype=dtype, device=g.device)
                context.call(torch.bmm, weight, dp.unflatten(0, (B, C)).transpose(1, 2), out=dn)
            del dp
        del n, do
    return gradients | layer_norm_backward(call, g, x, moments, dn, needs, partials)


def _one_pass_args(
    call: Call, op: str, fc1: PackedLinear, fc2: PackedLinear, tiles: TileConfig
) -> dict[str, Any]:
    """What the kernel of every one-pass op takes: packed weights, sizes and constants."""
    problem = call.problem
    P0, P1, P2 = configs.pieces_of(op, problem, call.context.target)
    # They mask nothing of the weights: of a block that is not whole they would leave out all hidden units, or
    # read beyond the end. Inside a sample they count in 32 bits.
    assert fc2.weight.shape[1] % tiles.block_n == 0, (fc2.weight.shape, tiles)
    assert fc2.weight.shape[0] == P0 + P1 + P2, (fc2.weight.shape, problem)
    assert problem.tokens * problem.channels < 2**31, problem
    return dict(
        w1_ptr=fc1.weight, b1_ptr=fc1.bias, w2_ptr=fc2.weight,
        S=problem.tokens, C=problem.channels, D_PAD=fc2.weight.shape[1],
        P0=P0, P1=P1, P2=P2, BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n, **call.gelu_constants(),
    )  # fmt: skip


def _wgrad(
    call: Call, operands: dict[str, Tensor], fc1: PackedLinear, fc2: PackedLinear, needs: Needs
) -> list[Partial]:
    """What is needed of the partial sums of dW1 and dW2^T (splits, D_PAD, S_PAD) and db1 (splits, D_PAD)."""
    problem, target = call.problem, call.context.target
    d_pad, s_pad = fc1.weight.shape
    shapes = {"fc1_weight": (d_pad, s_pad), "fc1_bias": (d_pad,), "fc2_weight": (d_pad, s_pad)}
    wanted = [name for name in shapes if getattr(needs, name)]
    launches = {"token_wgrad_fc1": wanted}
    if not configs.wgrad_in_one_launch(problem, target):
        of_fc1 = [name for name in wanted if name.startswith("fc1")]
        launches = {"token_wgrad_fc1": of_fc1, "token_wgrad_fc2": wanted[len(of_fc1) :]}
    partials = []
    for op, names in launches.items():
        if not names:
            continue
        tiles = call.tiles(op)
        blocks_d = d_pad // tiles.block_n
        splits, share = configs.wgrad_splits(problem, tiles, blocks_d, target)
        acc, device = accumulate_dtype(problem.dtype), fc1.weight.device
        sums = {name: torch.empty((splits, *shapes[name]), dtype=acc, device=device) for name in names}
        run(
            call.context, kernels().token_wgrad, blocks_d * splits, tiles,
            dw1_ptr=sums.get("fc1_weight"), db1_ptr=sums.get("fc1_bias"), dw2_ptr=sums.get("fc2_weight"),
            B=problem.batch, SHARE=share, **operands, **_one_pass_args(call, op, fc1, fc2, tiles),
        )  # fmt: skip
        partials += [Partial(name, t, transposed=name == "fc2_weight") for name, t in sums.items()]
    return partials

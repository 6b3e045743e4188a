"""The channel half: x + scale * MLP(LN(x)), by the two-pass MLP or with PyTorch's own products.

Arguments are those of every op: ``params`` the half's parameters, ``dtype`` that of the products, ``moments``
the row moments of x (``row_moments.py``), ``context`` how to launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer.configs import Library
from fastmixer.ops import library, mlp, packing
from fastmixer.ops.launch import Context, kernels, problem_of
from fastmixer.ops.layer_norm import branch_gradient, dense, dense_params, layer_norm_backward
from fastmixer.ops.reduce import Partial, sum_partials
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import Gradients, MixingParams, Needs


def forward(
    x: Tensor,
    params: MixingParams,
    dtype: torch.dtype,
    context: Context,
    moments: Tensor | None = None,
    *,
    p: Tensor | None = None,
) -> Tensor:
    """The channel half of x (B, S, C), contiguous.

    p: an ``empty_hidden``, filled with the pre-activation if given.
    """
    params = params.with_dense_vectors()
    B, S, C = x.shape
    problem = problem_of(x, params, dtype)
    packed = context.packed or packing.pack_half("channel", params, problem, context)
    fc1, fc2 = packed["channel_fc1"], packed["channel_fc2"]
    moments = row_moments(x, context) if moments is None else moments
    fc1_tiles, fc2_tiles = (
        context.select(op, problem, context.target) for op in ("channel_fc1", "channel_fc2")
    )
    rows = x
    if params.residual_scale is None and (B == 1 or x.stride(0) == S * x.stride(1)):
        # Samples of one row: no division, and no size of the compiled code depends on the batch.
        rows = x.as_strided((B * S, 1, C), (x.stride(1), x.stride(1), x.stride(2)))
    if fc1_tiles is Library.ATEN:
        g = library.fc1(fc1, x, params, problem, moments, context, p)
    else:
        norm = kernels().norm.FOLD if fc1.rank1 is not None else kernels().norm.ROW
        g = mlp.fc1(fc1, rows, params, problem, moments, context, fc1_tiles, norm=norm, p=p)
    if fc2_tiles is Library.ATEN:
        return library.fc2(fc2, g, rows, params, problem, context).view(B, S, C)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    mlp.fc2(fc2, g, rows, y.view(rows.shape), params, problem, context, fc2_tiles)
    return y


def backward(
    g: Tensor,
    x: Tensor | None,
    moments: Tensor | None,
    params: MixingParams,
    dtype: torch.dtype,
    context: Context,
    needs: Needs,
    *,
    p: Tensor | None,
) -> Gradients:
    """The gradients at x (B, S, C) for the output's gradient g (B, S, C), both any strides.

    p (B * S, E), rows padded: the pre-activation that the forward kept, or None to recompute it. x and
    moments may be None if p is enough.
    """
    params = dense_params(params, g, dtype)
    B, S, C = g.shape
    problem = problem_of(g, params, dtype)
    gradients: Gradients = {}
    partials: list[Partial] = []
    dn = None
    if needs.hidden:
        branch = branch_gradient(g, params, problem, context)
        reads_fc1 = p is None or needs.before_fc1
        layouts = packing.backward_layouts("channel", params, problem, context, fc1=reads_fc1)
        packed = packing.pack(layouts, context)
        fc1, fc2 = packed.get("channel_fc1"), packed["channel_fc2"]
        dhidden, gradients, partials = mlp.backward(
            branch, lambda: dense(x, problem, context, params=params, moments=moments),
            p, fc1, fc2, params, problem, context, needs, half="channel",
        )  # fmt: skip
        del branch
        if needs.before_fc1:
            dn = torch.mm(dhidden, fc1.weight[:, :C]).view(B, S, C)
        del dhidden
    dx, sums = layer_norm_backward(g, x, moments, dn, params, problem, context, needs, half="channel")
    return gradients | dx | sum_partials([*partials, *sums], params, context)

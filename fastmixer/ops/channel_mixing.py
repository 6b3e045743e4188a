"""The channel half: x + scale * MLP(LN(x)), by the two-pass MLP or with PyTorch's own products.

Arguments are those of every op: ``params`` the half's parameters, ``dtype`` that of the products, ``moments``
the row moments of x (``passes.py``), ``context`` how to launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer.configs import Library
from fastmixer.ops import library, mlp, packing
from fastmixer.ops.launch import Context, call_of, kernels
from fastmixer.ops.passes import branch_gradient, dense, layer_norm_backward, row_moments
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
    call = call_of("channel", x, params, dtype, context)
    B, S, C = x.shape
    fc1, fc2 = packing.forward_layers(call)
    moments = row_moments(x, context) if moments is None else moments
    fc1_tiles, fc2_tiles = call.tiles("channel_fc1"), call.tiles("channel_fc2")
    rows = x
    if params.residual_scale is None and (B == 1 or x.stride(0) == S * x.stride(1)):
        # Samples of one row: no division, and no size of the compiled code depends on the batch.
        rows = x.as_strided((B * S, 1, C), (x.stride(1), x.stride(1), x.stride(2)))
    if fc1_tiles is Library.ATEN:
        g = library.fc1(call, fc1, x, moments, p)
    else:
        norm = kernels().norm.FOLD if fc1.rank1 is not None else kernels().norm.ROW
        g = mlp.fc1(call, fc1, rows, moments, fc1_tiles, norm=norm, p=p)
    if fc2_tiles is Library.ATEN:
        return library.fc2(call, fc2, g, rows).view(B, S, C)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    mlp.fc2(call, fc2, g, rows, y.view(rows.shape), fc2_tiles)
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
    call = call_of("channel", g, params, dtype, context)
    B, S, C = g.shape
    gradients, partials, dn = {}, [], None
    if needs.hidden:
        branch = branch_gradient(call, g)
        fc1, fc2 = packing.backward_layers(call, fc1=p is None or needs.before_fc1)
        dhidden, gradients, partials = mlp.backward(
            call, branch, lambda: dense(call, x, moments=moments), p, fc1, fc2, needs
        )
        del branch
        if needs.before_fc1:
            dn = torch.mm(dhidden, fc1.weight[:, :C]).view(B, S, C)
        del dhidden
    return gradients | layer_norm_backward(call, g, x, moments, dn, needs, partials)

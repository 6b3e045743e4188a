"""The channel half: x + scale * MLP(LN(x)), by the two-pass MLP or with PyTorch's own products.

Arguments are those of every op: ``params`` the half's parameters, ``dtype`` that of the products, ``moments``
the row moments of x (``row_moments.py``), ``context`` how to launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer.configs import Library, cdiv
from fastmixer.ops import mlp, packing
from fastmixer.ops.launch import Call, Context, accumulator, call_of, empty_hidden, kernels, pass_tile, run
from fastmixer.ops.layer_norm import branch_gradient, dense, layer_norm_backward
from fastmixer.ops.layouts import PackedLinear
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
    """The channel half of x (B, S, C), any strides: the result, contiguous.

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
        hidden = _library_fc1(call, fc1, x, moments, p)
    else:
        hidden = mlp.fc1(call, fc1, rows, moments, fc1_tiles, p)
    if fc2_tiles is Library.ATEN:
        return _library_fc2(call, fc2, hidden, rows).view(B, S, C)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    mlp.fc2(call, fc2, hidden, rows, y.view(rows.shape), fc2_tiles)
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
        do = branch_gradient(call, g)
        fc1, fc2 = packing.backward_layers(call, fc1=p is None or needs.before_fc1)
        dp, gradients, partials = mlp.backward(
            call, do, lambda: dense(call, x, moments=moments), p, fc1, fc2, needs
        )
        del do
        if needs.before_fc1:
            dn = torch.empty((B, S, C), dtype=dtype, device=g.device)
            context.call(torch.mm, dp, fc1.weight[:, :C], out=dn.view(B * S, C))
        del dp
    return gradients | layer_norm_backward(call, g, x, moments, dn, needs, partials)


# ---- with PyTorch's products (cuBLAS, hipBLASLt), where ``configs.Library.ATEN`` was chosen ----------------

# What the fused kernels do inside a product takes passes here: n, p and o are written and read again, which
# ``library_product`` (``configs/predict/cost.py``) counts. The roundings are eager PyTorch's: n, p and o, to
# the products' dtype, each with its bias added before; only the scaled branch is not rounded by itself. A
# residual as the product's own addend (``addmm`` with beta = 1) would save nothing: PyTorch copies it to the
# output first; and it would cost a rounding where there is a bias, which has to be in the addend already.


def _library_fc1(
    call: Call, packed: PackedLinear, x: Tensor, moments: Tensor, p: Tensor | None = None
) -> Tensor:
    """gelu(fc1(LN(x))) of x (B, S, C), any strides: the hidden (B * S, E), rows padded.

    p: laid out as the hidden; filled with the pre-activation if given.
    """
    E, dtype = call.problem.hidden, call.problem.dtype
    M = x.shape[0] * x.shape[1]
    n = dense(call, x, moments=moments).flatten(0, 1)
    product = empty_hidden(M, E, dtype, x.device) if p is None else p
    _linear(call, n, packed.weight, call.params.fc1_bias, product[:, :E])
    del n  # before the hidden needs memory
    hidden = product if p is None else torch.empty_like(p)
    rows, block_n = pass_tile(E, call.context)
    run(
        call.context, kernels().gelu_fwd, cdiv(M, rows) * cdiv(E, block_n),
        p_ptr=product, hidden_ptr=hidden, M=M, N=E, stride_m=hidden.stride(0),
        **call.activation_constants(), ROWS=rows, BLOCK_N=block_n,
    )  # fmt: skip
    return hidden


def _library_fc2(call: Call, packed: PackedLinear, hidden: Tensor, x: Tensor) -> Tensor:
    """x + scale * fc2(hidden), contiguous; x (B, R, C), any strides; hidden (B * R, E), rows maybe padded."""
    B, R, C = x.shape
    dtype = call.problem.dtype
    o = torch.empty((B, R, C), dtype=dtype, device=x.device)
    _linear(call, hidden[:, : call.problem.hidden], packed.weight, call.params.fc2_bias, o.view(B * R, C))
    y = o if x.dtype == dtype else torch.empty((B, R, C), dtype=x.dtype, device=x.device)
    rows, block_c = pass_tile(C, call.context)
    run(
        call.context, kernels().residual_fwd, cdiv(B * R, rows) * cdiv(C, block_c),
        x_ptr=x, o_ptr=o, scale_ptr=call.scale, y_ptr=y, B=B, S=R, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ACC=accumulator(dtype), ROWS=rows, BLOCK_C=block_c,
    )  # fmt: skip
    return y


def _linear(call: Call, a: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = a W^T + b with the bias in out's dtype; the rows of W may be padded beyond those of a.

    Into ``out``: that form autocast leaves alone, and rows may be padded.
    """
    weight, context = weight[:, : a.shape[1]].t(), call.context
    if bias is None:
        context.call(torch.mm, a, weight, out=out)
    else:
        context.call(torch.addmm, context.copied(bias, out.dtype), a, weight, out=out)

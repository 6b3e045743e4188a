"""The channel half: x + scale * MLP(LN(x)), by the two-pass MLP or with PyTorch's own products.

Arguments are those of every op: ``params`` the half's parameters, ``dtype`` that of the products, ``moments``
the row moments of x (``row_moments.py``), ``context`` how to launch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmixer.configs import Library, cdiv
from fastmixer.configs.ops import libraries
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
    overwrite: bool = False,
) -> Tensor:
    """The channel half of x (B, S, C), any strides: the result, contiguous.

    p: an ``empty_hidden``, filled with the pre-activation if given. overwrite: x is contiguous, nobody reads
    it later, and the result may take its place.
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
    if isinstance(fc1_tiles, Library):
        hidden = _library_fc1(call, fc1, x, moments, p)
    else:
        hidden = mlp.fc1(call, fc1, rows, moments, fc1_tiles, p, ones=packing.carries_bias(call))
    if packing.adds_to_residual(call):
        return _added_fc2(call, fc2, hidden, x, overwrite=overwrite)
    if isinstance(fc2_tiles, Library):
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


# ---- with PyTorch's products (cuBLAS, hipBLASLt), where a ``configs.Library`` was chosen -------------------

# What the fused kernels do inside a product takes passes with ATEN: n, p and o are written and read again,
# which ``library_product`` (``configs/predict/cost.py``) counts. The roundings are eager PyTorch's: n, p and
# o, to the products' dtype, each with its bias added before; only the scaled branch is not rounded by itself.
# ATEN_GELU does not round p, nor ADDMM o.
#
# ADDMM's addend is the output itself where nobody else reads x, and a copy of x elsewhere. Then there is no
# place for fc2's bias, and adding it to x would be a pass and a rounding: it lies in the weight's padding (in
# two columns, with all of its digits) and meets ones in the hidden's. What is left of both paddings is 0, so
# that no column of y sees the bias of another.


def _library_fc1(
    call: Call, packed: PackedLinear, x: Tensor, moments: Tensor, p: Tensor | None = None
) -> Tensor:
    """gelu(fc1(LN(x))) of x (B, S, C), any strides: the hidden (B * S, E), rows padded.

    p: an ``empty_hidden``, filled with the pre-activation if given.
    """
    context, E, dtype, M = call.context, call.problem.hidden, call.problem.dtype, x.shape[0] * x.shape[1]
    choice, ones = call.tiles("channel_fc1"), packing.carries_bias(call)
    in_epilogue = (
        choice is Library.ATEN_GELU and choice in libraries("channel_fc1", call.problem) and p is None
    )
    n = dense(call, x, moments=moments).flatten(0, 1)
    product = empty_hidden(M, E, dtype, x.device, ones=ones) if p is None else p
    _linear(call, n, packed, product, gelu=in_epilogue)
    del n  # before the hidden needs memory
    hidden = product if p is None else empty_hidden(M, E, dtype, x.device, ones=ones)
    if not in_epilogue:
        rows, block_n = pass_tile(E, context)
        run(
            context, kernels().gelu_fwd, cdiv(M, rows) * cdiv(E, block_n),
            p_ptr=product, hidden_ptr=hidden, M=M, N=E,
            stride_pm=product.stride(0), stride_hm=hidden.stride(0),
            **call.activation_constants(), ROWS=rows, BLOCK_N=block_n,
        )  # fmt: skip
    if ones:
        context.call(Tensor.fill_, hidden[:, E : E + 2], 1.0)
        if p is not None:  # otherwise the product wrote them
            context.call(Tensor.zero_, hidden[:, E + 2 :])
    return hidden


def _library_fc2(call: Call, packed: PackedLinear, hidden: Tensor, x: Tensor) -> Tensor:
    """x + scale * fc2(hidden), contiguous; x (B, R, C), any strides; hidden (B * R, E), rows maybe padded."""
    B, R, C = x.shape
    dtype = call.problem.dtype
    o = torch.empty((B, R, C), dtype=dtype, device=x.device)
    _linear(call, hidden[:, : call.problem.hidden], packed, o.view(B * R, C))
    y = o if x.dtype == dtype else torch.empty((B, R, C), dtype=x.dtype, device=x.device)
    rows, block_c = pass_tile(C, call.context)
    run(
        call.context, kernels().residual_fwd, cdiv(B * R, rows) * cdiv(C, block_c),
        x_ptr=x, o_ptr=o, scale_ptr=call.scale, y_ptr=y, B=B, S=R, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ACC=accumulator(dtype), ROWS=rows, BLOCK_C=block_c,
    )  # fmt: skip
    return y


def _added_fc2(call: Call, packed: PackedLinear, hidden: Tensor, x: Tensor, *, overwrite: bool) -> Tensor:
    """x + fc2(hidden) (B, S, C), contiguous, in x's place if ``overwrite``; hidden (B * S, E), rows padded.

    In place in name too: of an ``out`` in the same memory PyTorch cannot tell that it is the addend.
    """
    B, S, C = x.shape
    y, context = x, call.context
    if not overwrite:
        y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
        context.call(Tensor.copy_, y, x)
    K = hidden.shape[1] if packing.carries_bias(call) else call.problem.hidden
    context.call(Tensor.addmm_, y.view(B * S, C), hidden[:, :K], packed.weight[:, :K].t())
    return y


def _linear(call: Call, a: Tensor, packed: PackedLinear, out: Tensor, *, gelu: bool = False) -> None:
    """out = a W^T + b with the bias in out's dtype, or tanh's GELU of that; W and b may be padded.

    Into ``out``: that form autocast leaves alone, and rows may be padded.
    """
    N, context = out.shape[1], call.context
    weight, bias = packed.weight[:N, : a.shape[1]].t(), packed.bias
    if bias is not None:
        bias = context.copied(bias, out.dtype)[:N]
    elif gelu:
        bias = torch.empty(N, dtype=out.dtype, device=out.device)
        context.call(Tensor.zero_, bias)
    if bias is None:
        context.call(torch.mm, a, weight, out=out)
    else:
        context.call(_gelu_product if gelu else torch.addmm, bias, a, weight, out=out)


def _gelu_product(bias: Tensor, a: Tensor, weight: Tensor, *, out: Tensor) -> None:
    """out (M, N) = gelu(a weight + bias), tanh's, rounded once: by the epilogue of cuBLASLt or hipBLASLt.

    ``out`` is contiguous: else PyTorch rounds the sum and applies GELU in a pass. On a CPU it always does,
    and the GELU is erf's: there fp32 takes its place, so that tests judge what is around it.
    """
    if out.is_cpu:
        p = torch.addmm(bias.float(), a.float(), weight.float())
        out.copy_(F.gelu(p, approximate="tanh"))
    else:
        torch._addmm_activation(bias, a, weight, use_gelu=True, out=out)

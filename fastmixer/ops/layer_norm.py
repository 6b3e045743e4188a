"""The backward's passes around the products: dense operands before, LayerNorm and all sums after."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import cdiv, round_up
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Call, accumulator, kernels, run
from fastmixer.ops.reduce import Partial, sum_partials
from fastmixer.ops.row_moments import moments_constants
from fastmixer.params import Gradients, Needs


def dense(call: Call, x: Tensor, *, moments: Tensor | None = None, transposed: bool = False) -> Tensor:
    """LN(x), if the moments of x are given, else x times the residual scale, in the dtype of the products.

    x: (B, S, C), any strides; the result is dense, (B, S, C) or transposed (B, C, S), with padded rows.
    """
    B, S, C, _, _, dtype = call.problem[:6]
    if transposed:
        padded = torch.empty((B, C, round_up(S, configs.ALIGNED)), dtype=dtype, device=x.device)
        out = padded[..., :S]
        y = out.transpose(1, 2)
    else:
        y = out = torch.empty((B, S, C), dtype=dtype, device=x.device)
    norm, scale = (None, call.scale) if moments is None else (call.params, None)
    tiles = call.tiles("layer_norm_fwd_transposed" if transposed else "layer_norm_fwd")
    tiles_m = B * cdiv(S, tiles.block_m) if transposed else cdiv(B * S, tiles.block_m)
    run(
        call.context, kernels().layer_norm_fwd, tiles_m * cdiv(C, tiles.block_n), tiles,
        x_ptr=x, moments_ptr=moments,
        gamma_ptr=norm.norm_weight if norm else None, beta_ptr=norm.norm_bias if norm else None,
        scale_ptr=scale, y_ptr=y, B=B, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        stride_yb=y.stride(0), stride_ys=y.stride(1), stride_yc=y.stride(2),
        PER_SAMPLE=transposed, EPS=norm.eps if norm else 0.0, **moments_constants(moments, C),
        ACC=accumulator(dtype), ROWS=tiles.block_m, BLOCK_C=tiles.block_n,
    )  # fmt: skip
    return out


def branch_gradient(call: Call, g: Tensor, *, transposed: bool = False) -> Tensor:
    """The gradient of what the MLP returns: g scaled, dense, in the products' dtype; maybe g itself."""
    if call.scale is None and not transposed and g.dtype == call.problem.dtype and g.is_contiguous():
        return g
    return dense(call, g, transposed=transposed)


def layer_norm_backward(
    call: Call,
    g: Tensor,
    x: Tensor | None,
    moments: Tensor | None,
    dn: Tensor | None,
    needs: Needs,
    partials: list[Partial],
) -> Gradients:
    """What is left: the gradients of x, of LayerNorm's parameters and fc2's bias, and of ``partials``.

    dn: the gradient of LN(x), or None where only fc2's bias is left.
    """
    params, context = call.params, call.context
    if dn is None and not needs.fc2_bias:
        return sum_partials(partials, params, context)
    B, S, C = g.shape
    acc = accumulate_dtype(call.problem.dtype)
    tiles = call.tiles("layer_norm_bwd")
    # As many programs as are resident at once: each walks over its share of the rows.
    resident = max(1, configs.NORM_WARPS // tiles.num_warps) * context.target.multiprocessors
    programs = min(cdiv(B * S, tiles.block_m), resident)
    rows = round_up(cdiv(B * S, programs), tiles.block_m)
    programs = cdiv(B * S, rows)
    dx = None
    if needs.x:  # in dn's place, whose rows are read before they are written
        dx = dn if dn.dtype == g.dtype else torch.empty((B, S, C), dtype=g.dtype, device=g.device)
    if dn is None:
        x = moments = None
    bias_sums = "row_sums" if call.half == "token" else "column_sums"
    names = {"dgamma": "norm_weight", "dbeta": "norm_bias", bias_sums: "fc2_bias"}
    sums = {
        name: torch.empty((B, S) if name == "row_sums" else (programs, C), dtype=acc, device=g.device)
        for name, parameter in names.items()
        if getattr(needs, parameter)
    }
    strides = (0, 0, 0) if x is None else x.stride()
    run(
        context, kernels().layer_norm_bwd, programs, tiles,
        g_ptr=g, x_ptr=x, moments_ptr=moments,
        gamma_ptr=params.norm_weight, dn_ptr=dn, scale_ptr=call.scale, dx_ptr=dx,
        **{f"{name}_ptr": sums.get(name) for name in ("dgamma", "dbeta", "column_sums", "row_sums")},
        T=B * S, S=S, C=C, rows_per_program=rows,
        stride_gb=g.stride(0), stride_gs=g.stride(1), stride_gc=g.stride(2),
        stride_xb=strides[0], stride_xs=strides[1], stride_xc=strides[2],
        EPS=params.eps, **moments_constants(moments, C), ACC=kernels().dtype[acc],
        ROWS=tiles.block_m, BLOCK_C=tiles.block_n,
    )  # fmt: skip
    partials = [*partials, *(Partial(names[name], partial) for name, partial in sums.items())]
    return ({} if dx is None else {"x": dx}) | sum_partials(partials, params, context)

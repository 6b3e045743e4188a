"""Host side of the backward's passes around the products: dense operands before, LayerNorm after."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import Problem, TileConfig, cdiv, round_up
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Context, kernels, run, sample_scale
from fastmixer.ops.reduce import Partial
from fastmixer.ops.row_moments import moments_constants
from fastmixer.params import Gradients, MixingParams, Needs


def dense_params(params: MixingParams, g: Tensor, dtype: torch.dtype) -> MixingParams:
    """The parameters with dense vectors, and with the residual scale as the kernels read it."""
    scale = sample_scale(params, g.shape[0], dtype, g.device)
    return params.with_dense_vectors()._replace(residual_scale=scale)


def dense(
    x: Tensor,
    problem: Problem,
    context: Context,
    *,
    params: MixingParams | None = None,
    moments: Tensor | None = None,
    scale: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """LN(x), if ``moments`` of x are given, times ``scale``, in the dtype of the products.

    x: (B, S, C), any strides; the result is dense, (B, S, C) or transposed (B, C, S), with padded rows.
    """
    B, S, C, _, _, dtype = problem
    if transposed:
        padded = torch.empty((B, C, round_up(S, configs.ALIGNED)), dtype=dtype, device=x.device)
        out = padded[..., :S]
        y = out.transpose(1, 2)
    else:
        y = out = torch.empty((B, S, C), dtype=dtype, device=x.device)
    acc = kernels().dtype[accumulate_dtype(dtype)]
    op = "layer_norm_fwd_transposed" if transposed else "layer_norm_fwd"
    tiles = context.select(op, problem, context.target)
    tiles_m = B * cdiv(S, tiles.block_m) if transposed else cdiv(B * S, tiles.block_m)
    run(
        context, kernels().layer_norm_fwd, tiles_m * cdiv(C, tiles.block_n), tiles,
        x_ptr=x, moments_ptr=moments,
        gamma_ptr=params.norm_weight if params else None, beta_ptr=params.norm_bias if params else None,
        scale_ptr=scale, y_ptr=y, B=B, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        stride_yb=y.stride(0), stride_ys=y.stride(1), stride_yc=y.stride(2),
        PER_SAMPLE=transposed, EPS=params.eps if params else 0.0, **moments_constants(moments, C), ACC=acc,
        ROWS=tiles.block_m, BLOCK_C=tiles.block_n,
    )  # fmt: skip
    return out


def branch_gradient(
    g: Tensor, params: MixingParams, problem: Problem, context: Context, *, transposed: bool = False
) -> Tensor:
    """The gradient of what the MLP returns: g scaled, dense, in the products' dtype; maybe g itself."""
    scale = params.residual_scale
    if scale is None and not transposed and g.dtype == problem.dtype and g.is_contiguous():
        return g
    return dense(g, problem, context, scale=scale, transposed=transposed)


def layer_norm_backward(
    g: Tensor,
    x: Tensor | None,
    moments: Tensor | None,
    dn: Tensor | None,
    params: MixingParams,
    problem: Problem,
    context: Context,
    needs: Needs,
    *,
    half: str,
) -> tuple[Gradients, list[Partial]]:
    """What is left: the gradient of x, and partial sums of those of LayerNorm's parameters and fc2's bias.

    dn: the gradient of LN(x), or None where only fc2's bias is left. half: "token" or "channel".
    """
    if dn is None and not needs.fc2_bias:
        return {}, []
    B, S, C = g.shape
    acc = accumulate_dtype(problem.dtype)
    tiles = context.select("layer_norm_bwd", problem, context.target)
    programs = min(cdiv(B * S, tiles.block_m), _programs(tiles, context))
    rows = round_up(cdiv(B * S, programs), tiles.block_m)
    programs = cdiv(B * S, rows)
    dx = None
    if needs.x:  # in dn's place, whose rows are read before they are written
        dx = dn if dn.dtype == g.dtype else torch.empty((B, S, C), dtype=g.dtype, device=g.device)
    if dn is None:
        x = moments = None
    sums = {
        name: torch.empty((B, S) if name == "row_sums" else (programs, C), dtype=acc, device=g.device)
        for name, wanted in (
            ("dgamma", needs.norm_weight),
            ("dbeta", needs.norm_bias),
            ("row_sums", needs.fc2_bias and half == "token"),
            ("column_sums", needs.fc2_bias and half == "channel"),
        )
        if wanted
    }
    strides = (0, 0, 0) if x is None else x.stride()
    run(
        context, kernels().layer_norm_bwd, programs, tiles,
        g_ptr=g, x_ptr=x, moments_ptr=moments,
        gamma_ptr=params.norm_weight, dn_ptr=dn, scale_ptr=params.residual_scale, dx_ptr=dx,
        **{f"{name}_ptr": sums.get(name) for name in ("dgamma", "dbeta", "column_sums", "row_sums")},
        T=B * S, S=S, C=C, rows_per_program=rows,
        stride_gb=g.stride(0), stride_gs=g.stride(1), stride_gc=g.stride(2),
        stride_xb=strides[0], stride_xs=strides[1], stride_xc=strides[2],
        EPS=params.eps, **moments_constants(moments, C), ACC=kernels().dtype[acc],
        ROWS=tiles.block_m, BLOCK_C=tiles.block_n,
    )  # fmt: skip
    parameters = {"dgamma": "norm_weight", "dbeta": "norm_bias"}
    partials = [Partial(parameters.get(name, "fc2_bias"), partial) for name, partial in sums.items()]
    return {} if dx is None else {"x": dx}, partials


def _programs(tiles: TileConfig, context: Context) -> int:
    """As many as are resident at once: each walks over its share of the rows."""
    return max(1, configs.NORM_WARPS // tiles.num_warps) * context.target.multiprocessors

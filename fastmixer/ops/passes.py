"""The passes around the products: row moments and dense operands before, LayerNorm and sums after.

Row moments are the LayerNorm statistics of every token, one tensor (NUM_BLOCKS, 2, T) in the accumulation
dtype, T = B * S: mean and centred sum of squares of each row over each block of its C channels. Blocks are
powers of two wide, the last maybe ragged: so their width follows from their number. A single block has all
channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import cdiv, next_power_of_2, round_up
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Call, Context, accumulator, kernels, pass_tile, run
from fastmixer.params import Gradients, MixingParams, Needs


def row_moments(x: Tensor, context: Context) -> Tensor:
    """The moments (1, 2, T) of the rows of x (B, S, C), any strides."""
    B, S, C = x.shape
    moments = torch.empty((1, 2, B * S), dtype=accumulate_dtype(x.dtype), device=x.device)
    # Short rows per program: reductions stay inside a warp, and fewer lanes are masked (compiled: NOTES.md).
    rows, block_c = pass_tile(C, context, 1024 if context.target.backend == "interpreter" else 256)
    run(
        context, kernels().row_moments, cdiv(B * S, rows),
        x_ptr=x, moments_ptr=moments, T=B * S, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ROWS=rows, BLOCK_C=block_c, ACC=accumulator(x.dtype),
    )  # fmt: skip
    return moments


def joined(moments: Tensor, channels: int, context: Context) -> Tensor:
    """The same moments in one block, (1, 2, T): the shape that a trace knows, whatever tile made them."""
    blocks, _, T = moments.shape
    if blocks == 1:
        return moments
    out = moments.new_empty((1, 2, T))
    rows = max(1, 1024 // next_power_of_2(blocks))
    run(
        context, kernels().join_moments, cdiv(T, rows),
        moments_ptr=moments, joined_ptr=out, T=T, C=channels, ROWS=rows,
        **moments_constants(moments, channels),
    )  # fmt: skip
    return out


def moments_constants(moments: Tensor | None, channels: int) -> dict[str, int]:
    """The constexprs by which a kernel reads moments; None: it reads none."""
    blocks = 1 if moments is None else moments.shape[0]
    width = channels if blocks == 1 else next_power_of_2(cdiv(channels, blocks))
    return {"COUNT": width, "NUM_BLOCKS": blocks, "NUM_BLOCKS_P2": next_power_of_2(blocks)}


def dense(call: Call, x: Tensor, *, moments: Tensor | None = None, transposed: bool = False) -> Tensor:
    """LN(x), if the moments of x are given, else x times the residual scale, in the dtype of the products.

    x: (B, S, C), any strides; the result is dense, (B, S, C) or transposed (B, C, S), with padded rows.
    """
    B, S, C, _, _, dtype = call.problem
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


class Partial(NamedTuple):
    """Partial sums of the gradient of one parameter.

    name: of the parameter. sums: (P, ...) contiguous, accumulation dtype; the last axes are maybe padded.
    transposed: a sum is the gradient's transpose.
    """

    name: str
    sums: Tensor
    transposed: bool = False


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


def sum_partials(partials: Sequence[Partial], params: MixingParams, context: Context) -> Gradients:
    """The gradients by name, cut to the parameters' shapes and in their dtypes; one launch, or none."""
    gradients: Gradients = {}
    items, tiles, programs = [], [], 0
    for name, sums, transposed in partials:
        parameter = getattr(params, name)
        out = gradients[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device=sums.device)
        matrix = out.unsqueeze(0) if out.dim() == 1 else out.t() if transposed else out
        sums = sums.view(sums.shape[0], -1, sums.shape[-1])
        N, K = matrix.shape
        tile = configs.sum_tile(N, K, context.target)
        items.append((sums, out, float(sums.shape[0]), N, K, *sums.stride()[:2], *matrix.stride()))
        tiles.append(tile)
        programs += cdiv(N, tile[1]) * cdiv(K, tile[2])
    if items:
        run(context, kernels().sum_partials, programs, items=tuple(items), TILES=tuple(tiles))
    return gradients

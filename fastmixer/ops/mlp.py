"""The two-pass MLP (kernels/mlp.py, kernels/mlp_bwd.py): channel mixing, and token mixing of long sequences.

Token mixing calls it with x's transposed strides: rows are (sample, channel) pairs then, not tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import TileConfig, cdiv, next_power_of_2
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.launch import Call, Descriptor, empty_hidden, is_describable, kernels, run
from fastmixer.ops.layouts import PackedLinear
from fastmixer.ops.reduce import Partial
from fastmixer.ops.row_moments import moments_constants
from fastmixer.params import Gradients, Needs


def _programs(call: Call, B: int, R: int, N: int, tiles: TileConfig, *, per_sample: bool) -> int:
    """Programs: one per tile of a (B * R, N) output, or one per multiprocessor.

    Tiles of token mixing never straddle two samples.
    """
    tiles_m = B * cdiv(R, tiles.block_m) if per_sample else cdiv(B * R, tiles.block_m)
    programs = tiles_m * cdiv(N, tiles.block_n)
    return min(programs, call.context.target.multiprocessors) if tiles.persistent else programs


class _Matrix(NamedTuple):
    """A matrix that a product reads or writes: (rows, >= columns), or (B, R, columns) with rows B * R.

    tensor: None where a launch does without. block: the rows and columns that a descriptor moves at a time.
    """

    tensor: Tensor | None
    columns: int
    block: tuple[int, int]

    def descriptor(self) -> Descriptor | None:
        """None where it cannot be described: rows are not evenly spaced, or not aligned."""
        rows = self.tensor
        if rows.dim() == 3:
            B, R, _ = rows.shape
            stride = rows.stride(0) if R == 1 else rows.stride(1)
            if 1 not in (B, R) and rows.stride(0) != R * stride:
                return None
            rows = rows.as_strided((B * R, self.columns), (stride, rows.stride(2)))
        rows = rows[:, : self.columns]
        return Descriptor(rows, self.block) if is_describable(rows) else None


def _described(
    tiles: TileConfig, matrices: dict[str, _Matrix], *, possible: bool = True
) -> tuple[TileConfig, dict[str, Tensor | Descriptor | None]]:
    """The tiles, and what a launch takes for each matrix: a descriptor if the tiles ask for it.

    Where one of them cannot be described, or it is not ``possible``, the same tiles are read by pointers.
    """
    pointers = {name: matrix.tensor for name, matrix in matrices.items()}
    if not tiles.descriptors:
        return tiles, pointers
    given = {name: matrix for name, matrix in matrices.items() if matrix.tensor is not None}
    found = {name: matrix.descriptor() for name, matrix in given.items()}
    if not possible or None in found.values():
        return replace(tiles, descriptors=False, persistent=False), pointers
    return tiles, pointers | found


def _parts(tiles: TileConfig, parts: int) -> int:
    """In how many parts the epilogue takes its columns: what it needs beside all of them fits no registers.

    parts: for tiles of up to 128 x 128.
    """
    return 4 if tiles.block_m * tiles.block_n > 128 * 128 else parts


def _tile_constants(tiles: TileConfig, depth: int, parts: int) -> dict[str, Any]:
    """The constexprs of a product so deep."""
    return {
        "EVEN_K": depth % tiles.block_k == 0, "DESCRIPTORS": tiles.descriptors,
        "PERSISTENT": tiles.persistent, "PARTS": parts, "GROUP_M": tiles.group_m,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
    }  # fmt: skip


def fc1(
    call: Call,
    packed: PackedLinear,
    x: Tensor,
    moments: Tensor,
    tiles: TileConfig,
    p: Tensor | None = None,
    *,
    ones: bool = False,
) -> Tensor:
    """gelu(fc1(LN(x))) of x (B, R, K), any strides: the hidden (B * R, N), rows padded.

    p: an ``empty_hidden``, filled with the pre-activation if given. ones: two follow on each row, then zeros.
    """
    B, R, K = x.shape
    N, params = call.problem.hidden, call.params
    fold, norms = packed.rank1 is not None, kernels().norm
    norm = norms.COLUMN if call.half == "token" else norms.FOLD if fold else norms.ROW
    hidden = empty_hidden(B * R, N, call.problem.dtype, x.device, ones=ones)
    parts = _parts(tiles, 2 - (p is None))
    stored = tiles.block_m, tiles.block_n // parts
    tiles, matrices = _described(tiles, {
        "x_ptr": _Matrix(x, K, (tiles.block_m, tiles.block_k)),
        "w_ptr": _Matrix(packed.weight, K, (tiles.block_n, tiles.block_k)),
        "hidden_ptr": _Matrix(hidden, N, stored), "p_ptr": _Matrix(p, N, stored),
    }, possible=fold)  # fmt: skip
    programs = _programs(call, B, R, N, tiles, per_sample=call.half == "token")
    run(
        call.context, kernels().fc1, programs, tiles, **matrices, moments_ptr=moments,
        gamma_ptr=None if fold else params.norm_weight, beta_ptr=None if fold else params.norm_bias,
        bias_ptr=packed.bias, rank1_ptr=packed.rank1, row_scale_ptr=packed.scale,
        B=B, R=R, N=N, K=K, T=moments.shape[2],
        stride_xb=x.stride(0), stride_xr=x.stride(1), stride_xk=x.stride(2),
        stride_wn=packed.weight.stride(0), stride_hm=hidden.stride(0),
        stride_pm=0 if p is None else p.stride(0), EPS=params.eps, NORM=norm,
        **moments_constants(moments, call.problem.channels), **call.gelu_constants(),
        ones_ptr=hidden if ones else None, ONES=next_power_of_2(hidden.shape[1] - N) if ones else 0,
        DTYPE=kernels().dtype[call.problem.dtype], **_tile_constants(tiles, K, parts),
    )  # fmt: skip
    return hidden


def fc2(
    call: Call,
    packed: PackedLinear,
    hidden: Tensor,
    x: Tensor,
    y: Tensor,
    tiles: TileConfig,
    y_moments: Tensor | None = None,
) -> None:
    """y = x + scale * fc2(hidden) for x, y (B, R, N), any strides, and hidden (B * R, K).

    Fills y_moments if given.
    """
    B, R, N = x.shape
    K = call.problem.hidden
    per_sample, parts = y_moments is not None, _parts(tiles, 2)
    operands = {
        "hidden_ptr": _Matrix(hidden, K, (tiles.block_m, tiles.block_k)),
        "w_ptr": _Matrix(packed.weight, K, (tiles.block_n, tiles.block_k)),
    }
    if per_sample:  # tokens are columns: a transposed matrix has no descriptor
        tiles, matrices = _described(tiles, operands)
        matrices |= {"x_ptr": x, "y_ptr": y}
    else:
        stored = tiles.block_m, tiles.block_n // parts
        operands |= {"x_ptr": _Matrix(x, N, stored), "y_ptr": _Matrix(y, N, stored)}
        tiles, matrices = _described(tiles, operands, possible=x.dtype == hidden.dtype)
    programs = _programs(call, B, R, N, tiles, per_sample=per_sample)
    run(
        call.context, kernels().fc2, programs, tiles, **matrices,
        bias_ptr=packed.bias, scale_ptr=call.scale, y_moments_ptr=y_moments,
        B=B, R=R, N=N, K=K, stride_hm=hidden.stride(0), stride_wn=packed.weight.stride(0),
        stride_xb=x.stride(0), stride_xr=x.stride(1), stride_xn=x.stride(2),
        stride_yr=y.stride(1), stride_yn=y.stride(2),
        **call.product_constants(), **_tile_constants(tiles, K, parts),
    )  # fmt: skip


def backward(
    call: Call,
    do: Tensor,
    make_n: Callable[[], Tensor],
    p: Tensor | None,
    fc1: PackedLinear | None,
    fc2: PackedLinear,
    needs: Needs,
) -> tuple[Tensor | None, Gradients, list[Partial]]:
    """The gradient of the pre-activation (M, hidden), those of the MLP's weights, and partial sums to come.

    Args:
        do: (B, R, K) gradient of what the MLP returns, dense, rows maybe padded, K tokens or channels.
        make_n: gives LN(x), laid out as do. Called when it is needed first: with p that is after the
            hidden is gone.
        p: (M, hidden), M = B * R, the pre-activation; or None: made again with fc1.
    """
    params, dtype, N, K = call.params, call.problem.dtype, call.problem.hidden, do.shape[-1]
    do = do.flatten(0, 1)
    M = do.shape[0]
    op, n = f"{call.half}_mlp_hidden_bwd", None
    if p is None:
        op, n = f"{op}_recompute", make_n().flatten(0, 1)
    else:
        fc1 = None
    tiles = call.tiles(op)

    like = M, N, dtype, do.device
    hidden = empty_hidden(*like) if needs.fc2_weight else None
    dp = empty_hidden(*like) if needs.before_fc1 or needs.fc1_weight else None
    tiles_m = cdiv(M, tiles.block_m)
    db1 = None
    if needs.fc1_bias:
        db1 = torch.empty((tiles_m, N), dtype=accumulate_dtype(dtype), device=do.device)
    # Quarters of 32 columns: on sm_90 (128, 128) by 8 warps then fits in 128 registers, twice on an SM.
    columns = min(tiles.block_n, max(tiles.block_n // 4, 32))
    tiles, matrices = _described(tiles, {
        "do_ptr": _Matrix(do, K, (tiles.block_m, tiles.block_k)),
        "w2_ptr": _Matrix(fc2.weight, N, (tiles.block_k, tiles.block_n)),
        "n_ptr": _Matrix(n, K, (tiles.block_m, tiles.block_k)),
        "w1_ptr": _Matrix(fc1.weight if fc1 else None, K, (tiles.block_n, tiles.block_k)),
        "hidden_ptr": _Matrix(hidden, N, (tiles.block_m, columns)),
        "dp_ptr": _Matrix(dp, N, (tiles.block_m, columns)),
    })  # fmt: skip
    programs = _programs(call, 1, M, N, tiles, per_sample=False)
    run(
        call.context, kernels().mlp_hidden_bwd, programs, tiles, **matrices, p_ptr=p,
        b1_ptr=fc1.bias if fc1 else None, db1_ptr=db1, M=M, N=N, K=K,
        stride_om=do.stride(0), stride_w2k=fc2.weight.stride(0),
        stride_pm=p.stride(0) if p is not None else 0,
        stride_nm=n.stride(0) if n is not None else 0, stride_w1n=fc1.weight.stride(0) if fc1 else 0,
        stride_hm=configs.round_up(N, configs.ALIGNED), **call.gelu_constants(),
        DTYPE=kernels().dtype[dtype], **_tile_constants(tiles, K, tiles.block_n // columns),
    )  # fmt: skip
    gradients: Gradients = {}
    if hidden is not None:
        gradients["fc2_weight"] = _product(call, do.t(), hidden[:, :N], params.fc2_weight.dtype)
    del hidden
    if dp is not None:
        dp = dp[:, :N]
    if needs.fc1_weight:
        n = make_n().flatten(0, 1) if n is None else n
        gradients["fc1_weight"] = _product(call, dp.t(), n, params.fc1_weight.dtype)
    return dp, gradients, [Partial("fc1_bias", db1)] * (db1 is not None)


def _product(call: Call, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b by PyTorch, rounded to the dtype of both and then to ``dtype``."""
    out = torch.empty((a.shape[0], b.shape[1]), dtype=a.dtype, device=a.device)
    call.context.call(torch.mm, a, b, out=out)
    return call.context.copied(out, dtype)

"""Host side of the kernels: allocate, choose tiles, compute the grid, launch. The only caller of kernels.

Arguments are trusted here; ``functional`` has checked them. Every launch is described by a ``Launch``, which
the context's ``execute`` runs. With tensors on the "meta" device and ``execute=list.append`` the very same
code records what would be launched: that is what ahead-of-time compilation compiles.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs
from .configs import Problem, Target, TileConfig, next_power_of_2, round_up
from .half import Half
from .packing import PackedLinear, WeightCache


@dataclass(frozen=True)
class Launch:
    """One kernel launch: every kernel parameter by name, and the compile options."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]


# The interpreter keeps the running program's index in a global: one launch at a time.
_interpreter_lock = threading.Lock()


def execute(launch: Launch) -> None:
    """Runs a launch on the current device and stream."""
    with _interpreter_lock if kernels().interpreted else contextlib.nullcontext():
        launch.kernel[launch.grid](**launch.args, **launch.options)


@dataclass(frozen=True)
class Context:
    """How to launch: for which target, with which tiles, and where packed weights are kept."""

    target: Target
    cache: WeightCache | None = None
    select: Callable[[str, Problem, Target], TileConfig | None] = configs.select
    execute: Callable[[Launch], None] = execute


class Moments(NamedTuple):
    """Partial row moments, (NUM_BLOCKS, 2, T), a full block ``count`` wide: ``kernels/row_moments.py``."""

    values: Tensor
    count: int


@functools.cache
def kernels() -> SimpleNamespace:
    """The device code, imported on first use: importing fastmixer does not import triton."""
    import triton.language as tl

    from . import interpreter

    interpreted = interpreter.is_interpreted()
    if interpreted:
        interpreter.install()
    from .kernels import activations, mlp, pack, row_moments, token_mixing

    dtypes = {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float64: tl.float64,
    }
    return SimpleNamespace(
        row_moments=row_moments._row_moments_fwd_kernel,
        pack_linear=pack._pack_linear_kernel,
        token_mixing=token_mixing._token_mixing_fwd_kernel,
        fc1=mlp._fc1_fwd_kernel,
        fc2=mlp._fc2_fwd_kernel,
        norm=SimpleNamespace(FOLD=mlp.FOLD.value, ROW=mlp.ROW.value, COLUMN=mlp.COLUMN.value),
        dtype=dtypes,
        interpreted=interpreted,
        gelu_terms=activations.polynomial_terms,
    )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and biases: float32, or float64 beside float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _launch(
    context: Context, kernel: Any, programs: int, tiles: TileConfig | None = None, **args: Any
) -> None:
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if tiles is not None:
        options |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    context.execute(Launch(kernel, (programs,), args, options))


def _math(half: Half, dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """The constexprs of a product with GELU."""
    terms = kernels().gelu_terms(kernels().dtype[dtype])
    return _precision(dtype, target) | {"APPROXIMATE": half.approximate, "POLYNOMIAL": terms}


def _precision(dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """The constexprs of a product; TF32 is used where PyTorch's own switch allows it and the GPU has it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = tf32 and (target.backend != "hip" or target.arch == "gfx942")
    return {"INPUT_PRECISION": "tf32" if tf32 else "ieee", "ACC": kernels().dtype[accumulator(dtype)]}


def row_moments(x: Tensor, context: Context) -> Moments:
    """Moments of the rows of x (B, S, C), any strides."""
    B, S, C = x.shape
    acc = accumulator(x.dtype)
    values = torch.empty((1, 2, B * S), dtype=acc, device=x.device)
    block_c = min(next_power_of_2(C), 1024)
    rows = 256 if context.target.backend == "interpreter" else max(1, 4096 // block_c)
    _launch(
        context, kernels().row_moments, -(-B * S // rows),
        x_ptr=x, moments_ptr=values, T=B * S, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ROWS=rows, BLOCK_C=block_c, ACC=kernels().dtype[acc],
    )  # fmt: skip
    return Moments(values, C)


def _pack(
    role: str,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    context: Context,
    *,
    shape: tuple[int, int] | None = None,
    norm: tuple[Tensor | None, Tensor | None] | None = None,
    bias_in_padding: bool = False,
) -> PackedLinear:
    """Weight (N, K) in the compute dtype, zero-padded to ``shape``; ``norm`` = (gamma, beta) is folded in.

    A weight that already is what the kernel reads is used as it is. Without ``shape`` only the distance
    between rows is padded, to what vectorised loads need.
    """
    N, K = weight.shape
    aligned = weight.stride(1) == 1 and weight.stride(0) % configs.ALIGNED == 0
    readable = aligned if shape is None else shape == (N, K) and weight.is_contiguous()
    if weight.dtype == dtype and readable and norm is None and not bias_in_padding:
        return PackedLinear(weight, bias)
    if shape is None:
        shape = (N, round_up(K, configs.ALIGNED))
    gamma, beta = norm or (None, None)

    def build() -> PackedLinear:
        acc = accumulator(dtype)
        packed = torch.empty(shape, dtype=dtype, device=weight.device)
        packed_bias = torch.empty(shape[0], dtype=acc, device=weight.device)
        rank1 = None if norm is None else torch.empty_like(packed_bias)
        block_k = min(next_power_of_2(shape[1]), 1024)
        block_n = 256 if context.target.backend == "interpreter" else max(1, 2048 // block_k)
        _launch(
            context, kernels().pack_linear, -(-shape[0] // block_n),
            w_ptr=weight, b_ptr=bias, gamma_ptr=gamma, beta_ptr=beta,
            packed_ptr=packed, bias_ptr=packed_bias, rank1_ptr=rank1,
            N=N, K=K, N_PAD=shape[0], K_PAD=shape[1], stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            FOLD_NORM=norm is not None, BIAS_IN_PADDING=bias_in_padding, ACC=kernels().dtype[acc],
            BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip
        has_bias = bias is not None or beta is not None
        return PackedLinear(packed, packed_bias if has_bias and not bias_in_padding else None, rank1)

    if context.cache is None:
        return build()
    settings = (dtype, shape, norm is not None, bias_in_padding)
    return context.cache.get(role, settings, (weight, bias, gamma, beta), build)


def _with_dense_vectors(half: Half) -> Half:
    """The half with contiguous norm parameters and biases: the kernels have no strides for them."""
    names = ("norm_weight", "norm_bias", "fc1_bias", "fc2_bias")
    vectors = {name: getattr(half, name) for name in names}
    return half._replace(**{name: t if t is None else t.contiguous() for name, t in vectors.items()})


def _sample_scale(half: Half, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The residual scale as one accumulator-typed number a sample, or None for 1."""
    scale = half.residual_scale
    if scale is None or (isinstance(scale, (int, float)) and scale == 1):
        return None
    if isinstance(scale, Tensor):
        return scale.to(accumulator(dtype)).reshape(-1).expand(batch).contiguous()
    return torch.full((batch,), scale, dtype=accumulator(dtype), device=device)


def token_mixing(x: Tensor, half: Half, dtype: torch.dtype, context: Context) -> tuple[Tensor, Moments]:
    """The token half of x (B, S, C), products in ``dtype``: the output, contiguous, and its row moments."""
    half = _with_dense_vectors(half)
    B, S, C = x.shape
    problem = Problem(B, S, C, half.fc1_weight.shape[0], x.dtype, dtype)
    tiles = context.select("token_mixing", problem, context.target)
    moments = row_moments(x, context)
    if tiles is None:
        return _token_mixing_two_pass(x, half, problem, moments, context)

    pieces = configs.token_pieces(S)
    s_pad, d_pad = sum(pieces), round_up(problem.hidden, tiles.block_n)
    has_bias = half.fc1_bias is not None
    # 16-bit only: TF32 would round the bias on its way through the product.
    bias_in_padding = has_bias and dtype.itemsize == 2 and s_pad >= S + 2
    fc1 = _pack(
        "token_fc1", half.fc1_weight, half.fc1_bias, dtype, context,
        shape=(d_pad, s_pad), bias_in_padding=bias_in_padding,
    )  # fmt: skip
    fc2 = _pack("token_fc2", half.fc2_weight, None, dtype, context, shape=(s_pad, d_pad))
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    blocks = -(-C // tiles.block_m)
    y_moments = torch.empty((blocks, 2, B * S), dtype=accumulator(dtype), device=x.device)
    _launch(
        context, kernels().token_mixing, B * blocks, tiles,
        x_ptr=x, x_moments_ptr=moments.values, gamma_ptr=half.norm_weight, beta_ptr=half.norm_bias,
        w1_ptr=fc1.weight, b1_ptr=fc1.bias, w2_ptr=fc2.weight, b2_ptr=half.fc2_bias,
        scale_ptr=_sample_scale(half, B, dtype, x.device), y_ptr=y, y_moments_ptr=y_moments,
        T=B * S, S=S, C=C, D=d_pad,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2), EPS=half.eps,
        P0=pieces[0], P1=pieces[1], P2=pieces[2], BIAS_IN_PADDING=bias_in_padding,
        **_math(half, dtype, context.target), BLOCK_C=tiles.block_m, BLOCK_D=tiles.block_n,
    )  # fmt: skip
    return y, Moments(y_moments, tiles.block_m)


def _token_mixing_two_pass(
    x: Tensor, half: Half, problem: Problem, moments: Moments, context: Context
) -> tuple[Tensor, Moments]:
    """Token mixing with the hidden (B, C, D) in memory: the MLP kernels on x's transposed strides."""
    B, S, C = x.shape
    rows = x.transpose(1, 2)  # (B, C, S), a view
    tiles = context.select("token_fc2", problem, context.target)
    blocks = -(-C // tiles.block_m)
    y_moments = torch.empty((blocks, 2, B * S), dtype=accumulator(problem.dtype), device=x.device)
    g = _fc1("token_fc1", rows, half, problem, moments, context, norm=kernels().norm.COLUMN)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    _fc2("token_fc2", g, rows, y.transpose(1, 2), half, problem, context, tiles, y_moments)
    return y, Moments(y_moments, tiles.block_m)


def channel_mixing(
    x: Tensor, half: Half, dtype: torch.dtype, context: Context, moments: Moments | None = None
) -> Tensor:
    """The channel half of x (B, S, C), with products in ``dtype``; ``moments`` of x's rows, if known."""
    half = _with_dense_vectors(half)
    B, S, C = x.shape
    problem = Problem(B, S, C, half.fc1_weight.shape[0], x.dtype, dtype)
    moments = moments or row_moments(x, context)
    # Folding rounds the raw x to the compute dtype. In a 16-bit x nothing is lost by that; an fp32 x would
    # lose digits as |mean| / std grows, so there the operand is normalised before it is rounded.
    fold = x.dtype == dtype and dtype.itemsize == 2
    norm = kernels().norm.FOLD if fold else kernels().norm.ROW
    if half.residual_scale is None and (B == 1 or x.stride(0) == S * x.stride(1)):
        x = x.as_strided((1, B * S, C), (0, x.stride(1), x.stride(2)))  # one matrix: rows need no division
    g = _fc1("channel_fc1", x, half, problem, moments, context, norm=norm)
    y = torch.empty((B, S, C), dtype=x.dtype, device=x.device)
    tiles = context.select("channel_fc2", problem, context.target)
    _fc2("channel_fc2", g, x, y.view(x.shape), half, problem, context, tiles, None)
    return y


def _tiles(B: int, R: int, N: int, tiles: TileConfig, *, per_sample: bool) -> int:
    """Tiles of a (B * R, N) output; those of token mixing never straddle two samples."""
    tiles_m = B * -(-R // tiles.block_m) if per_sample else -(-B * R // tiles.block_m)
    return tiles_m * -(-N // tiles.block_n)


def _fc1(
    role: str, x: Tensor, half: Half, problem: Problem, moments: Moments, context: Context, *, norm: int
) -> Tensor:
    """gelu(fc1(LN(x))) of x (B, R, K), any strides: the hidden (B * R, N), rows padded."""
    B, R, K = x.shape
    N, dtype = problem.hidden, problem.dtype
    tiles = context.select(role, problem, context.target)
    fold = norm == kernels().norm.FOLD
    fc1 = _pack(
        role, half.fc1_weight, half.fc1_bias, dtype, context,
        norm=(half.norm_weight, half.norm_bias) if fold else None,
    )  # fmt: skip
    g = torch.empty((B * R, round_up(N, configs.ALIGNED)), dtype=dtype, device=x.device)
    num_blocks = moments.values.shape[0]
    programs = _tiles(B, R, N, tiles, per_sample=norm == kernels().norm.COLUMN)
    _launch(
        context, kernels().fc1, programs, tiles,
        x_ptr=x, moments_ptr=moments.values,
        gamma_ptr=None if fold else half.norm_weight, beta_ptr=None if fold else half.norm_bias,
        w_ptr=fc1.weight, bias_ptr=fc1.bias, rank1_ptr=fc1.rank1, g_ptr=g,
        B=B, R=R, N=N, K=K, T=moments.values.shape[2], ONE_SAMPLE=B == 1,
        stride_xb=x.stride(0), stride_xr=x.stride(1), stride_xk=x.stride(2),
        stride_wn=fc1.weight.stride(0), stride_gm=g.stride(0), EPS=half.eps,
        COUNT=moments.count, NUM_BLOCKS=num_blocks, NUM_BLOCKS_P2=next_power_of_2(num_blocks), NORM=norm,
        **_math(half, dtype, context.target), EVEN_K=K % tiles.block_k == 0,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
    )  # fmt: skip
    return g


def _fc2(
    role: str,
    g: Tensor,
    x: Tensor,
    y: Tensor,
    half: Half,
    problem: Problem,
    context: Context,
    tiles: TileConfig,
    y_moments: Tensor | None,
) -> None:
    """y = x + scale * fc2(g) for x, y (B, R, N), any strides; g (B * R, K). Fills y_moments if given."""
    B, R, N = x.shape
    K, dtype = problem.hidden, problem.dtype
    fc2 = _pack(role, half.fc2_weight, half.fc2_bias, dtype, context)
    programs = _tiles(B, R, N, tiles, per_sample=y_moments is not None)
    _launch(
        context, kernels().fc2, programs, tiles,
        g_ptr=g, w_ptr=fc2.weight, bias_ptr=fc2.bias, scale_ptr=_sample_scale(half, B, dtype, x.device),
        x_ptr=x, y_ptr=y, y_moments_ptr=y_moments,
        B=B, R=R, N=N, K=K, ONE_SAMPLE=B == 1, stride_gm=g.stride(0), stride_wn=fc2.weight.stride(0),
        stride_xb=x.stride(0), stride_xr=x.stride(1), stride_xn=x.stride(2),
        stride_yr=y.stride(1), stride_yn=y.stride(2),
        **_precision(dtype, context.target), EVEN_K=K % tiles.block_k == 0,
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, GROUP_M=tiles.group_m,
    )  # fmt: skip

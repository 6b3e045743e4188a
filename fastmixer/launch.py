"""What every launch is made of: context, kernels, packed weights, and ``run``, the only way to a kernel.

Arguments are trusted here; ``functional`` has checked them. Every launch is described by a ``Launch``, which
the context's ``execute`` runs. With tensors on the "meta" device and ``execute=list.append`` the very same
code records what would be launched: that is what ahead-of-time compilation compiles.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterable
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
    select: Callable[[str, Problem, Target], configs.Choice] = configs.choose
    execute: Callable[[Launch], None] = execute


def context_of(
    device: torch.device, cache: WeightCache | None = None, *, kernels_only: bool = False
) -> Context:
    """How to launch on ``device``; ``kernels_only``: neither a half nor a product may be PyTorch's."""
    if kernels_only:
        return Context(configs.target_of(device), cache, select=configs.choose_kernels)
    return Context(configs.target_of(device), cache)


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


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
    from .kernels import (
        activations,
        epilogue,
        layer_norm,
        mlp,
        mlp_bwd,
        pack,
        reduce,
        row_moments,
        token_mixing,
        token_mixing_bwd,
    )

    dtypes = {
        torch.float16: tl.float16,
        torch.bfloat16: tl.bfloat16,
        torch.float32: tl.float32,
        torch.float64: tl.float64,
    }
    device_code = dict(
        row_moments=row_moments._row_moments_fwd_kernel,
        join_moments=row_moments._join_moments_kernel,
        pack_linear=pack._pack_linear_kernel,
        token_mixing=token_mixing._token_mixing_fwd_kernel,
        fc1=mlp._fc1_fwd_kernel,
        fc2=mlp._fc2_fwd_kernel,
        gelu_fwd=epilogue._gelu_fwd_kernel,
        residual_fwd=epilogue._residual_fwd_kernel,
        layer_norm_fwd=layer_norm._layer_norm_fwd_kernel,
        layer_norm_bwd=layer_norm._layer_norm_bwd_kernel,
        token_dgrad=token_mixing_bwd._token_mixing_dgrad_kernel,
        token_wgrad=token_mixing_bwd._token_mixing_wgrad_kernel,
        mlp_hidden_bwd=mlp_bwd._mlp_hidden_bwd_kernel,
        sum_partials=reduce._sum_partials_kernel,
    )
    if not interpreted:
        _hash_in_order(device_code.values())
    return SimpleNamespace(
        **device_code,
        norm=SimpleNamespace(FOLD=mlp.FOLD.value, ROW=mlp.ROW.value, COLUMN=mlp.COLUMN.value),
        dtype=dtypes,
        interpreted=interpreted,
        gelu_terms=activations.polynomial_terms,
    )


def _hash_in_order(kernels: Iterable[Any]) -> None:
    """Gives each kernel the key in Triton's cache on disk that it has in every other process.

    With Triton 3.6 the key depends on what the process hashed before: the constants of a function that a
    kernel calls count only where that one was hashed already. What the tuner's workers compile, and what is
    compiled ahead of time, would be compiled again.
    """
    for kernel in kernels:
        hash(kernel)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and biases: float32, or float64 beside float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run(context: Context, kernel: Any, programs: int, tiles: TileConfig | None = None, **args: Any) -> None:
    """Launches ``programs`` programs of a kernel with its parameters by name."""
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if tiles is not None:
        options |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    context.execute(Launch(kernel, (programs,), args, options))


def gelu_constants(half: Half, dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """The constexprs of a product with GELU."""
    return product_constants(dtype, target) | activation_constants(half, dtype)


def activation_constants(half: Half, dtype: torch.dtype) -> dict[str, Any]:
    """The constexprs of GELU."""
    terms = kernels().gelu_terms(kernels().dtype[dtype])
    acc = kernels().dtype[accumulator(dtype)]
    return {"APPROXIMATE": half.approximate, "POLYNOMIAL": terms, "ACC": acc}


def product_constants(dtype: torch.dtype, target: Target) -> dict[str, Any]:
    """The constexprs of a product; TF32 is used where PyTorch's own switch allows it and the GPU has it."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    tf32 = tf32 and (target.backend != "hip" or target.arch == "gfx942")
    return {"INPUT_PRECISION": "tf32" if tf32 else "ieee", "ACC": kernels().dtype[accumulator(dtype)]}


def row_moments(x: Tensor, context: Context) -> Moments:
    """Moments of the rows of x (B, S, C), any strides."""
    B, S, C = x.shape
    acc = accumulator(x.dtype)
    values = torch.empty((1, 2, B * S), dtype=acc, device=x.device)
    interpreted = context.target.backend == "interpreter"
    # Short rows a program: reductions stay inside a warp, and fewer lanes are masked (compiled: NOTES.md).
    block_c = min(next_power_of_2(C), 1024 if interpreted else 256)
    rows = 256 if interpreted else 2048 // block_c
    run(
        context, kernels().row_moments, -(-B * S // rows),
        x_ptr=x, moments_ptr=values, T=B * S, S=S, C=C,
        stride_xb=x.stride(0), stride_xs=x.stride(1), stride_xc=x.stride(2),
        ROWS=rows, BLOCK_C=block_c, ACC=kernels().dtype[acc],
    )  # fmt: skip
    return Moments(values, C)


def joined(moments: Moments, channels: int, context: Context) -> Moments:
    """The same moments in one block: (1, 2, T), whatever tile made them."""
    blocks, _, T = moments.values.shape
    if blocks == 1:
        return moments
    values = torch.empty((1, 2, T), dtype=moments.values.dtype, device=moments.values.device)
    blocks_p2 = next_power_of_2(blocks)
    rows = max(1, 1024 // blocks_p2)
    run(
        context, kernels().join_moments, -(-T // rows),
        moments_ptr=moments.values, joined_ptr=values, T=T, C=channels,
        COUNT=moments.count, NUM_BLOCKS=blocks, NUM_BLOCKS_P2=blocks_p2, ROWS=rows,
    )  # fmt: skip
    return Moments(values, channels)


def pack(
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
        run(
            context, kernels().pack_linear, -(-shape[0] // block_n),
            w_ptr=weight, b_ptr=bias, gamma_ptr=gamma, beta_ptr=beta,
            packed_ptr=packed, bias_ptr=packed_bias, rank1_ptr=rank1,
            N=N, K=K, N_PAD=shape[0], K_PAD=shape[1], stride_wn=weight.stride(0), stride_wk=weight.stride(1),
            FOLD_NORM=norm is not None, BIAS_IN_PADDING=bias_in_padding, ACC=kernels().dtype[acc],
            BLOCK_N=block_n, BLOCK_K=block_k,
        )  # fmt: skip
        has_bias = bias is not None or beta is not None
        return PackedLinear(packed, packed_bias if has_bias else None, rank1)

    if context.cache is None:
        return build()
    settings = (dtype, shape, norm is not None, bias_in_padding)
    return context.cache.get(role, settings, (weight, bias, gamma, beta), build)


def with_dense_vectors(half: Half) -> Half:
    """The half with contiguous norm parameters and biases: the kernels have no strides for them."""
    names = ("norm_weight", "norm_bias", "fc1_bias", "fc2_bias")
    vectors = {name: getattr(half, name) for name in names}
    return half._replace(**{name: t if t is None else t.contiguous() for name, t in vectors.items()})


def sample_scale(half: Half, batch: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """The residual scale as one accumulator-typed number a sample, or None for 1."""
    scale = half.residual_scale
    if scale is None or (isinstance(scale, (int, float)) and scale == 1):
        return None
    if isinstance(scale, Tensor):
        return scale.to(accumulator(dtype)).reshape(-1).expand(batch).contiguous()
    return torch.full((batch,), scale, dtype=accumulator(dtype), device=device)


class TokenWeights(NamedTuple):
    """Packed weights of one-pass token mixing, forward and backward alike."""

    fc1: PackedLinear  # (D_PAD, S_PAD)
    fc2: PackedLinear  # (S_PAD, D_PAD)
    bias_in_padding: bool  # of fc1: columns S and S + 1


def pack_token_weights(half: Half, problem: Problem, context: Context) -> TokenWeights:
    """Padded to the pieces of the token axis and to whole hidden blocks of every one-pass kernel."""
    s_pad = sum(configs.token_pieces(problem.tokens))
    # Powers of two: the largest is a multiple of the others.
    blocks = [context.select(op, problem, context.target).block_n for op in configs.ONE_PASS]
    d_pad = round_up(problem.hidden, max(blocks))
    # 16-bit only: TF32 would round the bias on its way through the product.
    spare = problem.dtype.itemsize == 2 and s_pad >= problem.tokens + 2
    bias_in_padding = half.fc1_bias is not None and spare
    fc1 = pack(
        "token_fc1", half.fc1_weight, half.fc1_bias, problem.dtype, context,
        shape=(d_pad, s_pad), bias_in_padding=bias_in_padding,
    )  # fmt: skip
    fc2 = pack("token_fc2", half.fc2_weight, None, problem.dtype, context, shape=(s_pad, d_pad))
    return TokenWeights(fc1, fc2, bias_in_padding)


def piece_constants(tokens: int) -> dict[str, int]:
    """The constexprs that cut the token axis."""
    return dict(zip(("P0", "P1", "P2"), configs.token_pieces(tokens), strict=True))


def empty_hidden(rows: int, hidden: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised (rows, hidden padded) tensor: how everything of the hidden's size lies in memory."""
    return torch.empty((rows, round_up(hidden, configs.ALIGNED)), dtype=dtype, device=device)

"""Recording on meta tensors: the launchers run as ever, but what they launch is kept instead of run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fastmixer.configs import Choice, Problem, Target, select_kernels
from fastmixer.ops.launch import Context, Launch
from fastmixer.params import MixingParams, Needs


@contextlib.contextmanager
def recording(
    target: Target, choose: Callable[[str, Problem, Target], Choice] = select_kernels, tf32: bool = False
) -> Iterator[tuple[Context, list[Launch]]]:
    """A context for the launchers, and the list that their launches are appended to.

    tf32: whether PyTorch's own switch allows TF32 for products of fp32 meanwhile.
    """
    launches: list[Launch] = []
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield Context(target, choose=choose, execute=launches.append), launches
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without data."""
    return torch.empty(shape, dtype=dtype, device="meta")


def meta_params(
    half: str, problem: Problem, *, bias: bool = True, scale: bool = False, approximate: str = "none"
) -> MixingParams:
    """Parameters of a half: the linear layers' in the products' dtype, LayerNorm's in that of x."""
    B, S, C, hidden, x_dtype, dtype = problem[:6]
    width = S if half == "token" else C
    return MixingParams(
        meta(C, dtype=x_dtype),
        meta(C, dtype=x_dtype) if bias else None,
        meta(hidden, width, dtype=dtype),
        meta(hidden, dtype=dtype) if bias else None,
        meta(width, hidden, dtype=dtype),
        meta(width, dtype=dtype) if bias else None,
        approximate=approximate,
        residual_scale=meta(B) if scale else None,
    )


def needs_of(params: MixingParams) -> Needs:
    """The gradients of x and of every parameter there is."""
    return Needs(True, *(parameter is not None for parameter in params[:6]))

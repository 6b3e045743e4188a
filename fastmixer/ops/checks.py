"""Argument checks of the public functions: everything wrong is named before anything is launched."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmixer.dtypes import dtype_name, product_dtype
from fastmixer.params import MixingParams

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
APPROXIMATE = ("none", "tanh")


def check_call(x: object, halves: dict[str, MixingParams]) -> torch.dtype:
    """The dtype of the products of a call; raises TypeError or ValueError unless all its arguments fit."""
    check_input(x)
    dtype, *others = [
        check_half(x, params, mixes=f"{half}s", prefix=f"{half}." if len(halves) > 1 else "")
        for half, params in halves.items()
    ]
    if others and others[0] != dtype:
        token, channel = (params.fc1_weight.dtype for params in halves.values())
        raise TypeError(
            f"token.fc1_weight and channel.fc1_weight must share one dtype, got {token} and {channel}"
        )
    return dtype


def check_input(x: object) -> None:
    """Raises TypeError or ValueError unless x is a floating-point tensor (B, S, C)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a torch.Tensor of shape (B, S, C), got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"x must be float16, bfloat16, float32 or float64, got {dtype_name(x.dtype)}")
    if x.dim() != 3:
        raise ValueError(f"x must have 3 dimensions (B, S, C), got shape {tuple(x.shape)}")
    if 0 in x.shape[1:]:
        raise ValueError(f"x must have at least one token and one channel, got shape {tuple(x.shape)}")


def check_half(x: Tensor, params: MixingParams, *, mixes: str, prefix: str = "") -> torch.dtype:
    """The dtype of the half's products: autocast's where it is on for x's device, else the weights'.

    Raises TypeError or ValueError naming the first argument of ``params`` that does not fit x (B, S, C).
    mixes: "tokens" or "channels", the axis that the half's MLP acts on; prefix: put before argument names.
    """
    B, S, C = x.shape
    width, axis = (S, "tokens") if mixes == "tokens" else (C, "channels")
    fc1 = params.fc1_weight
    for name in ("fc1_weight", "fc2_weight"):
        _check_tensor(prefix + name, getattr(params, name), x)
    if fc1.dim() != 2 or fc1.shape[1] != width or fc1.shape[0] == 0:
        raise ValueError(
            f"{prefix}fc1_weight must have shape (hidden, {width}) for x with {width} {axis} "
            f"(x has shape {tuple(x.shape)}), got {tuple(fc1.shape)}"
        )
    hidden = fc1.shape[0]
    shapes = {
        "fc2_weight": (width, hidden),
        "norm_weight": (C,),
        "norm_bias": (C,),
        "fc1_bias": (hidden,),
        "fc2_bias": (width,),
    }
    for name, shape in shapes.items():
        tensor = getattr(params, name)
        if tensor is None:
            continue
        _check_tensor(prefix + name, tensor, x)
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{prefix}{name} must have shape {shape} (x has shape {tuple(x.shape)}, {prefix}fc1_weight "
                f"{tuple(fc1.shape)}), got {tuple(tensor.shape)}"
            )
        if name.startswith("fc") and tensor.dtype != fc1.dtype:
            raise TypeError(
                f"the linear weights and biases must share one dtype: {prefix}fc1_weight is "
                f"{dtype_name(fc1.dtype)}, {prefix}{name} is {dtype_name(tensor.dtype)}"
            )
        if name.startswith("norm") and tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(
                f"{prefix}{name} must be {dtype_name(x.dtype)} like x"
                f"{'' if x.dtype == torch.float32 else ', or float32'}; got {dtype_name(tensor.dtype)}"
            )
    dtype = product_dtype(x.device, fc1.dtype)
    # What eager PyTorch could not multiply either.
    if dtype == fc1.dtype != x.dtype and not (x.dtype == torch.float32 and dtype.itemsize == 2):
        raise TypeError(
            f"{prefix}fc1_weight must be {dtype_name(x.dtype)} like x, or 16-bit beside a float32 x; "
            f"got {dtype_name(dtype)} beside {dtype_name(x.dtype)} and autocast is off"
        )
    _check_options(x, params, prefix)
    return dtype


def _check_tensor(name: str, tensor: object, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, got {dtype_name(tensor.dtype)}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _check_options(x: Tensor, params: MixingParams, prefix: str) -> None:
    if isinstance(params.eps, bool) or not isinstance(params.eps, (int, float)):
        raise TypeError(f"{prefix}eps must be a number, got {type(params.eps).__name__}")
    if not 0 <= params.eps < math.inf:
        raise ValueError(f"{prefix}eps must be finite and not negative, got {params.eps}")
    if params.approximate not in APPROXIMATE:
        raise ValueError(f"{prefix}approximate must be one of {APPROXIMATE}, got {params.approximate!r}")
    scale, B = params.residual_scale, x.shape[0]
    if scale is None:
        return
    if isinstance(scale, Tensor):
        _check_tensor(prefix + "residual_scale", scale, x)
        if scale.shape not in ((), (B,), (B, 1, 1)):
            raise ValueError(
                f"{prefix}residual_scale must have shape (), ({B},) or ({B}, 1, 1): one number per sample; "
                f"got {tuple(scale.shape)}"
            )
    elif isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(
            f"{prefix}residual_scale must be None, a number or a tensor, got {type(scale).__name__}"
        )

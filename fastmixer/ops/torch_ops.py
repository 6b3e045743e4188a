"""The halves as PyTorch operators: what ``torch.compile``, ``torch.export`` and ``make_fx`` see of them.

An operator is opaque to whoever traces it: it runs what an ordinary call would run, with tiles chosen for the
shapes of that run. Outside a trace nobody calls operators. Their derivatives are those of ``autograd.py``.

Shapes and dtypes are those of :mod:`fastmixer.functional`, which checks them: an operator does not.

dtype: that of the products. residual_factor: the residual scale where it is a number. kernels_only: as under
``backend("triton")``. Row moments are (1, 2, T), T = B S: the mean of each row of C elements and the sum of
squared deviations from it, in float32 (float64 for float64). A result that is not wanted is an empty tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import autograd, launch, packing
from fastmixer.ops import channel_mixing as channel
from fastmixer.ops import token_mixing as token
from fastmixer.ops.row_moments import joined
from fastmixer.params import ARGUMENTS, MixingParams, Needs

_HALF = (
    "Tensor? {0}norm_weight, Tensor? {0}norm_bias, Tensor {0}fc1_weight, Tensor? {0}fc1_bias, "
    "Tensor {0}fc2_weight, Tensor? {0}fc2_bias, Tensor? {0}residual_scale, float {0}residual_factor, "
    "float {0}eps, str {0}approximate"
)

# ---- what the results look like: all that a trace needs of them, and all there is of an empty batch --------


def _block_results(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


def _token_results(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype, wants_moments, _ = args
    y_moments = _moments(x, dtype) if wants_moments else x.new_empty(0, dtype=accumulate_dtype(dtype))
    return x.new_empty(x.shape), y_moments, _moments(x, x.dtype)


def _channel_results(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *arguments, dtype, x_moments, keeps_p, _ = args
    y, p = x.new_empty(x.shape), x.new_empty(0)
    if keeps_p:
        hidden = MixingParams.of_arguments(arguments).fc1_weight.shape[0]
        p = launch.empty_hidden(x.shape[0] * x.shape[1], hidden, dtype, x.device)
    return y, _moments(x, x.dtype) if x_moments is None else x_moments.new_empty(0), p


def _moments(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty((1, 2, x.shape[0] * x.shape[1]), dtype=accumulate_dtype(dtype))


def _backward_results(g: Tensor, *args: Any) -> list[Tensor]:
    *_, needs, _ = args
    params = MixingParams.of_arguments(args[3 : 3 + ARGUMENTS])
    tensors = zip((g, *params[:6]), needs, strict=True)
    return [tensor.new_zeros(tensor.shape) for tensor, needed in tensors if needed]


# ---- the operators ---------------------------------------------------------------------------------------


def _operator(name: str, schema: str, results: Callable) -> Callable:
    """Makes an operator of a function that takes a context instead of the last argument, ``kernels_only``."""

    def register(function: Callable) -> torch.library.CustomOpDef:
        @functools.wraps(function)
        def run(x: Tensor, *args: Any) -> Any:
            if x.numel() == 0:
                return results(x, *args)
            *args, kernels_only = args
            context = launch.context_of(x.device, kernels_only=kernels_only)
            with launch.device_of(x):
                return function(x, *args, context)

        operator = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
        operator.register_fake(results)
        return operator

    return register


@_operator(
    "fastmixer::mixer_block",
    f"(Tensor x, {_HALF.format('token_')}, {_HALF.format('channel_')}, ScalarType dtype, bool kernels_only)"
    " -> Tensor",
    _block_results,
)
def mixer_block(x: Tensor, *args: Any) -> Tensor:
    """Both halves without gradients: x (B, S, C) -> (B, S, C), contiguous, in x's dtype."""
    *arguments, dtype, context = args
    first = MixingParams.of_arguments(arguments[:ARGUMENTS])
    second = MixingParams.of_arguments(arguments[ARGUMENTS:])
    context = packing.pack_forward(x, {"token": first, "channel": second}, dtype, context)
    x, moments = token.forward(x, first, dtype, context)
    return channel.forward(x, second, dtype, context, moments)


@_operator(
    "fastmixer::token_mixing",
    f"(Tensor x, {_HALF.format('')}, ScalarType dtype, bool wants_moments, bool kernels_only)"
    " -> (Tensor, Tensor, Tensor)",
    _token_results,
)
def token_mixing(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The token half: x (B, S, C) -> the result (B, S, C), its row moments if they are wanted, those of x."""
    *_, wants_moments, context = args
    y, y_moments, x_moments = autograd.TokenMixing.compute(x, *args)
    return y, joined(y_moments, x.shape[2], context) if wants_moments else y_moments, x_moments


@_operator(
    "fastmixer::channel_mixing",
    f"(Tensor x, {_HALF.format('')}, ScalarType dtype, Tensor? moments, bool keeps_p, bool kernels_only)"
    " -> (Tensor, Tensor, Tensor)",
    _channel_results,
)
def channel_mixing(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The channel half: x (B, S, C) -> the result (B, S, C), the row moments of x, the pre-activation.

    moments: x's, (1, 2, T), where they are known; then they are not returned. The pre-activation, if keeps_p,
    is (T, E rounded up to 16) in dtype; its padding is not initialised.
    """
    return autograd.ChannelMixing.compute(x, *args)


_BACKWARD = (
    f"(Tensor g, Tensor? x, Tensor? moments, Tensor? p, {_HALF.format('')}, ScalarType dtype, bool[] needs, "
    "bool kernels_only) -> Tensor[]"
)


@_operator("fastmixer::token_mixing_backward", _BACKWARD, _backward_results)
def token_mixing_backward(g: Tensor, *args: Any) -> list[Tensor]:
    """The gradients that are needed, in the shapes of what they are of.

    g: (B, S, C), of the result; x, moments: what the forward read and returned; p: None; needs: one flag each
    for x, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight and fc2_bias, in this order.
    """
    return _gradients("token", g, *args)


@_operator("fastmixer::channel_mixing_backward", _BACKWARD, _backward_results)
def channel_mixing_backward(g: Tensor, *args: Any) -> list[Tensor]:
    """As ``token_mixing_backward``; p: the pre-activation that was kept, or None to have it recomputed."""
    return _gradients("channel", g, *args)


def _gradients(half: str, g: Tensor, *args: Any) -> list[Tensor]:
    *args, needs, context = args
    gradients = autograd.gradients(half, g, *args, Needs(*needs), context)
    return [gradients[name] for name, needed in zip(Needs._fields, needs, strict=True) if needed]


for _made, _function in ((token_mixing, autograd.TokenMixing), (channel_mixing, autograd.ChannelMixing)):
    _made.register_autograd(_function.backward, setup_context=_function.save)


def call(
    x: Tensor,
    halves: dict[str, MixingParams],
    dtype: torch.dtype,
    gradients: bool,
    *,
    lean: bool,
    kernels_only: bool,
) -> Tensor:
    """The halves, "token" and "channel", one after the other, in operators."""
    if not gradients and len(halves) == 2:
        arguments = [argument for params in halves.values() for argument in params.arguments()]
        return torch.ops.fastmixer.mixer_block(x, *arguments, dtype, kernels_only)
    moments = None
    for half, params in halves.items():
        arguments = params.arguments()
        if half == "token":
            wanted = "channel" in halves
            x, y_moments, _ = torch.ops.fastmixer.token_mixing(x, *arguments, dtype, wanted, kernels_only)
            moments = y_moments if wanted else None
        else:
            keeps_p = gradients and not lean and autograd.needs_of(x, params).hidden
            x = torch.ops.fastmixer.channel_mixing(x, *arguments, dtype, moments, keeps_p, kernels_only)[0]
    return x

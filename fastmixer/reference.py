"""The two halves of a Mixer block and the block itself in plain PyTorch: the truth and the fallback.

The operations and their order are those of eager PyTorch running the block as it was published
(https://arxiv.org/abs/2105.01601, section 2), so in any dtype the rounding is eager's own. Nothing here
checks its arguments: :mod:`fastmixer.functional` does, before it calls this or a kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmixer.dtypes import product_dtype
from fastmixer.params import MixingParams


def token_mixing(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    approximate: str = "none",
    residual_scale: float | Tensor | None = None,
) -> Tensor:
    """``x + scale * mlp(layer_norm(x)^T)^T``: the MLP mixes the tokens, every channel alike.

    Args:
        x: (B, S, C), any floating dtype; the result has its shape and dtype.
        norm_weight, norm_bias: (C,) or None; a wider dtype than x's is normalised in that wider dtype.
        fc1_weight, fc1_bias: (D, S), (D,) or None.
        fc2_weight, fc2_bias: (S, D), (S,) or None; of fc1_weight's dtype.
        eps: LayerNorm's epsilon.
        approximate: "none" (erf) or "tanh", as in ``torch.nn.GELU``.
        residual_scale: None, a float, or a tensor of shape (), (B,) or (B, 1, 1).

    Returns:
        (B, S, C) in x's dtype, strided as PyTorch makes it.

    Raises:
        RuntimeError: PyTorch's own, where shapes or dtypes do not go together.
    """
    n = _layer_norm(x, norm_weight, norm_bias, eps).transpose(1, 2)
    mixed = _mlp(n, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate).transpose(1, 2)
    return _add_residual(x, mixed, residual_scale)


def channel_mixing(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-6,
    approximate: str = "none",
    residual_scale: float | Tensor | None = None,
) -> Tensor:
    """``x + scale * mlp(layer_norm(x))``: the MLP mixes the channels, every token alike.

    Args:
        x: (B, S, C), any floating dtype; the result has its shape and dtype.
        norm_weight, norm_bias: (C,) or None; a wider dtype than x's is normalised in that wider dtype.
        fc1_weight, fc1_bias: (E, C), (E,) or None.
        fc2_weight, fc2_bias: (C, E), (C,) or None; of fc1_weight's dtype.
        eps: LayerNorm's epsilon.
        approximate: "none" (erf) or "tanh", as in ``torch.nn.GELU``.
        residual_scale: None, a float, or a tensor of shape (), (B,) or (B, 1, 1).

    Returns:
        (B, S, C) in x's dtype, strided as PyTorch makes it.

    Raises:
        RuntimeError: PyTorch's own, where shapes or dtypes do not go together.
    """
    n = _layer_norm(x, norm_weight, norm_bias, eps)
    mixed = _mlp(n, fc1_weight, fc1_bias, fc2_weight, fc2_bias, approximate)
    return _add_residual(x, mixed, residual_scale)


def mixer_block(x: Tensor, token: MixingParams, channel: MixingParams) -> Tensor:
    """The whole block: token mixing, then channel mixing.

    Args:
        x: (B, S, C), any floating dtype; the result has its shape and dtype.
        token, channel: the two halves.

    Raises:
        RuntimeError: as ``token_mixing``.
    """
    for mixing, params in ((token_mixing, token), (channel_mixing, channel)):
        *weights, eps, approximate, residual_scale = params
        x = mixing(x, *weights, eps=eps, approximate=approximate, residual_scale=residual_scale)
    return x


def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm over the last axis, in the widest dtype among x, weight and bias."""
    dtype = x.dtype
    for parameter in (weight, bias):
        if parameter is not None:
            dtype = torch.promote_types(dtype, parameter.dtype)
    weight, bias = (None if p is None else p.to(dtype) for p in (weight, bias))
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, eps)


def _mlp(
    n: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    approximate: str,
) -> Tensor:
    """fc2(gelu(fc1(n))) over the last axis of n, in the products' dtype."""
    # Under autocast F.linear would do this same cast itself; without it, it lets x be wider than the weights.
    n = n.to(product_dtype(n.device, fc1_weight.dtype))
    hidden = F.gelu(F.linear(n, fc1_weight, fc1_bias), approximate=approximate)
    return F.linear(hidden, fc2_weight, fc2_bias)


def _add_residual(x: Tensor, branch: Tensor, scale: float | Tensor | None) -> Tensor:
    """x + scale * branch, in x's dtype."""
    if isinstance(scale, Tensor) and scale.ndim > 0:
        scale = scale.reshape(-1, 1, 1)
    if scale is not None:
        branch = branch * scale
    return (x + branch).to(x.dtype)

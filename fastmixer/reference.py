"""The two halves of a Mixer block and the block itself in plain PyTorch: the truth and the fallback.

The operations and their order are those of eager PyTorch running the block as it was published
(https://arxiv.org/abs/2105.01601, section 2), so in any dtype the rounding is eager's own. Nothing here
checks its arguments: :mod:`fastmixer.functional` does, before it calls this or a kernel.
"""

from __future__ import annotations

import functools

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
    params = MixingParams(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, approximate, residual_scale
    )
    return _mix(x, params, along_tokens=True)


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
        x, norm_weight, norm_bias, eps, approximate, residual_scale: as for ``token_mixing``.
        fc1_weight, fc1_bias: (E, C), (E,) or None.
        fc2_weight, fc2_bias: (C, E), (C,) or None; of fc1_weight's dtype.

    Returns:
        (B, S, C) in x's dtype, strided as PyTorch makes it.

    Raises:
        RuntimeError: as ``token_mixing``.
    """
    params = MixingParams(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, approximate, residual_scale
    )
    return _mix(x, params, along_tokens=False)


def mixer_block(x: Tensor, token: MixingParams, channel: MixingParams) -> Tensor:
    """The whole block: token mixing, then channel mixing.

    Args:
        x: (B, S, C), any floating dtype; the result has its shape and dtype.
        token, channel: the two halves.

    Raises:
        RuntimeError: as ``token_mixing``.
    """
    return _mix(_mix(x, token, along_tokens=True), channel, along_tokens=False)


def _mix(x: Tensor, params: MixingParams, *, along_tokens: bool) -> Tensor:
    norm = params.norm_weight, params.norm_bias
    # LayerNorm runs in the widest dtype among those of x, weight and bias.
    dtypes = (t.dtype for t in norm if t is not None)
    dtype = functools.reduce(torch.promote_types, dtypes, x.dtype)
    weight, bias = (None if t is None else t.to(dtype) for t in norm)
    n = F.layer_norm(x.to(dtype), x.shape[-1:], weight, bias, params.eps)
    if along_tokens:
        n = n.transpose(1, 2)
    # Under autocast F.linear would do this same cast itself; without it, it lets x be wider than the weights.
    n = n.to(product_dtype(n.device, params.fc1_weight.dtype))
    hidden = F.gelu(F.linear(n, params.fc1_weight, params.fc1_bias), approximate=params.approximate)
    branch = F.linear(hidden, params.fc2_weight, params.fc2_bias)
    if along_tokens:
        branch = branch.transpose(1, 2)
    scale = params.residual_scale
    if isinstance(scale, Tensor) and scale.ndim > 0:
        scale = scale.reshape(-1, 1, 1)
    if scale is not None:
        branch = branch * scale
    return (x + branch).to(x.dtype)

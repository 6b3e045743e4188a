"""The two halves of an MLP-Mixer block, and the block, as functions.

MLP-Mixer: Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, equation 1.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .half import Half
from .packing import WeightCache


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
    """x + scale * MLP(LayerNorm(x)^T)^T: the token-mixing half, the MLP acting along the tokens.

    Args:
        x: (B, S, C), float16, bfloat16, float32 or float64; any strides; B may be 0.
        norm_weight, norm_bias: (C,) in x's dtype or float32, or None.
        fc1_weight: (D, S); fc1_bias: (D,) or None; fc2_weight: (S, D); fc2_bias: (S,) or None, as
            ``nn.Linear`` keeps them. One dtype: x's, or a 16-bit one beside a float32 x. Products run in it,
            or in autocast's dtype where autocast is on.
        eps: added to the variance, as in ``nn.LayerNorm``.
        approximate: "none" (erf) or "tanh", as in ``nn.GELU``.
        residual_scale: None (1), a number, or a tensor of shape (), (B,) or (B, 1, 1): stochastic depth.

    Returns:
        (B, S, C), contiguous, in x's dtype.

    Raises:
        TypeError, ValueError: naming the argument that does not fit, before anything is launched.
        RuntimeError: under ``backend("triton")`` when the kernels cannot run this call.
    """
    half = Half(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, approximate, residual_scale
    )
    return _run_half(x, half, "tokens")


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
    """x + scale * MLP(LayerNorm(x)): the channel-mixing half, the MLP acting along the channels.

    Args as for ``token_mixing``, with fc1_weight (E, C), fc1_bias (E,), fc2_weight (C, E), fc2_bias (C,).
    """
    half = Half(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, approximate, residual_scale
    )
    return _run_half(x, half, "channels")


def _run_half(x: Tensor, half: Half, mixes: str) -> Tensor:
    checks.check_input(x)
    checks.check_half(x, half, mixes=mixes)
    dtype = checks.compute_dtype(x, half)
    run_reference = reference.token_mixing if mixes == "tokens" else reference.channel_mixing
    if not dispatch.use_triton(x, dtype, half.tensors(), (half.residual_scale,)) or x.numel() == 0:
        return run_reference(x, **half._asdict())
    from . import autograd, configs, launch, launch_forward

    context = launch.Context(configs.target_of(x.device))
    with _device_of(x):
        if not _needs_gradients(x, half):
            with torch.no_grad():
                if mixes == "tokens":
                    return launch_forward.token_mixing(x, half, dtype, context)[0]
                return launch_forward.channel_mixing(x, half, dtype, context)
        if mixes == "tokens":
            return autograd.token_mixing(x, half, dtype, context)[0]
        lean = dispatch.current_memory() == "lean"
        return autograd.channel_mixing(x, half, dtype, context, None, lean=lean)


def mixer_block(x: Tensor, token: Half, channel: Half, *, cache: WeightCache | None = None) -> Tensor:
    """A whole Mixer block: ``token_mixing``, then ``channel_mixing``, in four launches.

    Args:
        x: (B, S, C) as for ``token_mixing``.
        token, channel: the parameters and options of the two halves.
        cache: keeps the packed weights between calls; without one they are packed anew in every call.

    Returns, raises: as ``token_mixing``; argument names are prefixed with ``token.`` or ``channel.``.
    """
    checks.check_input(x)
    checks.check_half(x, token, mixes="tokens", prefix="token.")
    checks.check_half(x, channel, mixes="channels", prefix="channel.")
    dtype = checks.compute_dtype(x, token)
    if checks.compute_dtype(x, channel) != dtype:
        raise TypeError(
            f"token.fc1_weight and channel.fc1_weight must share one dtype, got {token.fc1_weight.dtype} "
            f"and {channel.fc1_weight.dtype}"
        )
    scales = token.residual_scale, channel.residual_scale
    if not dispatch.use_triton(x, dtype, token.tensors() + channel.tensors(), scales) or x.numel() == 0:
        return reference.mixer_block(x, token, channel)
    from . import autograd, configs, launch, launch_forward

    context = launch.Context(configs.target_of(x.device), cache)
    with _device_of(x):
        if not _needs_gradients(x, token, channel):
            with torch.no_grad():
                y, moments = launch_forward.token_mixing(x, token, dtype, context)
                return launch_forward.channel_mixing(y, channel, dtype, context, moments)
        y, moments = autograd.token_mixing(x, token, dtype, context)
        lean = dispatch.current_memory() == "lean"
        return autograd.channel_mixing(y, channel, dtype, context, moments, lean=lean)


def _needs_gradients(x: Tensor, *halves: Half) -> bool:
    tensors = (x, *(t for half in halves for t in half[:6]))
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

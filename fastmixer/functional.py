"""The two halves of an MLP-Mixer block, and the block, as functions.

MLP-Mixer: Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, equation 1.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import checks, dispatch, reference
from .half import Half
from .packing import WeightCache

if TYPE_CHECKING:
    from .launch import Context

_REFERENCE = {"token": reference.token_mixing, "channel": reference.channel_mixing}


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
    return _run_half(x, half, "token")


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
    return _run_half(x, half, "channel")


def _run_half(x: Tensor, half: Half, of: str) -> Tensor:
    checks.check_input(x)
    checks.check_half(x, half, mixes=f"{of}s")
    dtype = checks.compute_dtype(x, half)
    if not dispatch.use_triton(x, dtype, half.tensors(), (half.residual_scale,)) or x.numel() == 0:
        return _REFERENCE[of](x, **half._asdict())
    return _run(x, {of: half}, dtype, _context(x))


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
    return _run(x, {"token": token, "channel": channel}, dtype, _context(x, cache))


def _context(x: Tensor, cache: WeightCache | None = None) -> Context:
    """How to launch on x's device; under backend("triton") neither a half nor a product is PyTorch's."""
    from . import configs, launch

    target = configs.target_of(x.device)
    if dispatch.current_backend() == "triton":
        return launch.Context(target, cache, select=configs.choose_kernels)
    return launch.Context(target, cache)


def _run(x: Tensor, halves: dict[str, Half], dtype: torch.dtype, context: Context) -> Tensor:
    """The halves, "token" and "channel", one after the other: each by the kernels or as it was chosen."""
    from . import autograd, launch_forward

    gradients = _needs_gradients(x, *halves.values())
    fused = autograd if gradients else launch_forward
    options = {"lean": dispatch.current_memory() == "lean"} if gradients else {}
    moments = None  # of x's rows, where the token half's kernel has left them
    with _device_of(x), contextlib.nullcontext() if gradients else torch.no_grad():
        for of, half in halves.items():
            if _reference_is_chosen(of, x, half, dtype, context, gradients):
                x = _REFERENCE[of](x, **half._asdict()).contiguous()
            elif of == "token":
                x, moments = fused.token_mixing(x, half, dtype, context)
            else:
                x = fused.channel_mixing(x, half, dtype, context, moments, **options)
    return x


def _reference_is_chosen(
    of: str, x: Tensor, half: Half, dtype: torch.dtype, context: Context, gradients: bool
) -> bool:
    """Whether this half is left to PyTorch, where it is faster; with gradients, forward and backward."""
    from .configs import Library, Problem

    if gradients and dispatch.current_memory() == "lean":
        return False  # PyTorch's half keeps what eager keeps
    problem = Problem(*x.shape, half.fc1_weight.shape[0], x.dtype, dtype)
    op = f"{of}_half_training" if gradients else f"{of}_half"
    return context.select(op, problem, context.target) is Library.REFERENCE


def _needs_gradients(x: Tensor, *halves: Half) -> bool:
    tensors = (x, *(t for half in halves for t in half[:6]))
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it x's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()

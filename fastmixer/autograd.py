"""The autograd Functions of the two halves: what the forward keeps, and for which gradients.

Only a half's input, its row moments and, in the channel half of ``memory("balanced")``, the pre-activation
are kept; parameters are referred to. ``needs_input_grad`` decides what of that is kept and what the backward
computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from . import launch, launch_backward, launch_forward
from .half import Half
from .launch import Context, Moments
from .launch_backward import Found, Needs


class Settings(NamedTuple):
    """What a half needs besides tensors."""

    eps: float
    approximate: str
    dtype: torch.dtype  # of the products
    context: Context
    moments_count: int = 0  # of the moments given for x, if any
    lean: bool = False


def token_mixing(x: Tensor, half: Half, dtype: torch.dtype, context: Context) -> tuple[Tensor, Moments]:
    """``launch_forward.token_mixing`` with gradients."""
    settings = Settings(half.eps, half.approximate, dtype, context)
    y, *moments = TokenMixing.apply(x, *half[:6], half.residual_scale, settings)
    return y, Moments(*moments)


def channel_mixing(
    x: Tensor, half: Half, dtype: torch.dtype, context: Context, moments: Moments | None, *, lean: bool
) -> Tensor:
    """``launch_forward.channel_mixing`` with gradients; ``lean`` keeps no pre-activation for them."""
    values, count = moments or (None, 0)
    settings = Settings(half.eps, half.approximate, dtype, context, count, lean)
    return ChannelMixing.apply(x, *half[:6], half.residual_scale, settings, values)


class TokenMixing(Function):
    """The token half: keeps x and its row moments, recomputes the hidden."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *args: Any) -> tuple[Tensor, Tensor, int]:
        half, settings = _half(args)
        moments = launch.row_moments(x, settings.context)
        y, y_moments = launch_forward.token_mixing(x, half, settings.dtype, settings.context, moments)
        recomputes = _needs(ctx).hidden
        _keep(ctx, half, settings, x if recomputes else None, moments if recomputes else None)
        ctx.mark_non_differentiable(y_moments.values)
        return y, *y_moments

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, g, lambda *args, p: launch_backward.token_mixing(*args), unused=2)


class ChannelMixing(Function):
    """The channel half: keeps x, its row moments and, unless lean, the pre-activation."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *args: Any) -> Tensor:
        *args, values = args
        half, settings = _half(args)
        dtype, context = settings.dtype, settings.context
        moments = Moments(values, settings.moments_count) if values is not None else None
        moments = moments or launch.row_moments(x, context)
        needs = _needs(ctx)
        p = None
        if needs.hidden and not settings.lean:
            p = launch.empty_hidden(x.shape[0] * x.shape[1], half.fc1_weight.shape[0], dtype, x.device)
        y = launch_forward.channel_mixing(x, half, dtype, context, moments, p=p)
        reads_x = needs.before_fc1 or needs.fc1_weight or (needs.hidden and settings.lean)
        _keep(ctx, half, settings, x if reads_x else None, moments if reads_x else None, p)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, g, launch_backward.channel_mixing, unused=3)


def _half(args: tuple) -> tuple[Half, Settings]:
    """The half and the settings, from a Function's arguments after x."""
    *parameters, scale, settings = args
    return Half(*parameters, settings.eps, settings.approximate, scale), settings


def _needs(ctx: FunctionCtx) -> Needs:
    return Needs(*ctx.needs_input_grad[: len(Needs._fields)])


def _keep(
    ctx: FunctionCtx,
    half: Half,
    settings: Settings,
    x: Tensor | None,
    moments: Moments | None,
    p: Tensor | None = None,
) -> None:
    scale = half.residual_scale
    tensor_scale = scale if isinstance(scale, Tensor) else None
    ctx.save_for_backward(x, moments.values if moments else None, p, *half[:6], tensor_scale)
    ctx.set_materialize_grads(False)
    ctx.settings = settings
    ctx.moments_count = moments.count if moments else 0
    ctx.number_scale = None if isinstance(scale, Tensor) else scale


def _backward(
    ctx: FunctionCtx, g: Tensor | None, run: Callable[..., Found], *, unused: int
) -> tuple[Tensor | None, ...]:
    """The gradients of a half's inputs, and None for its last ``unused`` ones."""
    if g is None:
        return (None,) * (len(Needs._fields) + unused)
    x, values, p, *parameters, scale = ctx.saved_tensors
    settings = ctx.settings
    scale = scale if scale is not None else ctx.number_scale
    half = Half(*parameters, settings.eps, settings.approximate, scale)
    moments = None if values is None else Moments(values, ctx.moments_count)
    # Every product here has the forward's dtype; an autocast that surrounds the backward must not change it.
    with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
        found = run(_plain(g), x, moments, half, settings.dtype, settings.context, _needs(ctx), p=p)
    found = tuple(found.get(name) for name in Needs._fields)
    return (*_differentiable_once(found, (g, x, *parameters)), *(None,) * unused)


def _plain(g: Tensor) -> Tensor:
    """g as memory that holds its values.

    Raises RuntimeError for a batch of gradients: ``is_grads_batched``, ``jacobian(vectorize=True)``.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(g) or torch._C._functorch.is_legacy_batchedtensor(g):
        raise RuntimeError(
            "fastmixer's fused backward takes one gradient at a time; for batched gradients run the forward "
            'under fastmixer.backend("torch")'
        )
    return g.clone() if g._is_zerotensor() else g.resolve_neg()


class _SecondBackward(Function):
    """Passes gradients on as functions of what they were computed from, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: FunctionCtx, count: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: FunctionCtx, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            "fastmixer's fused gradients can be differentiated once only; for second derivatives run the "
            'forward under fastmixer.backend("torch")'
        )


def _differentiable_once(
    found: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients; where they might be differentiated again (create_graph=True), so that this raises."""
    if not torch.is_grad_enabled():
        return found
    present = [gradient for gradient in found if gradient is not None]
    refused = iter(_SecondBackward.apply(len(present), *present, *sources))
    return tuple(None if gradient is None else next(refused) for gradient in found)

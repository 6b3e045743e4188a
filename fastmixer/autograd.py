"""The autograd Functions of the two halves: what the forward keeps, and for which gradients.

Only a half's input, its row moments and, in the channel half of ``memory("balanced")``, the pre-activation
are kept; parameters are referred to. ``needs_input_grad`` decides what of that is kept and what the backward
computes.

The same definitions serve PyTorch's operators (``operators.py``), whose calls are traced and not run: there
the last arguments are not a ``Context`` but what an operator can take in its place. ``compute`` and ``keep``
are what PyTorch calls forward and setup_context; left to PyTorch, the split costs tens of microseconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from . import configs, dispatch, launch, launch_backward, launch_forward
from .half import ARGUMENTS, Half
from .launch import Context, Moments
from .launch_backward import Found, Needs


def token_mixing(x: Tensor, half: Half, dtype: torch.dtype, context: Context) -> tuple[Tensor, Moments]:
    """``launch_forward.token_mixing`` with gradients; the moments are in one block."""
    y, y_moments, _ = TokenMixing.apply(x, *half.arguments(), dtype, True, context)
    return y, Moments(y_moments, x.shape[2])


def channel_mixing(
    x: Tensor, half: Half, dtype: torch.dtype, context: Context, moments: Moments | None, *, lean: bool
) -> Tensor:
    """``launch_forward.channel_mixing`` with gradients; ``lean`` keeps no pre-activation for them."""
    values = launch.joined(moments, x.shape[2], context).values if moments is not None else None
    keeps_p = not lean and needs_of(x, half).hidden
    return ChannelMixing.apply(x, *half.arguments(), dtype, values, keeps_p, context)[0]


def needs_of(x: Tensor, half: Half) -> Needs:
    """Which gradients a call that is about to be made will be asked for."""
    return Needs(*(tensor is not None and tensor.requires_grad for tensor in (x, *half[:6])))


class TokenMixing(Function):
    """The token half: keeps x and its row moments, recomputes the hidden.

    Of x, the half's ``arguments()``, the products' dtype, whether the output's moments are wanted, and how to
    launch. Gives the output, its moments and those of x, (1, 2, T) each; what is not wanted is empty.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = TokenMixing.compute(*inputs)
        TokenMixing.keep(ctx, inputs, output)
        return output

    @staticmethod
    def compute(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, dtype, wants_moments, context = args
        x_moments = launch.row_moments(x, context)
        y, y_moments = launch_forward.token_mixing(x, Half.of_arguments(arguments), dtype, context, x_moments)
        if not wants_moments:
            return y, _nothing(y_moments.values), x_moments.values
        return y, launch.joined(y_moments, x.shape[2], context).values, x_moments.values

    @staticmethod
    def keep(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, y_moments, x_moments = output
        ctx.mark_non_differentiable(y_moments, x_moments)
        recomputes = _needs(ctx).hidden
        x, arguments, (dtype, _, *how) = _parts(inputs)
        _keep(ctx, arguments, dtype, how, x if recomputes else None, x_moments if recomputes else None)

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, g, "token")


class ChannelMixing(Function):
    """The channel half: keeps x, its row moments and, unless lean, the pre-activation.

    Of x, the half's ``arguments()``, the products' dtype, the moments of x in one block or None, whether to
    keep the pre-activation, and how to launch. Gives the output, the moments of x if they were not given, and
    the pre-activation, rows padded; what is not there is empty.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = ChannelMixing.compute(*inputs)
        ChannelMixing.keep(ctx, inputs, output)
        return output

    @staticmethod
    def compute(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, dtype, values, keeps_p, context = args
        half = Half.of_arguments(arguments)
        found = Moments(values, x.shape[2]) if values is not None else launch.row_moments(x, context)
        p = None
        if keeps_p:
            p = launch.empty_hidden(x.shape[0] * x.shape[1], half.fc1_weight.shape[0], dtype, x.device)
        y = launch_forward.channel_mixing(x, half, dtype, context, found, p=p)
        moments = found.values if values is None else _nothing(values)
        return y, moments, _nothing(y) if p is None else p

    @staticmethod
    def keep(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, found, p = output
        ctx.mark_non_differentiable(found, p)
        x, arguments, (dtype, values, keeps_p, *how) = _parts(inputs)
        needs = _needs(ctx)
        reads_x = needs.before_fc1 or needs.fc1_weight or (needs.hidden and not keeps_p)
        moments = found if values is None else values
        _keep(
            ctx, arguments, dtype, how,
            x if reads_x else None, moments if reads_x else None, p if keeps_p else None,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        return _backward(ctx, g, "channel")


def gradients(
    of: str, g: Tensor, x: Tensor | None, values: Tensor | None, p: Tensor | None, *args: Any
) -> Found:
    """What the backward of ``of``, the "token" or "channel" half, finds for g and what ``_keep`` kept.

    args: the half's ``arguments()``, the products' dtype, Needs and context.
    """
    *arguments, dtype, needs, context = args
    half = Half.of_arguments(arguments)
    moments = None if values is None else Moments(values, g.shape[2])
    # Every product here has the forward's dtype; an autocast that surrounds the backward must not change it.
    with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
        if of == "token":
            return launch_backward.token_mixing(_plain(g), x, moments, half, dtype, context, needs)
        return launch_backward.channel_mixing(_plain(g), x, moments, half, dtype, context, needs, p=p)


def _nothing(like: Tensor) -> Tensor:
    """Stands for None among an operator's results."""
    return like.new_empty(0)


def _parts(inputs: tuple) -> tuple[Tensor, tuple, tuple]:
    """x, the half's ``arguments()``, and what follows them."""
    return inputs[0], inputs[1 : 1 + ARGUMENTS], inputs[1 + ARGUMENTS :]


def _needs(ctx: FunctionCtx) -> Needs:
    return Needs(*ctx.needs_input_grad[: len(Needs._fields)])


def _keep(
    ctx: FunctionCtx,
    arguments: tuple,
    dtype: torch.dtype,
    how: list,
    x: Tensor | None,
    moments: Tensor | None,
    p: Tensor | None = None,
) -> None:
    *tensors, number, eps, approximate = arguments
    ctx.save_for_backward(x, moments, p, *tensors)
    ctx.set_materialize_grads(False)
    ctx.options = number, eps, approximate, dtype
    # The backward packs what the weights are then, and in another layout.
    ctx.how = [replace(item, packed=None) if isinstance(item, Context) else item for item in how]


def _backward(ctx: FunctionCtx, g: Tensor | None, of: str) -> tuple[Tensor | None, ...]:
    """The gradients of a half's inputs, and None for those that have none."""
    inputs = len(ctx.needs_input_grad)
    if g is None:
        return (None,) * inputs
    needs = _needs(ctx)
    kept = ctx.saved_tensors
    how = _how_in_a_trace(*ctx.how) if dispatch.is_traced(g) else ctx.how
    if isinstance(how[0], Context):
        found = gradients(of, g, *kept, *ctx.options, needs, *how)
        found = _differentiable_once(tuple(map(found.get, Needs._fields)), (g, *kept))
    else:
        operator = getattr(torch.ops.fastmixer, f"{of}_mixing_backward")
        present = iter(operator(g, *kept, *ctx.options, list(needs), *how))
        found = tuple(next(present) if needed else None for needed in needs)
    return (*found, *(None,) * (inputs - len(found)))


def _how_in_a_trace(how: Any) -> tuple[bool]:
    """How to launch, for an operator: compiled autograd traces the backward of an ordinary forward."""
    return (how.select is configs.choose_kernels if isinstance(how, Context) else how,)


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

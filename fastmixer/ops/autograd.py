"""The autograd Functions of the two halves: what the forward keeps, and for which gradients.

The forward keeps only its input, the row moments of that and, in the channel half under
``memory("balanced")``, the pre-activation; parameters are referred to, not copied. ``needs_input_grad``
decides which of these are kept and which gradients the backward computes.

PyTorch's operators (``torch_ops.py``) have the same derivatives. PyTorch records an operator's call without
running it: there the last input is not a ``Context`` but the operator's own flag, from which the backward
operator makes one. ``compute`` and ``save`` are what PyTorch calls forward and setup_context; letting PyTorch
call the two separately would cost an ordinary call tens of microseconds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from fastmixer import configs, dispatch
from fastmixer.ops import channel_mixing, token_mixing
from fastmixer.ops.launch import Context, empty_hidden
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import ARGUMENTS, Gradients, MixingParams, Needs


def mix(
    half: str,
    x: Tensor,
    params: MixingParams,
    dtype: torch.dtype,
    context: Context,
    moments: Tensor | None = None,
    *,
    gradients: bool,
    lean: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The "token" or "channel" half of x (B, S, C), and of the token half the row moments of its output.

    Args:
        dtype: of the products.
        moments: the row moments of x, which the channel half computes where it gets none.
        gradients: whether autograd shall record it; lean: then the channel half keeps no pre-activation.
    """
    if half == "token":
        if gradients:
            return TokenMixing.apply(x, *params.arguments(), dtype, True, context)[:2]
        return token_mixing.forward(x, params, dtype, context)
    if gradients:
        keeps_p = not lean and needs_of(x, params).hidden
        return ChannelMixing.apply(x, *params.arguments(), dtype, moments, keeps_p, context)[0], None
    return channel_mixing.forward(x, params, dtype, context, moments), None


def needs_of(x: Tensor, params: MixingParams) -> Needs:
    """Which gradients a call that is about to be made will be asked for."""
    return Needs(*(tensor is not None and tensor.requires_grad for tensor in (x, *params[:6])))


class _Mixing(Function):
    """A half in general.

    Inputs: x, the ``arguments()`` of its MixingParams, the dtype of the products, the half's own inputs, and
    the context. Outputs: the half's output and two tensors that have no gradient.
    """

    @classmethod
    def forward(cls, ctx: FunctionCtx, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        output = cls.compute(*inputs)
        cls.save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, and None for those that have none."""
        inputs = len(ctx.needs_input_grad)
        if g is None:
            return (None,) * inputs
        needs, saved, launching = _needs(ctx), ctx.saved_tensors, ctx.launching
        if isinstance(launching, Context) and dispatch.is_traced(g):
            # Compiled autograd traces the backward of an ordinary forward: in operators, which take a flag.
            launching = launching.choose is configs.choose_kernels
        if isinstance(launching, Context):
            by_name = gradients(ctx.half, g, *saved, *ctx.options, needs, launching)
            results = _differentiable_once(tuple(map(by_name.get, Needs._fields)), (g, *saved))
        else:
            operator = getattr(torch.ops.fastmixer, f"{ctx.half}_mixing_backward")
            present = iter(operator(g, *saved, *ctx.options, list(needs), launching))
            results = tuple(next(present) if needed else None for needed in needs)
        return (*results, *(None,) * (inputs - len(results)))


class TokenMixing(_Mixing):
    """The token half: keeps x and its row moments, recomputes the hidden.

    Own input: whether the output's row moments are wanted. Outputs besides: these, or an empty tensor where
    they are not wanted, and the row moments of x.
    """

    @staticmethod
    def compute(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, dtype, wants_moments, context = args
        x_moments = row_moments(x, context)
        params = MixingParams.of_arguments(arguments)
        y, y_moments = token_mixing.forward(x, params, dtype, context, x_moments)
        return y, y_moments if wants_moments else y_moments.new_empty(0), x_moments

    @staticmethod
    def save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _save(ctx, "token", inputs, output, output[2], None)


class ChannelMixing(_Mixing):
    """The channel half: keeps x, its row moments and, unless lean, the pre-activation.

    Own inputs: the row moments of x or None, and whether to keep the pre-activation. Outputs besides: the row
    moments of x, or an empty tensor where they were an input, and the pre-activation, rows padded, or an
    empty tensor.
    """

    @staticmethod
    def compute(x: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, dtype, moments, keeps_p, context = args
        params = MixingParams.of_arguments(arguments)
        p = None
        if keeps_p:
            p = empty_hidden(x.shape[0] * x.shape[1], params.fc1_weight.shape[0], dtype, x.device)
        x_moments = row_moments(x, context) if moments is None else moments
        y = channel_mixing.forward(x, params, dtype, context, x_moments, p=p)
        made = x_moments if moments is None else moments.new_empty(0)
        return y, made, y.new_empty(0) if p is None else p

    @staticmethod
    def save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        *_, moments, keeps_p, _ = inputs
        _, made, p = output
        moments = made if moments is None else moments
        _save(ctx, "channel", inputs, output, moments, p if keeps_p else None)


def _save(
    ctx: FunctionCtx, half: str, inputs: tuple, output: tuple, moments: Tensor, p: Tensor | None
) -> None:
    """Saves what the backward reads of x, its moments and the pre-activation."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    x, *tensors, number, eps, approximate = inputs[: 1 + ARGUMENTS]
    dtype, launching, needs = inputs[1 + ARGUMENTS], inputs[-1], _needs(ctx)
    reads_x = needs.before_fc1 or needs.fc1_weight or (needs.hidden and p is None)
    ctx.save_for_backward(x if reads_x else None, moments if reads_x else None, p, *tensors)
    ctx.half, ctx.options = half, (number, eps, approximate, dtype)
    # The backward packs what the weights are then, and in another layout.
    ctx.launching = replace(launching, packed=None) if isinstance(launching, Context) else launching


def _needs(ctx: FunctionCtx) -> Needs:
    return Needs(*ctx.needs_input_grad[: len(Needs._fields)])


def gradients(
    half: str, g: Tensor, x: Tensor | None, moments: Tensor | None, p: Tensor | None, *args: Any
) -> Gradients:
    """The backward of ``half``, "token" or "channel", for the gradient g of its output.

    x, moments, p: what ``_save`` saved. args: the ``arguments()`` of its MixingParams, the dtype of the
    products, Needs and the context. Raises RuntimeError for a batch of gradients: ``is_grads_batched``,
    ``jacobian(vectorize=True)``.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(g) or torch._C._functorch.is_legacy_batchedtensor(g):
        raise RuntimeError(
            "fastmixer's fused backward takes one gradient at a time; for batched gradients run the forward "
            'under fastmixer.backend("torch")'
        )
    *arguments, dtype, needs, context = args
    params = MixingParams.of_arguments(arguments)
    # Every product here has the forward's dtype; an autocast that surrounds the backward must not change it.
    with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
        g = g.clone() if g._is_zerotensor() else g.resolve_neg()  # memory that holds its values
        if half == "token":
            return token_mixing.backward(g, x, moments, params, dtype, context, needs)
        return channel_mixing.backward(g, x, moments, params, dtype, context, needs, p=p)


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
    gradients: tuple[Tensor | None, ...], sources: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients; where they might be differentiated again (create_graph=True), so that this raises."""
    if not torch.is_grad_enabled():
        return gradients
    present = [gradient for gradient in gradients if gradient is not None]
    refusing = iter(_SecondBackward.apply(len(present), *present, *sources))
    return tuple(None if gradient is None else next(refusing) for gradient in gradients)

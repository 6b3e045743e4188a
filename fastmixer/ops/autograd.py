"""The autograd Function of a call of one or both halves.

Its forward keeps the input of each half, the row moments of that and, of the channel half under
``memory("balanced")``, the pre-activation; parameters are referred to, not copied. PyTorch's operators
(``torch_ops.py``) have the same derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from fastmixer import dispatch
from fastmixer.ops.launch import Context
from fastmixer.ops.mixing import Saved, Settings, backward, forward, needs_of, settings_of, tensors_of
from fastmixer.params import MixingParams

Run = Callable[..., Sequence[Tensor | None]]  # (forward or backward, settings, *its tensors)


def mix(
    x: Tensor, halves: dict[str, MixingParams], dtype: torch.dtype, context: Context, *, lean: bool = False
) -> Tensor:
    """The halves with products in ``dtype``, launched in ``context`` and without a plan."""
    tensors = tensors_of(x, halves)
    settings = settings_of(halves, dtype, needs_of(tensors), lean=lean)

    def run(what: Callable, settings: Settings, *tensors: Tensor | None) -> Sequence[Tensor | None]:
        with torch.no_grad():
            return what(settings, context, *tensors)

    run_forward = partial(run, forward, settings)
    return Mixing.apply(run_forward, run, settings, *tensors) if settings.needs else run_forward(*tensors)[0]


class Mixing(Function):
    """One or both halves.

    Inputs: a plan or another function that runs the forward, what runs the backward, settings, x and the
    tensors of each half.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, run: Callable, run_backward: Run, settings: Settings, *tensors: Any
    ) -> Tensor:
        y, *kept = run(*tensors)
        ctx.run, ctx.settings = run_backward, settings
        ctx.set_materialize_grads(False)
        save(ctx, tensors, kept)
        return y

    @staticmethod
    def backward(ctx: FunctionCtx, g: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs, and None for those that have none."""
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        saved, settings = ctx.saved_tensors, ctx.settings
        if dispatch.is_traced(g):  # compiled autograd traces the backward of an ordinary forward
            found = backward_in_operator(settings, g, *saved)
        else:
            found = _differentiable_once(gradients(ctx.run, settings, g, *saved), (g, *saved))
        return None, None, None, *by_input(found, len(settings.halves))


def backward_in_operator(settings: Settings, g: Tensor, *saved: Tensor | None) -> list[Tensor | None]:
    """What ``gradients`` returns, by the operator of ``torch_ops.py``."""
    operator, first = torch.ops.fastmixer.mixing_backward, 1 + len(Saved._fields)
    present = iter(operator(g, *saved[:first], *settings.arguments(saved[first:])))
    return [next(present) if needed else None for needed in settings.needs]


def save(ctx: FunctionCtx, tensors: Sequence[Tensor | None], kept: Sequence[Tensor | None]) -> None:
    """Saves what the backward reads; x only where its moments are kept."""
    x, *parameters = tensors
    ctx.save_for_backward(x if kept[0] is not None else None, *kept, *parameters)


def by_input(gradients: Sequence[Tensor | None], halves: int) -> tuple[Tensor | None, ...]:
    """Gradients of x and the parameters as those of x and all tensors of each half: the scale has none."""
    x, *parameters = gradients
    by_half = [(*parameters[6 * half : 6 * half + 6], None) for half in range(halves)]
    return (x, *(gradient for half in by_half for gradient in half))


def gradients(run: Run, settings: Settings, g: Tensor, *saved: Tensor | None) -> Sequence[Tensor | None]:
    """What ``backward`` returns, for any g.

    Raises RuntimeError for a batch of gradients: ``is_grads_batched``, ``jacobian(vectorize=True)``.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(g) or torch._C._functorch.is_legacy_batchedtensor(g):
        raise RuntimeError(
            "fastmixer's fused backward takes one gradient at a time; for batched gradients run the forward "
            'under fastmixer.backend("torch")'
        )
    # A hook of the user's may have left autocast on.
    with torch.no_grad(), torch.autocast(g.device.type, enabled=False):
        g = g.clone() if g._is_zerotensor() else g.resolve_neg()  # memory that holds its values
        return run(backward, settings, g, *saved)


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

"""The halves as PyTorch operators: what ``torch.compile``, ``torch.export`` and ``make_fx`` see of them.

An operator is opaque to whoever traces it: it runs what an ordinary call would run, by the plan for the
shapes of that run. Outside a trace nobody calls operators. Their derivatives are those of ``autograd.py``.

Shapes and dtypes are those of :mod:`fastmixer.functional`, which checks them: an operator does not.

halves: "token", "channel" or "block", which is both; of a half that is not in it all tensors are None. eps,
tanh: one for each half that is. dtype: of the products. kernels_only: as under ``backend("triton")``. needs:
one flag each for x and the six parameters of each half, whether a gradient of it is needed. lean: as under
``memory("lean")``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from fastmixer.configs import ALIGNED, round_up
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import autograd
from fastmixer.ops.mixing import TENSORS, Saved, Settings, forward, planned
from fastmixer.params import MixingParams

_NAMES = (*MixingParams._fields[:6], "residual_scale")
_PARAMETERS = ", ".join(f"Tensor? {half}_{name}" for half in ("token", "channel") for name in _NAMES)
_COUNT = 2 * TENSORS  # of parameters
_SETTINGS = f"{_PARAMETERS}, str halves, float[] eps, bool[] tanh, ScalarType dtype, bool kernels_only"
_TRAINING = f"{_SETTINGS}, bool[] needs, bool lean"


def _parsed(args: Sequence[Any]) -> tuple[Settings, list[Tensor | None]]:
    """The settings, and the tensors of the halves that there are."""
    settings = Settings.of_arguments(*args[_COUNT:])
    first = TENSORS if settings.halves[0][0] == "channel" else 0
    return settings, list(args[first : first + TENSORS * len(settings.halves)])


# ---- the operators: each with what its results look like, all that a trace needs to know -----------------


def _operator(name: str, schema: str, results: Callable) -> Callable:
    """Makes an operator of a function; of an empty batch nothing is launched."""

    def register(function: Callable) -> torch.library.CustomOpDef:
        def run(x: Tensor, *args: Any) -> Any:
            return results(x, *args) if x.numel() == 0 else function(x, *args)

        run.__doc__ = function.__doc__
        operator = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
        operator.register_fake(results)
        return operator

    return register


def _output(x: Tensor, *args: Any) -> Tensor:
    return x.new_empty(x.shape)


@_operator("fastmixer::mixing", f"(Tensor x, {_SETTINGS}) -> Tensor", _output)
def mixing(x: Tensor, *args: Any) -> Tensor:
    """The halves without gradients: x (B, S, C) -> (B, S, C), contiguous, in x's dtype."""
    settings, tensors = _parsed(args)
    return planned(forward, settings, x, *tensors)[0]


def _saved(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    settings, tensors = _parsed(args)
    saves, T, acc = Saved.of(settings), x.shape[0] * x.shape[1], accumulate_dtype(x.dtype)
    moments = [x.new_empty((1, 2, T) if saved else 0, dtype=acc) for saved in (saves.x_moments, saves.mid)]
    mid = x.new_empty(x.shape if saves.mid else 0)
    shape = (T, round_up(tensors[2 - TENSORS].shape[0], ALIGNED)) if saves.p else 0
    return x.new_empty(x.shape), moments[0], mid, moments[1], x.new_empty(shape, dtype=settings.dtype)


@_operator(
    "fastmixer::mixing_training",
    f"(Tensor x, {_TRAINING}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _saved,
)
def mixing_training(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """The halves, and what their backward reads: the output, x_moments, mid, mid_moments, p.

    Row moments are (1, 2, T), T = B S: the mean of each row of C elements and the sum of squared deviations
    from it, in float32 (float64 for float64). mid, (B, S, C): what the token half returns. p, (T, E rounded
    up to 16) in dtype: the channel half's pre-activation; its padding is not initialised. What is not read is
    an empty tensor.
    """
    settings, tensors = _parsed(args)
    y, *saved = planned(forward, settings, x, *tensors)
    acc = accumulate_dtype(x.dtype)
    dtypes = acc, x.dtype, acc, settings.dtype
    empty = (x.new_empty(0, dtype=dtype) for dtype in dtypes)
    return y, *(e if t is None else t for t, e in zip(saved, empty, strict=True))


def _gradients(g: Tensor, *args: Any) -> list[Tensor]:
    settings, tensors = _parsed(args[5:])
    named = [g, *(t for i, t in enumerate(tensors) if i % TENSORS < 6)]
    return [t.new_zeros(t.shape) for t, needed in zip(named, settings.needs, strict=True) if needed]


@_operator(
    "fastmixer::mixing_backward",
    f"(Tensor g, Tensor? x, Tensor? x_moments, Tensor? mid, Tensor? mid_moments, Tensor? p, {_TRAINING})"
    " -> Tensor[]",
    _gradients,
)
def mixing_backward(g: Tensor, *args: Any) -> list[Tensor]:
    """The gradients that are needed, in the shapes of what they are of.

    g: (B, S, C), of the output; x: the input; x_moments, mid, mid_moments, p: what ``mixing_training``
    returned, None where it is empty.
    """
    settings, tensors = _parsed(args[5:])
    found = autograd.gradients(planned, settings, g, *args[:5], *tensors)
    return [gradient for gradient in found if gradient is not None]


def _save(ctx: FunctionCtx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, *args = inputs
    ctx.settings, tensors = _parsed(args)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    saved = zip(output[1:], Saved.of(ctx.settings), strict=True)
    autograd.save(ctx, (x, *tensors), [tensor if saves else None for tensor, saves in saved])


def _backward(ctx: FunctionCtx, g: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    inputs = len(ctx.needs_input_grad)
    if g is None:
        return (None,) * inputs
    found = autograd.backward_in_operator(ctx.settings, g, *ctx.saved_tensors)
    x, *found = autograd.by_input(found, len(ctx.settings.halves))
    before = (None,) * (TENSORS if ctx.settings.halves[0][0] == "channel" else 0)
    return (x, *before, *found, *(None,) * (inputs - 1 - len(before) - len(found)))


mixing_training.register_autograd(_backward, setup_context=_save)


def call(settings: Settings, x: Tensor, *tensors: Tensor | None) -> Tensor:
    """The halves, in an operator."""
    arguments = settings.arguments(tensors)
    if settings.needs:
        return torch.ops.fastmixer.mixing_training(x, *arguments)[0]
    return torch.ops.fastmixer.mixing(x, *arguments)

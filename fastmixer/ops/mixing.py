"""A call of one or both halves: its settings, its forward and backward, and the plan for them.

``forward`` and ``backward`` launch what ``token_mixing.py`` and ``channel_mixing.py`` say; plans are recorded
of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import channel_mixing, launch, packing, plan, plan_recording, token_mixing
from fastmixer.ops.launch import Context, empty_hidden
from fastmixer.ops.layouts import PackedLinear
from fastmixer.ops.plan import Plan
from fastmixer.ops.row_moments import joined, row_moments
from fastmixer.params import MixingParams, Needs

# Tensors of a half: six parameters and the residual scale.
TENSORS = 7


class Settings(NamedTuple):
    """What a call is beside its tensors.

    halves: (half, eps, approximate) of each, "token" before "channel". dtype: of the products. needs: which
    of x and the six parameters of each half need a gradient, or () if nothing does. lean: the pre-activation
    is not kept. kernels_only: neither a half nor a product may be PyTorch's. traced: a call of an operator,
    whose halves were chosen in the trace, and whose moments are kept in one block, whatever tile made them.
    frozen: the packed layers are given, four tensors each, behind all others.
    """

    halves: tuple[tuple[str, float, str], ...]
    dtype: torch.dtype
    needs: tuple[bool, ...] = ()
    lean: bool = False
    kernels_only: bool = False
    traced: bool = False
    frozen: bool = False

    def arguments(self, tensors: Sequence[Tensor | None]) -> tuple:
        """What an operator takes behind x (``torch_ops.py``); the last two only where it trains."""
        names, eps, approximate = zip(*self.halves, strict=True)
        halves = "block" if len(names) == 2 else names[0]
        tanh = [name == "tanh" for name in approximate]
        before, behind = [None] * TENSORS * (halves == "channel"), [None] * TENSORS * (halves == "token")
        trains = (list(self.needs), self.lean) if self.needs else ()
        options = halves, [*map(float, eps)], tanh, self.dtype, self.kernels_only, *trains
        return *before, *tensors, *behind, *options

    @classmethod
    def of_arguments(
        cls, halves: str, eps: Sequence[float], tanh: Sequence[bool], dtype: torch.dtype, kernels_only: bool,
        needs: Sequence[bool] = (), lean: bool = False,
    ) -> Settings:  # fmt: skip
        """The inverse of ``arguments``."""
        names = ("token", "channel") if halves == "block" else (halves,)
        approximate = ["tanh" if flag else "none" for flag in tanh]
        named = tuple(zip(names, eps, approximate, strict=True))
        return cls(named, dtype, tuple(needs), lean, kernels_only, traced=True)

    def params(self, tensors: Sequence[Tensor | None]) -> dict[str, MixingParams]:
        """The halves, from ``TENSORS`` tensors each."""
        return {
            half: MixingParams(*tensors[i : i + 6], eps, approximate, tensors[i + 6])
            for i, (half, eps, approximate) in zip((0, TENSORS), self.halves, strict=False)
        }

    def needs_of(self) -> dict[str, Needs]:
        """Of each half; its x needs a gradient if anything before it does."""
        found, before = {}, self.needs[:1] == (True,)
        for i, (half, _, _) in enumerate(self.halves):
            own = self.needs[1 + 6 * i : 7 + 6 * i] or (False,) * 6
            found[half] = Needs(before, *own)
            before = before or any(own)
        return found


class Saved(NamedTuple):
    """What the forward keeps for the backward beside x: tensors, None where it is not kept.

    x_moments: (blocks, 2, T), the row moments of x, T = B S; x itself is kept where they are. mid: (B, S, C),
    what the channel half reads of the token half; mid_moments: its moments. p: (T, E rounded up to 16), the
    pre-activation of the channel half.
    """

    x_moments: Any
    mid: Any
    mid_moments: Any
    p: Any

    @classmethod
    def of(cls, settings: Settings) -> Saved:
        """For each whether it is kept."""
        needs = settings.needs_of()
        p = "channel" in needs and needs["channel"].hidden and not settings.lean
        reads = [
            n.before_fc1 or n.fc1_weight or (n.hidden and not (p and half == "channel"))
            for half, n in needs.items()
        ]
        return cls(reads[0], *[len(reads) == 2 and reads[1]] * 2, p)


def tensors_of(x: Tensor, halves: dict[str, MixingParams]) -> list[Tensor | None]:
    """x and ``TENSORS`` tensors of each half; a residual scale that is a number becomes one."""
    tensors = [x]
    for params in halves.values():
        scale = params.residual_scale
        if scale is not None and not isinstance(scale, Tensor):
            if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                raise TypeError(f"residual_scale: {type(scale).__name__}")  # named by ``checks``
            one = scale == 1
            scale = None if one else x.new_full(x.shape[:1], scale, dtype=accumulate_dtype(x.dtype))
        tensors += params[:6]
        tensors.append(scale)
    return tensors


def settings_of(
    halves: dict[str, MixingParams], dtype: torch.dtype, needs: tuple[bool, ...], **options: bool
) -> Settings:
    """The settings of a call with these halves."""
    named = tuple([(half, params.eps, params.approximate) for half, params in halves.items()])
    return Settings(named, dtype, needs, **options)


def needs_of(tensors: Sequence[Tensor | None]) -> tuple[bool, ...]:
    """Which of x and the parameters of the halves autograd records now, () if none."""
    if not torch.is_grad_enabled():
        return ()
    needs = [tensors[0].requires_grad]
    for i in range(1, len(tensors), TENSORS):
        needs += [t is not None and t.requires_grad for t in tensors[i : i + 6]]
    return tuple(needs) if True in needs else ()


def forward(settings: Settings, context: Context, x: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """The halves, one after the other: the output (B, S, C), contiguous, and ``Saved``."""
    halves, dtype, keeps = settings.params(tensors), settings.dtype, Saved.of(settings)
    first = replace(context, half=settings.halves[0][0])
    if settings.frozen:
        layers = [PackedLinear(*tensors[i : i + 4]) for i in range(len(halves) * TENSORS, len(tensors), 4)]
        packed = dict(zip(packing.roles(halves), layers, strict=True))
    else:
        packed = packing.pack_forward(x, halves, dtype, first)
    moments = x_moments = row_moments(x, first)
    mid = p = None
    if "token" in halves:
        own = replace(first, packed=packed)
        mid, moments = token_mixing.forward(x, halves["token"], dtype, own, x_moments)
        moments = joined(moments, x.shape[2], own) if settings.traced and keeps.mid else moments
        x = mid
    if "channel" in halves:
        own = replace(context, half="channel", packed=packed)
        if keeps.p:
            p = empty_hidden(x.shape[0] * x.shape[1], halves["channel"].fc1_weight.shape[0], dtype, x.device)
        overwrite = "token" in halves and not keeps.mid
        x = channel_mixing.forward(x, halves["channel"], dtype, own, moments, p=p, overwrite=overwrite)
    made = Saved(x_moments, mid, moments, p)
    return [x, *(tensor if kept else None for tensor, kept in zip(made, keeps, strict=True))]


def backward(
    settings: Settings,
    context: Context,
    g: Tensor,
    x: Tensor | None,
    x_moments: Tensor | None,
    mid: Tensor | None,
    mid_moments: Tensor | None,
    p: Tensor | None,
    *tensors: Tensor | None,
) -> list[Tensor | None]:
    """The gradients of x and of the six parameters of each half; None where it is not needed.

    g: the gradient of the output, (B, S, C), any strides. x and what follows: what ``Mixing`` saved. The
    weights are packed again, in another layout.
    """
    halves, needs = settings.params(tensors), settings.needs_of()
    found: dict[str, dict[str, Tensor]] = {}
    if "channel" in halves:
        args = (mid, mid_moments) if "token" in halves else (x, x_moments)
        own = replace(context, half="channel")
        found["channel"] = channel_mixing.backward(
            g, *args, halves["channel"], settings.dtype, own, needs["channel"], p=p
        )
    if "token" in halves and any(needs["token"]):
        g = found["channel"]["x"] if "channel" in halves else g
        own = replace(context, half="token")
        found["token"] = token_mixing.backward(
            g, x, x_moments, halves["token"], settings.dtype, own, needs["token"]
        )
    first = found.get(settings.halves[0][0], {})
    parameters = [found.get(half, {}).get(name) for half in halves for name in Needs._fields[1:]]
    return [first.get("x"), *parameters]


# ---- plans -----------------------------------------------------------------------------------------------


def key_of(what: Callable, settings: Settings, tensors: Sequence[Tensor | None]) -> tuple:
    """Whatever a plan of ``what``, ``forward`` or ``backward``, depends on.

    Raises RuntimeError for a tensor without memory or strides.
    """
    tf32 = settings.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision
    return what, settings, configs.edition(), tf32, launch.switches(), plan.seen(tensors)


def plan_of(key: tuple) -> Plan:
    """The plan for what ``key_of`` says, made if there is none."""
    found = plan.find(key)
    if isinstance(found, Plan):
        return found
    what, settings, *_, inputs = key
    context = launch.context_of(inputs[0][3], kernels_only=settings.kernels_only)
    made = plan_recording.record(lambda own, *metas: what(settings, own, *metas), context, inputs)
    # Another thread may have forced designs, or tuned, while this was made.
    return plan.keep(key, made) if key[2] == configs.edition() else made


def planned(what: Callable, settings: Settings, *tensors: Tensor | None) -> Sequence[Tensor | None]:
    """``forward`` or ``backward`` of these tensors, by a plan."""
    with launch.device_of(tensors[0]):
        return plan_of(key_of(what, settings, tensors))(*tensors)

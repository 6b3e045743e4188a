"""The two halves of an MLP-Mixer block, and the block, as functions.

MLP-Mixer: Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, equation 1. LayerNorm:
https://arxiv.org/abs/1607.06450; GELU: https://arxiv.org/abs/1606.08415; stochastic depth:
https://arxiv.org/abs/1603.09382. The parameters are those of ``torch.nn.LayerNorm``, ``Linear`` and ``GELU``.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastmixer import configs, dispatch, reference
from fastmixer.dtypes import product_dtype
from fastmixer.notices import constant_in_traces
from fastmixer.ops import autograd, checks, launch, mixing, packing, plan, torch_ops
from fastmixer.ops.layouts import Kept
from fastmixer.ops.mixing import Settings
from fastmixer.params import MixingParams

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
        fc1_weight, fc1_bias: (D, S), and (D,) or None.
        fc2_weight, fc2_bias: (S, D), and (S,) or None. All four as ``nn.Linear`` keeps them, in one dtype:
            x's, or a 16-bit one beside a float32 x, or under autocast one that it casts. Products run in it,
            or in autocast's dtype where autocast is on.
        eps: added to the variance, as in ``nn.LayerNorm``; finite and not negative.
        approximate: "none" (erf) or "tanh", as in ``nn.GELU``.
        residual_scale: None (1), a number, or a tensor of shape (), (B,) or (B, 1, 1), any floating dtype:
            stochastic depth. The kernels give no gradient of it.

    Returns:
        (B, S, C) in x's dtype; contiguous where the kernels run.

    Raises:
        TypeError: an argument is no tensor or number, or its dtype is none of these.
        ValueError: a shape, a device or an option does not fit. Both name the argument, before any launch.
        RuntimeError: under ``backend("triton")`` when the kernels cannot run this call.
    """
    params = MixingParams(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, approximate, residual_scale
    )
    return prepared(x, {"token": params})()


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

    Args:
        x, norm_weight, norm_bias, eps, approximate, residual_scale: as for ``token_mixing``.
        fc1_weight, fc1_bias: (E, C), and (E,) or None.
        fc2_weight, fc2_bias: (C, E), and (C,) or None. All four in one dtype, as for ``token_mixing``.

    Returns:
        (B, S, C) in x's dtype; contiguous where the kernels run.

    Raises:
        TypeError, ValueError, RuntimeError: as ``token_mixing``.
    """
    params = MixingParams(
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, eps, approximate, residual_scale
    )
    return prepared(x, {"channel": params})()


def mixer_block(x: Tensor, token: MixingParams, channel: MixingParams, *, kept: Kept | None = None) -> Tensor:
    """A whole Mixer block: ``token_mixing``, then ``channel_mixing``.

    Five launches where the kernels run both, six above 256 tokens, one of which packs weights;
    ``fastmixer.explain`` tells.

    Args:
        x: (B, S, C) as for ``token_mixing``.
        token, channel: the parameters and options of the two halves; products of one dtype.
        kept: packed weights that outlive the call, see ``fastmixer.freeze``; not used in a trace.

    Returns:
        (B, S, C) in x's dtype; contiguous where the kernels run.

    Raises:
        TypeError: as ``token_mixing``, or the products of the halves have different dtypes.
        ValueError, RuntimeError: as ``token_mixing``. Names are prefixed with ``token.`` or ``channel.``.
    """
    return prepared(x, {"token": token, "channel": channel}, kept)()


def prepared(x: Tensor, halves: dict[str, MixingParams], kept: Kept | None = None) -> Callable[[], Tensor]:
    """A call of one or both halves, ready to be made; made at once, as its tensors may change.

    What has to be decided is decided here, and found again when a call looks alike (``ops/plan.py``).

    Args:
        x: (B, S, C) as for ``token_mixing``.
        halves: the parameters and options of "token", "channel" or, in this order, both.
        kept: as for ``mixer_block``.

    Returns:
        What gives the result of ``token_mixing``, ``channel_mixing`` or ``mixer_block``.

    Raises:
        TypeError, ValueError, RuntimeError: as those.
    """
    key = decision = None
    layers: Sequence[Tensor | None] = ()
    if dispatch.is_ordinary(x):
        # Where an argument is no tensor, or keeps its values elsewhere: what that means is decided below.
        with contextlib.suppress(AttributeError, TypeError, RuntimeError):
            key, tensors = _signature(x, halves)
            kept = None if key and key[1].needs else kept
            decision, layers = (kept and kept.calls.get(key)) or (plan.find(key), ())
    if isinstance(decision, plan.Plan) and (layers or kept is None):
        return _planned(decision, key[1], *tensors, *layers)
    if decision is not None and not isinstance(decision, plan.Plan):
        return partial(decision, x, halves, kept)
    return _decided(x, halves, kept, key)


def _signature(x: Tensor, halves: dict[str, MixingParams]) -> tuple[tuple | None, list[Tensor | None]]:
    """Under what the decision for this call is kept, None if it is not, and the tensors that a plan takes."""
    backend = dispatch.current_backend()
    scales = [params.residual_scale for params in halves.values()]
    derives = torch.is_grad_enabled() and any(isinstance(s, Tensor) and s.requires_grad for s in scales)
    # True and a number of NumPy's are equal to one of Python's, and would be taken for it.
    if backend == "torch" or derives or any(type(p.eps) not in (float, int) for p in halves.values()):
        return None, []
    tensors = mixing.tensors_of(x, halves)
    settings = _settings(halves, product_dtype(x.device, tensors[3].dtype), tensors, backend)
    return mixing.key_of(mixing.forward, settings, tensors), tensors


def _settings(
    halves: dict[str, MixingParams], dtype: torch.dtype, tensors: list[Tensor | None], backend: str
) -> Settings:
    """What this call is beside its tensors.

    Exported programs keep little: they are for inference, most of them.
    """
    needs = mixing.needs_of(tensors)
    lean = bool(needs) and (dispatch.current_memory() == "lean" or dispatch.is_exported())
    return mixing.settings_of(halves, dtype, needs, lean=lean, kernels_only=backend == "triton")


def _planned(found: plan.Plan, settings: Settings, *tensors: Tensor | None) -> Callable[[], Tensor]:
    """The call by a plan, recorded by autograd where a gradient is needed."""
    if settings.needs:
        return partial(autograd.Mixing.apply, found, mixing.planned, settings, *tensors)
    return partial(found.first, *tensors)


def _decided(
    x: Tensor, halves: dict[str, MixingParams], kept: Kept | None, key: tuple | None
) -> Callable[[], Tensor]:
    """``prepared`` for a call that is not decided yet, or always anew; the decision is kept under ``key``."""
    dtype = checks.check_call(x, halves)
    is_traced, tensors, decision = dispatch.is_traced(x), [], None
    # Operators look for themselves whether the batch is empty: a trace may not know.
    if not dispatch.use_triton(x, dtype, *halves.values()) or (not is_traced and x.numel() == 0):
        decision = _by_reference
    else:
        tensors = mixing.tensors_of(x, halves)
        settings = _settings(halves, dtype, tensors, dispatch.current_backend())
        left = [_left_to_reference(half, x, params, settings, is_traced) for half, params in halves.items()]
        if any(left):
            decision = _left if len(halves) == 1 else _one_by_one
    if decision is not None:
        if key is not None:
            plan.keep(key, decision)
        return partial(decision, x, halves, kept)
    if is_traced:
        return partial(torch_ops.call, settings, *tensors)
    launch.kernels()  # a key says what Triton's switches are once they are loaded
    with launch.device_of(x):
        key = mixing.key_of(mixing.forward, settings, tensors)
        if kept is None or settings.needs:
            return _planned(mixing.plan_of(key), settings, *tensors)
        halves = settings.params(tensors[1:])  # as the plan knows them: a scale of 1 is none
        layers = packing.kept_layers(x, halves, dtype, kept, kernels_only=settings.kernels_only)
        tensors += layers
        found = mixing.plan_of(mixing.key_of(mixing.forward, settings._replace(frozen=True), tensors))
        kept.keep_call(key, found, layers)
        return _planned(found, settings, *tensors)


def _by_reference(x: Tensor, halves: dict[str, MixingParams], kept: Kept | None = None) -> Tensor:
    for half, params in halves.items():
        x = _REFERENCE[half](x, **params._asdict())
    return x


def _left(x: Tensor, halves: dict[str, MixingParams], kept: Kept | None) -> Tensor:
    return _by_reference(x, halves).contiguous()


def _one_by_one(x: Tensor, halves: dict[str, MixingParams], kept: Kept | None) -> Tensor:
    for half, params in halves.items():
        x = prepared(x, {half: params}, kept)()
    return x


# A traced program serves many batches: PyTorch's halves are chosen for this one.
_TRACED_BATCH = 64


def _left_to_reference(
    half: str, x: Tensor, params: MixingParams, settings: Settings, is_traced: bool
) -> bool:
    """Whether this half is left to PyTorch, where it is faster; with gradients, forward and backward."""
    training = bool(settings.needs)
    if training and settings.lean:  # PyTorch's half keeps what eager keeps
        return False
    # Sizes of parameters, as numbers: in a trace they may be symbols.
    width, hidden = map(operator.index, params.fc2_weight.shape)
    S, C = (width, x.shape[2]) if half == "token" else (x.shape[1], width)
    problem = _TRACED_BATCH if is_traced else x.shape[0], *map(operator.index, (S, C)), hidden
    problem += x.dtype, settings.dtype, params.approximate
    op = f"{half}_half_training" if training else f"{half}_half"
    return _is_reference(op, problem, x.device, settings.kernels_only)


@constant_in_traces
def _is_reference(op: str, problem: tuple, device: torch.device, kernels_only: bool) -> bool:
    """What was chosen for a half; problem: the fields of ``configs.Problem``."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return False  # a fake tensor's device
    context = launch.context_of(device, kernels_only=kernels_only)
    return context.choose(op, configs.Problem(*problem), context.target) is configs.Library.REFERENCE


def needs_gradients(x: Tensor, *halves: MixingParams) -> bool:
    """Whether a call with x and these halves is one that autograd records."""
    return bool(mixing.needs_of([x, *(t for params in halves for t in params.tensors())]))

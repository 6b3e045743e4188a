"""The two halves of an MLP-Mixer block, and the block, as functions.

MLP-Mixer: Tolstikhin et al. 2021, https://arxiv.org/abs/2105.01601, equation 1. LayerNorm:
https://arxiv.org/abs/1607.06450; GELU: https://arxiv.org/abs/1606.08415; stochastic depth:
https://arxiv.org/abs/1603.09382. The parameters are those of ``torch.nn.LayerNorm``, ``Linear`` and ``GELU``.
"""

from __future__ import annotations

import contextlib
import operator

import torch
from torch import Tensor

from fastmixer import configs, dispatch, reference
from fastmixer.notices import constant_in_traces
from fastmixer.ops import autograd, checks, launch, packing, torch_ops
from fastmixer.ops.launch import Context, problem_of
from fastmixer.ops.layouts import Kept
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
    return _run(x, {"token": params})


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
    return _run(x, {"channel": params})


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
    return _run(x, {"token": token, "channel": channel}, kept)


def _run(x: Tensor, halves: dict[str, MixingParams], kept: Kept | None = None) -> Tensor:
    """The halves, "token" and "channel", one after the other: each by the kernels or as it was chosen."""
    checks.check_input(x)
    dtype, *others = [
        checks.check_half(x, params, mixes=f"{half}s", prefix=f"{half}." if len(halves) > 1 else "")
        for half, params in halves.items()
    ]
    if others and others[0] != dtype:
        token, channel = (params.fc1_weight.dtype for params in halves.values())
        raise TypeError(
            f"token.fc1_weight and channel.fc1_weight must share one dtype, got {token} and {channel}"
        )
    use_triton = dispatch.use_triton(x, dtype, *halves.values())
    is_traced = dispatch.is_traced(x)
    # Operators look for themselves whether the batch is empty: a trace may not know.
    if not use_triton or (not is_traced and x.numel() == 0):
        for half, params in halves.items():
            x = _REFERENCE[half](x, **params._asdict())
        return x
    gradients = needs_gradients(x, *halves.values())
    # Exported programs are for inference, most of them.
    lean = gradients and (dispatch.current_memory() == "lean" or dispatch.is_exported())
    kernels_only = dispatch.current_backend() == "triton"
    if is_traced:
        return _trace(x, halves, dtype, gradients, lean=lean, kernels_only=kernels_only)
    context = launch.context_of(x.device, kept, kernels_only=kernels_only)
    # In lean memory never PyTorch's half: it keeps what eager keeps.
    fused_halves = {
        half: params
        for half, params in halves.items()
        if lean or not _reference_is_chosen(half, problem_of(x, params, dtype), context, gradients)
    }
    moments = None  # of x's rows, where the token half's kernel has left them
    with launch.device_of(x):
        with torch.no_grad():
            context = packing.pack_forward(x, fused_halves, dtype, context)
        with contextlib.nullcontext() if gradients else torch.no_grad():
            for half, params in halves.items():
                if half not in fused_halves:
                    x = _REFERENCE[half](x, **params._asdict()).contiguous()
                else:
                    x, moments = autograd.mix(
                        half, x, params, dtype, context, moments, gradients=gradients, lean=lean
                    )
    return x


# A traced program serves many batches: PyTorch's halves are chosen for this one.
_TRACED_BATCH = 64


def _trace(
    x: Tensor,
    halves: dict[str, MixingParams],
    dtype: torch.dtype,
    gradients: bool,
    *,
    lean: bool,
    kernels_only: bool,
) -> Tensor:
    """``_run`` for a call that is traced: in operators."""
    left_to_reference = set()
    for half, params in halves.items():
        # Sizes of parameters, as numbers: in a trace they may be symbols.
        width, hidden = params.fc2_weight.shape
        S, C = (width, x.shape[2]) if half == "token" else (x.shape[1], width)
        problem = _TRACED_BATCH, *map(operator.index, (S, C, hidden)), x.dtype, dtype
        if not lean and _chosen_for_a_trace(half, problem, x.device, gradients, kernels_only):
            left_to_reference.add(half)
    groups = [{half: params} for half, params in halves.items()] if left_to_reference else [halves]
    for group in groups:
        (half, params), *_ = group.items()
        if half in left_to_reference:
            x = _REFERENCE[half](x, **params._asdict()).contiguous()
        else:
            x = torch_ops.call(x, group, dtype, gradients, lean=lean, kernels_only=kernels_only)
    return x


def _reference_is_chosen(half: str, problem: configs.Problem, context: Context, gradients: bool) -> bool:
    """Whether this half is left to PyTorch, where it is faster; with gradients, forward and backward."""
    op = f"{half}_half_training" if gradients else f"{half}_half"
    return context.choose(op, problem, context.target) is configs.Library.REFERENCE


@constant_in_traces
def _chosen_for_a_trace(
    half: str, problem: tuple, device: torch.device, gradients: bool, kernels_only: bool
) -> bool:
    """``_reference_is_chosen`` of what a trace knows; problem: the fields of ``configs.Problem``."""
    if device.type == "cuda" and not torch.cuda.is_available():
        return False  # a fake tensor's device
    context = launch.context_of(device, kernels_only=kernels_only)
    return _reference_is_chosen(half, configs.Problem(*problem), context, gradients)


def needs_gradients(x: Tensor, *halves: MixingParams) -> bool:
    """Whether a call with x and these halves is one that autograd records."""
    tensors = (x, *(t for params in halves for t in params[:6]))
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

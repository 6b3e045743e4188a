"""The cost model: what a launch, a half or a block is predicted to take.

Uses: ``explain``, pruning the tuner's search, the column "predicted" of a benchmark; and the few choices that
``choice.py`` names.

``kernels`` and ``library`` hold the model and its assumptions. Nothing here has been timed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmixer.configs.ops import HALVES, OPS, TRAINING
from fastmixer.configs.predict.kernels import Prediction, estimated, tiled, total
from fastmixer.configs.predict.library import library_gemm, library_product, passes, reference_half
from fastmixer.configs.problem import Choice, Library, Problem, TileConfig
from fastmixer.configs.resources import Resources, find
from fastmixer.configs.targets import Device, Target, device_data
from fastmixer.configs.tiles import wgrad_in_one_launch

Select = Callable[[str, Problem, Target], Choice]


def predict(
    op: str, problem: Problem, choice: Choice, device: Device, resources: Resources | None
) -> Prediction:
    """The predicted time of ``op``.

    Args:
        op: an op of ``select`` or "row_moments"; of the halves in training both directions.
        problem: of the op; the real batch.
        choice: the tiles or the Library that runs it; of "row_moments" None, of the halves REFERENCE.
        device: what is known of the GPU.
        resources: what the compiled code of these tiles needs; None: not recorded, see ``estimated``.

    Raises:
        ValueError: there is no prediction for this op with this choice, or not one program of it fits.
    """
    if op == "row_moments":
        B, S, C, _, x_dtype, _ = problem
        return passes([B * S * C * x_dtype.itemsize + 2 * 4 * B * S], device)
    if choice is Library.REFERENCE and op in HALVES:
        forward = reference_half(op, problem, device)
        # The backward: twice the products of the forward, and about twice its passes.
        return total([forward] * 3) if op.endswith(TRAINING) else forward
    if choice is Library.ATEN and op in OPS and OPS[op].library:
        return library_product(op, problem, device)
    if not isinstance(choice, TileConfig):
        raise ValueError(f"choice: expected tiles or a Library that runs {op!r}, got {choice!r}")
    return tiled(op, problem, choice, device, resources or estimated(op, problem, choice, device.target))


def predict_launch(op: str, problem: Problem, choice: Choice, target: Target) -> Prediction | None:
    """``predict`` with what is known of the target: None if nothing is, or no program of the choice fits."""
    device = device_data(target)
    if device is None:
        return None
    resources = find(op, problem, choice, target) if isinstance(choice, TileConfig) else None
    try:
        return predict(op, problem, choice, device, resources)
    except ValueError:
        return None


def predict_pass(moved: int, target: Target) -> Prediction | None:
    """A launch that moves so many bytes and does nothing else; None if nothing is known of the target."""
    device = device_data(target)
    return None if device is None else passes([moved], device)


def predict_half(
    op: str, problem: Problem, target: Target, select: Select, *, moments: bool = True
) -> dict[str, Prediction]:
    """The launches of a half, by op, as ``select`` chooses them.

    op: a half of ``select``, in training with its backward; ``moments``: the half reads x for its row moments
    first, as it does unless another half has left them. Empty if nothing is known of the target.
    """
    forward = half_ops(op, problem, target, select, moments=moments)
    return _predicted(forward, problem, target, select) | _backward(op, problem, target, select)


def half_ops(op: str, problem: Problem, target: Target, select: Select, *, moments: bool = True) -> list[str]:
    """The ops of a half's forward, in order: ``op`` itself where PyTorch runs it."""
    if select(op, problem, target) is Library.REFERENCE:
        return [op]
    if op.startswith("channel"):
        ops = ["channel_fc1", "channel_fc2"]
    else:
        one_pass = select("token_mixing", problem, target) is not None
        ops = ["token_mixing"] if one_pass else ["token_fc1", "token_fc2"]
    return ["row_moments"] * moments + ops


def _predicted(ops: list[str], problem: Problem, target: Target, select: Select) -> dict[str, Prediction]:
    choices = {op: None if op == "row_moments" else select(op, problem, target) for op in ops}
    launches = {op: predict_launch(op, problem, choice, target) for op, choice in choices.items()}
    return {op: prediction for op, prediction in launches.items() if prediction is not None}


def predict_block(
    tokens: int, channels: int, token_hidden: int, channel_hidden: int, batch: int, dtype: torch.dtype,
    x_dtype: torch.dtype, target: Target, select: Select, training: bool = False,
) -> dict[str, Prediction]:  # fmt: skip
    """Every launch of a block's forward, and with ``training`` of its backward, by name.

    dtype: of the products; x_dtype: of the activations; select: such as ``configs.select``. The backward
    is that of ``memory("balanced")``; packing weights and sums of partials are left out, a few microseconds
    each; a half that PyTorch trains is one entry. Empty if nothing is known of the target's GPU.
    """
    token = Problem(batch, tokens, channels, token_hidden, x_dtype, dtype)
    channel = token._replace(hidden=channel_hidden)
    token_half, channel_half = (f"{half}_half{TRAINING if training else ''}" for half in ("token", "channel"))
    launches = _predicted(half_ops(token_half, token, target, select), token, target, select)
    fused = token_half not in launches  # then it leaves the channel half its moments
    ops = half_ops(channel_half, channel, target, select, moments=not fused)
    for op, prediction in _predicted(ops, channel, target, select).items():
        launches["channel_row_moments" if op == "row_moments" else op] = prediction
    launches |= _backward(token_half, token, target, select)
    return launches | _backward(channel_half, channel, target, select)


def backward_ops(op: str, problem: Problem, target: Target, select: Select) -> list[str]:
    """The ops of a half's backward that have tiles, in order; none unless ``op`` is one in training."""
    if not op.endswith(TRAINING):
        return []
    if op.startswith("channel"):
        return ["channel_mlp_hidden_bwd"]
    if select("token_dgrad", problem, target) is None:
        return ["token_mlp_hidden_bwd_recompute"]
    both = wgrad_in_one_launch(problem, target)
    return ["token_dgrad", "token_wgrad_fc1"] + ["token_wgrad_fc2"] * (not both)


def _backward(op: str, problem: Problem, target: Target, select: Select) -> dict[str, Prediction]:
    """The launches of the backward of a half in training, where the kernels run it."""
    device = device_data(target)
    if device is None or not op.endswith(TRAINING) or select(op, problem, target) is Library.REFERENCE:
        return {}
    B, S, C, H, x_dtype, dtype = problem
    half, rows, width = ("token", B * C, S) if op.startswith("token") else ("channel", B * S, C)
    elements, x, it = B * S * C, x_dtype.itemsize, dtype.itemsize
    launches = {  # n made again, and the pass that finishes dx: it reads g, x and dn
        f"{half}_layer_norm_fwd": passes([elements * (x + it)], device),
        f"{half}_layer_norm_bwd": passes([elements * (3 * x + it)], device),
    }
    ops = backward_ops(op, problem, target, select)
    launches |= _predicted(ops, problem, target, select)
    if "token_dgrad" not in ops:  # which makes its products itself; the library makes the others
        sizes = {"dn": (rows, width, H), "dw1": (H, width, rows), "dw2": (width, H, rows)}
        launches |= {f"{half}_{name}": library_gemm(*size, dtype, device) for name, size in sizes.items()}
    return launches

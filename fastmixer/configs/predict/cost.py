"""The cost model: what a launch, a half or a block is predicted to take. Nothing here has been timed.

Uses: ``explain``, pruning the tuner's search, the column "predicted" of a benchmark; and the few choices that
``choice.py`` names. fp32 means without TF32, in PyTorch too: a ``Problem`` does not say if it is allowed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fastmixer.configs.ops import HALVES, OPS, TRAINING, half_of, matrix_sizes
from fastmixer.configs.predict.kernels import LAUNCH, MEMORY_EFFICIENCY, SUSTAINED, Prediction, tiled, total
from fastmixer.configs.problem import Choice, Library, Problem, TileConfig, cdiv
from fastmixer.configs.resources import Resources, find
from fastmixer.configs.targets import Device, Target, device_data
from fastmixer.configs.tiles import wgrad_in_one_launch

# ASSUMED: a library splits the depth of a product with few tiles in parts of at least this.
LIBRARY_SPLIT = 512
LIBRARY_TILE = 64 * 64
LIBRARY_LATENCY = 3e-6  # ASSUMED seconds: of the shortest library product
FP32_LIBRARY = 0.85  # ASSUMED share of the ordinary cores that a library's fp32 product reaches

Select = Callable[[str, Problem, Target], Choice]


def predict(
    op: str, problem: Problem, choice: Choice, device: Device, resources: Resources | None
) -> Prediction:
    """The predicted time of an op, of "row_moments" or of a half, in training in both directions.

    choice: the tiles or the Library that runs it; of "row_moments" None, of the halves REFERENCE. resources:
    what the compiled code of these tiles needs; None: not recorded. ValueError if there is no prediction for
    the op with this choice, or not one program of it fits.
    """
    if op == "row_moments":
        B, S, C, _, x_dtype, _ = problem[:6]
        return passes([B * S * C * x_dtype.itemsize + 2 * 4 * B * S], device)
    if choice is Library.REFERENCE and op in HALVES:
        forward = reference_half(op, problem, device)
        # The backward: twice the products of the forward, and about twice its passes.
        return total([forward] * 3) if op.endswith(TRAINING) else forward
    if isinstance(choice, Library) and op in OPS and choice in OPS[op].library:
        return library_product(op, problem, choice, device)
    if not isinstance(choice, TileConfig):
        raise ValueError(f"choice: expected tiles or a Library that runs {op!r}, got {choice!r}")
    return tiled(op, problem, choice, device, resources)


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


def predict_halves(halves: Mapping[str, Problem], target: Target, select: Select) -> dict[str, Prediction]:
    """The launches of a block's halves as ``select`` chooses them, by name; those in training with backward.

    The backward is that of ``memory("balanced")``; packing weights and sums of partials are left out, a few
    microseconds each. Empty if nothing is known of the target's GPU.
    """
    device = device_data(target)
    if device is None:
        return {}
    launches: dict[str, Prediction | None] = {}
    for op, problem in forward_ops(halves, target, select):
        # Behind a token half that PyTorch runs, the channel half reads x for its moments.
        name = "channel_row_moments" if op == "row_moments" and launches else op
        choice = None if op == "row_moments" else select(op, problem, target)
        launches[name] = predict_launch(op, problem, choice, target)
    for half, problem in halves.items():
        if half.endswith(TRAINING) and half not in launches:
            launches |= _backward(half, problem, device, select)
    return {name: prediction for name, prediction in launches.items() if prediction is not None}


def forward_ops(halves: Mapping[str, Problem], target: Target, select: Select) -> list[tuple[str, Problem]]:
    """The ops of the forward through these halves, in order: a half itself where PyTorch runs it.

    A half that the kernels run leaves the row moments of its output to the next one.
    """
    ops: list[tuple[str, Problem]] = []
    moments_known = False
    for half, problem in halves.items():
        if select(half, problem, target) is Library.REFERENCE:
            ops.append((half, problem))
            continue
        names = ["channel_fc1", "channel_fc2"]
        if half_of(half) == "token":
            one_pass = select("token_mixing", problem, target) is not None
            names = ["token_mixing"] if one_pass else ["token_fc1", "token_fc2"]
        ops += [(name, problem) for name in ["row_moments"] * (not moments_known) + names]
        moments_known = True
    return ops


def backward_ops(half: str, problem: Problem, target: Target, select: Select) -> list[str]:
    """The ops of a half's backward that have tiles, in order; none unless ``half`` is one in training."""
    if not half.endswith(TRAINING):
        return []
    if half_of(half) == "channel":
        return ["channel_mlp_hidden_bwd"]
    if select("token_dgrad", problem, target) is None:
        return ["token_mlp_hidden_bwd_recompute"]
    both = wgrad_in_one_launch(problem, target)
    return ["token_dgrad", "token_wgrad_fc1"] + ["token_wgrad_fc2"] * (not both)


def _backward(half: str, problem: Problem, device: Device, select: Select) -> dict[str, Prediction | None]:
    """The launches of the backward of a half that the kernels train."""
    target, name = device.target, half_of(half)
    B, S, C, H, x_dtype, dtype = problem[:6]
    elements, x, it = B * S * C, x_dtype.itemsize, dtype.itemsize
    launches: dict[str, Prediction | None] = {
        # n made again, and the pass that finishes dx: it reads g, x and dn
        f"{name}_layer_norm_fwd": passes([elements * (x + it)], device),
        f"{name}_layer_norm_bwd": passes([elements * (3 * x + it)], device),
    }
    for op in backward_ops(half, problem, target, select):
        launches[op] = predict_launch(op, problem, select(op, problem, target), target)
    if "token_dgrad" not in launches:  # which makes its products itself; the library makes the others
        rows, width = (B * C, S) if name == "token" else (B * S, C)
        sizes = {"dn": (rows, width, H), "dw1": (H, width, rows), "dw2": (width, H, rows)}
        launches |= {f"{name}_{key}": library_gemm(*size, dtype, device) for key, size in sizes.items()}
    return launches


def passes(sizes: list[int], device: Device) -> Prediction:
    """Launches that move so many bytes each and do nothing else."""
    seconds = sum(size / (device.memory_bandwidth * MEMORY_EFFICIENCY) + LAUNCH for size in sizes)
    return Prediction(seconds, "latency" if 2 * len(sizes) * LAUNCH > seconds else "memory")


def library_gemm(
    rows: int, columns: int, depth: int, dtype: torch.dtype, device: Device, *, added: bool = False
) -> Prediction:
    """A library's product; fp32 without TF32, which is PyTorch's default; added: it reads what it adds to."""
    bits32 = dtype.itemsize >= 4
    peak = 2 * device.fp32 * FP32_LIBRARY if bits32 else device.tensor * SUSTAINED
    tiles = cdiv(rows * columns, LIBRARY_TILE) * cdiv(depth, LIBRARY_SPLIT)
    fill = min(1.0, tiles / device.target.multiprocessors)
    compute = 2 * rows * columns * depth / (peak * fill * device.clock * 1e9 * device.target.multiprocessors)
    size = (rows * depth + columns * depth + (1 + added) * rows * columns) * dtype.itemsize
    memory = size / (device.memory_bandwidth * MEMORY_EFFICIENCY)
    return Prediction(max(compute, memory, LIBRARY_LATENCY) + LAUNCH, "matrix")


def library_product(op: str, problem: Problem, choice: Library, device: Device) -> Prediction:
    """PyTorch's product of the channel half with the passes around it: ``ops/channel_mixing.py``.

    fc1: n is written, and for ATEN the pre-activation written and read; fc2: for ATEN the branch is written
    and read, ADDMM in place has no pass.
    """
    B, R, N, K = matrix_sizes(op, problem)
    rows, it, x = B * R, problem.dtype.itemsize, problem.x_dtype.itemsize
    around = [rows * K * (x + it)] if op == "channel_fc1" else []
    if choice is Library.ATEN:
        around.append(rows * N * (2 * it if around else it + 2 * x))
    product = library_gemm(rows, N, K, problem.dtype, device, added=choice is Library.ADDMM)
    return total([passes(around, device), product])


def reference_half(op: str, problem: Problem, device: Device) -> Prediction:
    """A half in eager PyTorch: its two products and the passes around them.

    With u the bytes of x and h those of the hidden: LayerNorm 2 u, GELU 2 h, the residual 3 u; the token half
    also copies the transposed operand of its first product, 2 u.
    """
    B, S, C, H, x_dtype, dtype = problem[:6]
    token = op.startswith("token")
    rows, width = (B * C, S) if token else (B * S, C)
    u, h = B * S * C * x_dtype.itemsize, rows * H * dtype.itemsize
    around = passes([2 * u, 2 * h, 3 * u] + [2 * u] * token, device)
    products = [library_gemm(rows, H, width, dtype, device), library_gemm(rows, width, H, dtype, device)]
    return total([around, total(products)])

"""What PyTorch's own products and passes are predicted to take, where they would run in place of a kernel.

fp32 means without TF32 for both sides: a ``Problem`` does not say whether PyTorch allows it.
"""

from __future__ import annotations

import torch

from fastmixer.configs.ops import matrix_sizes
from fastmixer.configs.predict.kernels import MEMORY_EFFICIENCY, SUSTAINED, Prediction, total
from fastmixer.configs.problem import Problem, cdiv
from fastmixer.configs.targets import Device

# ASSUMED: a library splits the depth of a product with few tiles in parts of at least this.
LIBRARY_SPLIT = 512
LIBRARY_TILE = 64 * 64
LIBRARY_LATENCY = 3e-6  # ASSUMED seconds: of the shortest library product
FP32_LIBRARY = 0.85  # ASSUMED share of the ordinary cores that a library's fp32 product reaches


def passes(sizes: list[int], device: Device) -> Prediction:
    """Launches that move so many bytes each and do nothing else."""
    seconds = sum(size / (device.memory_bandwidth * MEMORY_EFFICIENCY) + device.launch for size in sizes)
    return Prediction(seconds, "latency" if 2 * len(sizes) * device.launch > seconds else "memory")


def library_gemm(rows: int, columns: int, depth: int, dtype: torch.dtype, device: Device) -> Prediction:
    """A library's product; fp32 without TF32, which is PyTorch's default."""
    bits32 = dtype.itemsize >= 4
    peak = 2 * device.fp32 * FP32_LIBRARY if bits32 else device.tensor * SUSTAINED
    tiles = cdiv(rows * columns, LIBRARY_TILE) * cdiv(depth, LIBRARY_SPLIT)
    fill = min(1.0, tiles / device.target.multiprocessors)
    compute = 2 * rows * columns * depth / (peak * fill * device.clock * 1e9 * device.target.multiprocessors)
    size = (rows * depth + columns * depth + rows * columns) * dtype.itemsize
    memory = size / (device.memory_bandwidth * MEMORY_EFFICIENCY)
    return Prediction(max(compute, memory, LIBRARY_LATENCY) + device.launch, "matrix")


def library_product(op: str, problem: Problem, device: Device) -> Prediction:
    """ATEN's product of the channel half with the passes around it: ``ops/channel_mixing.py``.

    fc1: n is written, the pre-activation written and read; fc2: the branch is written and read.
    """
    B, R, N, K = matrix_sizes(op, problem)
    rows, it, x = B * R, problem.dtype.itemsize, problem.x_dtype.itemsize
    fc1 = op == "channel_fc1"
    around = [rows * K * (x + it), rows * N * 2 * it] if fc1 else [rows * N * (it + 2 * x)]
    return total([passes(around, device), library_gemm(rows, N, K, problem.dtype, device)])


def reference_half(op: str, problem: Problem, device: Device) -> Prediction:
    """A half in eager PyTorch: its two products and the passes around them.

    With u the bytes of x and h those of the hidden: LayerNorm 2 u, GELU 2 h, the residual 3 u; the token half
    also copies the transposed operand of its first product, 2 u.
    """
    B, S, C, H, x_dtype, dtype = problem
    token = op.startswith("token")
    rows, width = (B * C, S) if token else (B * S, C)
    u, h = B * S * C * x_dtype.itemsize, rows * H * dtype.itemsize
    around = passes([2 * u, 2 * h, 3 * u] + [2 * u] * token, device)
    products = [library_gemm(rows, H, width, dtype, device), library_gemm(rows, width, H, dtype, device)]
    return total([around, total(products)])

"""Every kernel, forward and backward, in as few compilations as that takes: what a GPU runs first."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from draws import gradient_repeats
from support import (
    Case,
    assert_parity,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    run_gradients,
    with_library,
)

from fastmixer.configs import TARGETS, Library
from fastmixer.ops import launch
from fastmixer.ops.row_moments import joined

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = {
    "multiples of 16": Case(2, 64, 96, 48, 128, BF16),
    "196 tokens, lean": Case(2, 196, 64, 48, 128, BF16, lean=True),
    "odd, fp16, tanh": Case(2, 50, 75, 33, 70, FP16, approximate="tanh", scale="column"),
    "fp32": Case(2, 49, 64, 48, 72, FP32),
    "autocast, lean": Case(2, 49, 75, 48, 72, BF16, x_dtype=FP32, weight_dtype=FP32, lean=True),
    "two passes": Case(1, 300, 96, 48, 128, BF16),
    "two passes, odd, lean": Case(1, 257, 75, 33, 70, FP16, layout="transposed", lean=True),
    "library products": Case(2, 49, 64, 48, 128, BF16),
    "library products, lean": Case(2, 49, 64, 48, 128, BF16, approximate="tanh", lean=True),
}


def products(name: str, context: launch.Context) -> launch.Context:
    """The case's products: cuBLAS's in the last of them, and ours."""
    library = {
        "library products": {"channel_fc1": Library.ATEN, "channel_fc2": Library.ATEN},
        "library products, lean": {"channel_fc1": Library.ATEN_GELU, "channel_fc2": Library.ADDMM},
    }
    return with_library(context, library.get(name, {}))


@pytest.mark.gpu  # the interpreter runs many such cases, and would take minutes for these too
@pytest.mark.smoke
@pytest.mark.parametrize("name", CASES)
def test_smoke(name: str) -> None:
    case, device = CASES[name], torch.device("cuda")
    context = products(name, context_of(case, device))
    assert_parity(run_gradients("block", case, device, gradient_repeats(case), context=context))


def joined_moments(context: launch.Context, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments of 70 channels in blocks of 32, and joined: what only a trace launches."""
    blocks = torch.rand(3, 2, 21, generator=torch.Generator().manual_seed(0)).to(device)
    return blocks, joined(blocks, 70, context)


@pytest.mark.gpu
@pytest.mark.smoke
def test_smoke_of_what_only_a_trace_launches() -> None:
    device = torch.device("cuda")
    blocks, found = joined_moments(context_of(CASES["fp32"], device), device)
    mean = torch.einsum(
        "bt,b->t", blocks[:, 0].double(), torch.tensor([32, 32, 6.0], device=device).double() / 70
    )
    torch.testing.assert_close(found[0, 0].double(), mean, rtol=1e-6, atol=1e-6)


def test_the_cases_launch_every_kernel() -> None:
    """As on an H100: launches are recorded and not run."""
    kernels = {name for name, kernel in vars(launch.kernels()).items() if hasattr(kernel, "run")}
    assert len(kernels) >= 14
    launched = set()
    for name, case in CASES.items():
        launches: list[launch.Launch] = []
        context = products(name, context_of(case, torch.device("cpu")))
        context = dataclasses.replace(context, target=TARGETS["sm_90"], execute=launches.append)
        x, halves, _ = block_inputs(case)
        gradients(fused_run(case, context), x, halves, torch.zeros_like(x))
        joined_moments(context, torch.device("cpu"))
        launched |= {item.kernel_name for item in launches}
    assert launched == kernels

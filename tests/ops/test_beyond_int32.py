"""Offsets beyond int32: a batch of over 2**31 elements, of whose programs only the last ones are run.

So the interpreter needs seconds and, as memory that nobody touches is none, little memory. What the last
sample gives there is what it gives alone. Addresses there must be: 9 GB for the largest tensor.
Strides beyond int32 are in ``test_block_parity.py`` and ``test_block_gradients.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from support import HALVES, Case, block_inputs, context_of, leaves, with_sms

from fastmixer.configs import TileConfig
from fastmixer.ops import autograd, launch
from fastmixer.ops.reduce import Partial, sum_partials
from fastmixer.params import MixingParams

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
PROGRAMS = 32  # that are run: more than a sample takes in any launch
ROWS = 256  # of a product of PyTorch's, that are computed

Execute = Callable[[launch.Launch], None]


@pytest.fixture
def last_programs(monkeypatch: pytest.MonkeyPatch) -> Execute:
    """Runs the last programs of a launch."""
    launch.kernels()
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    skipped = 0
    program_id = InterpreterBuilder.create_get_program_id

    def shifted(self, axis):
        handle = program_id(self, axis)
        assert handle.dtype == tl.int32
        handle.data = handle.data + handle.data.dtype.type(skipped)
        return handle

    def execute(item: launch.Launch) -> None:
        nonlocal skipped
        skipped = max(0, item.grid[0] - PROGRAMS)
        launch.execute(dataclasses.replace(item, grid=(item.grid[0] - skipped,)))
        skipped = 0

    monkeypatch.setattr(InterpreterBuilder, "create_get_program_id", shifted)
    return execute


def last_rows(function: Callable, *operands: torch.Tensor, out: torch.Tensor) -> None:
    """The last rows, or matrices, of a product of PyTorch's; none of one that is a sum over them all."""
    if (rows := out.shape[0]) > ROWS:
        function(*(t[-ROWS:] if t.shape[0] == rows else t for t in operands), out=out[-ROWS:])


@pytest.mark.parametrize(
    ("part", "one_pass", "lean"),
    [("block", None, False), ("block", None, True), ("token", False, False), ("channel", None, False)],
)
def test_the_last_sample_is_what_it_is_alone(
    part: str, one_pass: bool | None, lean: bool, last_programs: Execute
) -> None:
    case = Case(1, 32, 64, 16, 64, BF16, tiles=TileConfig(32, 16, 32), one_pass=one_pass, lean=lean)
    x, halves, g = block_inputs(case)
    halves = {half: halves[half] for half in HALVES[part]}
    for name, tensor in leaves(x, halves).items():
        tensor.requires_grad_(name != "x")
    partials = "dw1_ptr", "db1_ptr", "dw2_ptr"

    def run(batch: int, execute: Execute, **calls: Callable) -> dict[str, torch.Tensor]:
        """Of the last sample the output, its gradient, and its share of every sum."""
        sums: list[torch.Tensor] = []

        def noting(item: launch.Launch) -> None:
            if item.kernel_name != "sum_partials":  # would read all
                execute(item)
            sums.extend(item.args[name][-1] for name in partials if item.args.get(name) is not None)

        context = context_of(case, CPU)
        context = dataclasses.replace(context, target=with_sms(2**22), execute=noting, **calls)
        inputs = x.expand(batch, -1, -1).requires_grad_()
        y = autograd.mix(inputs, halves, case.dtype, context, lean=lean)
        (dx,) = torch.autograd.grad(y, inputs, g.expand(batch, -1, -1))
        return {"y": y[-1].detach(), "dx": dx[-1], **{f"sum {i}": t for i, t in enumerate(sums)}}

    batch = 2**31 // (case.S * case.C) + 2
    alone, found = run(1, launch.execute), run(batch, last_programs, call=last_rows)
    assert len(found) == len(alone) > 2
    for name, expected in alone.items():
        torch.testing.assert_close(found[name], expected, msg=lambda text, name=name: f"{name}: {text}")


def test_the_last_partial_sums(last_programs: Execute) -> None:
    """Partial sums of over 2**31 numbers together."""
    N, K, P = 2**13, 2**12 + 4, 66
    sums = torch.empty(P, N, K)
    assert (P - 1) * N * K > 2**31
    sums[:, -1, -1] = torch.arange(float(P))
    weight = torch.empty(N, K)
    params = MixingParams(None, None, weight, None, weight, None)
    context = dataclasses.replace(context_of(Case(1, 1, 1, 1, 1), CPU), execute=last_programs)
    found = sum_partials([Partial("fc1_weight", sums)], params, context)["fc1_weight"]
    assert found[-1, -1] == P * (P - 1) / 2

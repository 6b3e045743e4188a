"""Drawn tiles fit a GPU: a test on one must not fail for what the interpreter never notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import SHARED_MEMORY, Case, context_of

from fastmixer.configs import ONE_PASS, TARGETS, Problem, TileConfig

BF16, FP32 = torch.bfloat16, torch.float32
LARGE = TileConfig(64, 64, 64)


@pytest.mark.parametrize(
    ("tokens", "dtype", "drawn", "runs"),
    [
        (256, FP32, LARGE, TileConfig(32, 32, 64, num_stages=1)),
        (256, BF16, LARGE, TileConfig(64, 64, 64, num_stages=1)),
        (64, BF16, LARGE, TileConfig(64, 64, 64)),
        (256, BF16, TileConfig(32, 32, 32), TileConfig(32, 32, 32)),
    ],
)
def test_a_case_runs_with_tiles_that_fit(
    tokens: int, dtype: torch.dtype, drawn: TileConfig, runs: TileConfig
) -> None:
    """The interpreter's context has what a GPU's has; products of two dimensions keep what was drawn."""
    context = context_of(Case(2, tokens, 80, 90, 90, dtype, tiles=drawn), torch.device("cpu"))
    problem = Problem(2, tokens, 80, 90, dtype, dtype)
    for target in context.target, TARGETS["sm_90"]:
        assert {context.choose(op, problem, target) for op in ONE_PASS} == {runs}
        assert context.choose("channel_fc1", problem, target) == drawn


# In a process without the interpreter: bytes of shared memory of the largest tiles that can be drawn.
COMPILE = """
import json, sys
import torch
from support import fitting
from fastmixer.configs import Problem, TileConfig
from fastmixer.aot.record import compile_one

found = {}
for dtype, ops in (
    (torch.bfloat16, ("token_dgrad", "token_wgrad_fc1")),
    (torch.float32, ("token_mixing", "token_dgrad", "token_wgrad_fc1")),
    (torch.float64, ("token_mixing",)),
):
    for op in ops:
        problem = Problem(2, 256, 80, 90, dtype, dtype)
        tiles = fitting(TileConfig(64, 64, 64), problem)
        found[f"{op} {dtype}"] = compile_one(op, problem, tiles, sys.argv[1])[1]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_compiled_code_takes_no_more_than_the_rule_allows() -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tests = Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests.parent), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", COMPILE, "sm_90"]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert len(found) == 6 and {what: size for what, size in found.items() if size > SHARED_MEMORY} == {}

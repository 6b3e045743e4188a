"""The stage "smoke" of ``evidence``: which cases there are, and what one costs that kills its process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastmixer.benchmarks import levels
from fastmixer.benchmarks.evidence import smoke
from fastmixer.benchmarks.evidence.task import Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("smoke", tmp_path, dry=True)


def test_cases_have_names_of_their_own_and_cover_what_differs() -> None:
    cases = [case for group in smoke.groups(dry=False) for case in group]
    assert len({str(case) for case in cases}) == len(cases) > 15
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32", "autocast"}
    assert {case.way for case in cases} == {"forward", "backward", "lean"}
    sizes = [smoke.SHAPES[case.shape] for case in cases]
    assert max(size[1] for size in sizes) > 256 and any(size[2] % 2 for size in sizes)
    assert str(cases[0]) == "B/16 bfloat16 forward"


@pytest.mark.parametrize("sizes", smoke.SHAPES.values())
def test_blocks_have_the_sizes_that_are_asked_for(sizes: tuple[int, ...]) -> None:
    _, S, C, D, E = sizes
    with torch.device("meta"):
        block = levels.timm_block(levels.Shape(S, C, D, E, 1, 16))
    assert block.mlp_tokens.fc1.weight.shape == (D, S) and block.mlp_channels.fc2.weight.shape == (C, E)


def test_a_case_that_kills_its_process_costs_only_itself(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process answers a case and dies in the second; another goes on behind that one."""
    (group,) = smoke.groups(dry=True)
    begun = []

    def process(command: list[str], **_: object) -> SimpleNamespace:
        begun.append(int(command[-1]))
        position = begun[-1] if begun[-1] != 1 else None
        if position is not None:
            task.note(str(group[position]), ratio=0.5)
        return SimpleNamespace(returncode=-11, stderr="a\nb\nc\nd\nSegmentation fault\n")

    monkeypatch.setattr(smoke.subprocess, "run", process)
    smoke._supervise(task, 0, group)
    assert begun == [0, 1, 2]
    assert [row["ok"] for row in task.rows()] == [True, False, True]
    assert task.rows()[1]["error"] == "its process ended with -11: b / c / d / Segmentation fault"
    assert task.rows()[1]["what"] == str(group[1])


def test_a_case_that_fails_is_followed_by_a_fresh_process(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error may have left the GPU unusable: the process ends behind it, and the rest is another's."""

    def check(task: Task, case: smoke.Smoke) -> dict:
        if case.way == "backward":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"ok": True, "worst": "output", "ratio": 1.0, "failed": {}}

    monkeypatch.setattr(smoke, "check", check)
    try:
        assert smoke.run_group(task, 0, 0) == 1
        assert [row["ok"] for row in task.rows()] == [True, False]
        assert smoke.run_group(task, 0, 2) == 0
    finally:
        smoke.faulthandler.cancel_dump_traceback_later()
    assert [row["ok"] for row in task.rows()] == [True, False, True]
    assert "illegal memory access" in task.rows()[1]["error"]


def test_where_a_case_hung_is_told_from_the_innermost_call() -> None:
    hung = "Timeout (0:01:30)!\nThread 0x1 (most recent call first):\n  File inner\n  File outer\n"
    assert smoke._told("a warning\n" + hung) == " / ".join(hung.splitlines())


def test_a_wrong_kernel_is_not_ok(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's verdict reaches the row: an answer that is 1% off fails, and is named."""
    used = sys.modules["fastmixer.benchmarks.levels"]  # by the stage
    make_call = used.make_call

    def wrong(*given: object, **options: object) -> Callable:
        call = make_call(*given, **options)
        return (lambda item: call(item) * 1.01) if "memory" in options else call

    monkeypatch.setattr(used, "make_call", wrong)
    assert not task.attempt("case", lambda: smoke.check(task, smoke.groups(dry=True)[0][0]))
    (row,) = task.rows()
    assert list(row["failed"]) == ["output"] and "FAILED" in row["failed"]["output"]

"""The stage "smoke" of ``evidence``: which cases there are, and what one costs that kills its process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fastmixer.benchmarks import levels
from fastmixer.benchmarks.evidence import stages
from fastmixer.benchmarks.evidence.stages import Task


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "results").mkdir()
    return Task("smoke", tmp_path, dry=True)


def test_cases_have_names_of_their_own_and_cover_what_differs() -> None:
    cases = stages.smoke_cases(dry=False)
    assert len(set(cases)) == len(cases) > 15
    sizes, dtypes, ways = zip(*(case.rsplit(" ", 2) for case in cases), strict=True)
    assert set(dtypes) == {"bfloat16", "float16", "float32", "autocast"}
    assert set(ways) == {"forward", "backward", "lean"}
    assert set(sizes) == {*stages.SIZES} - {"tiny"}
    used = [stages.SIZES[name] for name in sizes]
    assert max(size[0] for size in used) > 256 and any(size[1] % 2 for size in used)
    assert cases[0] == "B/16 bfloat16 forward"


@pytest.mark.parametrize("sizes", stages.SIZES.values())
def test_blocks_have_the_sizes_that_are_asked_for(sizes: tuple[int, ...]) -> None:
    S, C, D, E = sizes
    with torch.device("meta"):
        block = levels.timm_block(levels.Shape(S, C, D, E, 1, 16))
    assert block.mlp_tokens.fc1.weight.shape == (D, S) and block.mlp_channels.fc2.weight.shape == (C, E)


def test_a_case_that_kills_its_process_costs_only_itself(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case has a process, whatever became of the one before it."""
    cases, begun = stages.smoke_cases(dry=True), []

    def process(command: list[str], **_: object) -> SimpleNamespace:
        begun.append(command[-1])
        if command[-1] != cases[1]:
            task.note(command[-1], ratio=0.5)
        return SimpleNamespace(returncode=-11, stderr="a\nb\nc\nd\nSegmentation fault\n")

    monkeypatch.setattr(stages.subprocess, "run", process)
    monkeypatch.setattr(stages, "MOST_CASES", 1)
    assert stages.smoke(task) == 1
    assert begun == cases
    assert [row["ok"] for row in task.rows()] == [True, False, True]
    assert task.rows()[1]["error"] == "its process ended with -11: b / c / d / Segmentation fault"
    assert task.rows()[1]["what"] == cases[1]


def test_a_case_that_fails_ends_its_process_with_a_row(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error may have left the GPU unusable: the rest is another process's."""

    def check(task: Task, case: str) -> dict:
        if case.endswith("backward"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return {"ok": True, "worst": "output", "ratio": 1.0, "failed": {}}

    monkeypatch.setattr(stages, "check", check)
    try:
        assert [stages.run_case(task, case) for case in stages.smoke_cases(dry=True)] == [0, 1, 0]
    finally:
        stages.faulthandler.cancel_dump_traceback_later()
    assert [row["ok"] for row in task.rows()] == [True, False, True]
    assert "illegal memory access" in task.rows()[1]["error"]


def test_where_a_case_hung_is_told_from_the_innermost_call() -> None:
    hung = "Timeout (0:01:30)!\nThread 0x1 (most recent call first):\n  File inner\n  File outer\n"
    assert stages._told("a warning\n" + hung) == " / ".join(hung.splitlines())


def test_a_wrong_kernel_is_not_ok(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's verdict reaches the row: an answer that is 1% off fails, and is named."""
    make_call = levels.make_call

    def wrong(module: torch.nn.Module, case: levels.Case, *memory: str) -> Callable:
        call = make_call(module, case, *memory)
        return (lambda item: call(item) * 1.01) if memory else call

    monkeypatch.setattr(levels, "make_call", wrong)
    case = stages.smoke_cases(dry=True)[0]
    assert not task.attempt("case", lambda: stages.check(task, case))
    (row,) = task.rows()
    assert list(row["failed"]) == ["output"] and "FAILED" in row["failed"]["output"]

"""How ``conftest`` reads -m: what runs natively, what in the interpreter, and that neither is steered."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from marks import selects_gpu_tests


@pytest.mark.parametrize(
    ("marks", "gpu"),
    [
        ("gpu", True),
        ("gpu and smoke", True),
        ("gpu and not slow", True),
        ("(slow or smoke) and gpu", True),
        ("not gpu and not slow", False),
        ("slow and not gpu", False),
        ("not (gpu or slow)", False),
        ("gpu and not gpu", False),
    ],
)
def test_the_marks_decide_what_kernels_run_on(marks: str, gpu: bool) -> None:
    assert selects_gpu_tests(marks) is gpu


@pytest.mark.parametrize("marks", ["", "slow", "smoke", "gpu or slow", "not slow", "not gpu or smoke"])
def test_one_run_is_not_for_both(marks: str) -> None:
    with pytest.raises(pytest.UsageError, match='add "and gpu" or "and not gpu"'):
        selects_gpu_tests(marks)


PROBE = """
import os
import pytest

def show(name):
    print(name, os.environ.get("TRITON_INTERPRET"), os.environ["FASTMIXER_CACHE_DIR"])

def test_plain():
    show("plain")

@pytest.mark.gpu
def test_gpu():
    show("gpu")

@pytest.mark.gpu
@pytest.mark.slow
def test_slow_on_a_gpu():
    show("slow")
"""
# Stands for a GPU: nothing is launched.
PLUGIN = "import torch\ntorch.cuda.is_available = lambda: True\n"


@pytest.mark.parametrize(
    ("marks", "ran"),
    [("not gpu", ["plain 1"]), ("gpu", ["gpu None"]), ("gpu and slow", ["slow None"])],
)
def test_a_run(marks: str, ran: list[str], tmp_path: Path) -> None:
    """Slow tests only where they are named, natively or interpreted, and no table that the user has tuned."""
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "with_gpu.py").write_text(PLUGIN)
    tests = Path(__file__).parent
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"FASTMIXER_CACHE_DIR": "/users/own", "PYTHONPATH": f"{tests}{os.pathsep}{tmp_path}"}
    options = ["-p", "with_gpu", "-p", "conftest", "-c", str(tests.parent / "pyproject.toml")]
    command = [sys.executable, "-m", "pytest", "-q", "-s", *options, "-m", marks, str(tmp_path / "probe.py")]
    done = subprocess.run(command, cwd=tests.parent, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = [
        line.lstrip(".").rsplit(" ", 1) for line in done.stdout.splitlines() if "fastmixer-tests-" in line
    ]
    assert [what for what, _ in shown] == ran and "/users/own" not in done.stdout

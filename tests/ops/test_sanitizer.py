"""NVIDIA's compute-sanitizer over one small case of every kernel: no access outside, no race."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from every_kernel import EVERY_KERNEL


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "every_kernel.py"
    path.write_text(EVERY_KERNEL)
    return path


def run(*command: object, seconds: float = 300, **environment: str) -> str:
    """The command's output; an AssertionError with it unless it succeeds within ``seconds``."""
    env, words = {**os.environ, **environment}, [str(part) for part in command]
    try:
        ran = subprocess.run(words, capture_output=True, text=True, env=env, timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        printed = b"".join(text or b"" for text in (expired.stdout, expired.stderr)).decode(errors="replace")
        pytest.fail(f"{' '.join(words)} was stopped after {seconds} s; it had printed: {printed[-4000:]}")
    assert ran.returncode == 0, f"{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}"
    return ran.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool: str, script: Path) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer, of the CUDA toolkit, is not on the PATH")
    run(sys.executable, script, "cuda")  # compiles everything, or shows that it fails without the tool too
    # Uncached, every tensor is an allocation of its own, beyond which an access shows.
    out = run(
        *(sanitizer, "--tool", tool, "--error-exitcode", 9, sys.executable, script, "cuda"),
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    assert "every kernel ran on cuda" in out


@pytest.mark.slow
def test_the_sanitized_script_runs(script: Path) -> None:
    assert "every kernel ran on cpu" in run(sys.executable, script, "cpu", TRITON_INTERPRET="1")


def test_a_tool_that_runs_out_of_time_is_a_failure(tmp_path: Path) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    with pytest.raises(pytest.fail.Exception, match="slow.py was stopped after 5 s; it had printed: begun"):
        run(sys.executable, slow, seconds=5)

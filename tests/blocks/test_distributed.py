"""Training on several processes: DDP, FSDP2, tensor parallelism, and checkpoints across all of them.

Real process groups, of gloo on the CPU and of nccl on GPUs. Truth is the same training in one process in
fp64, and the yardstick PyTorch's own error in the same dtype.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import distributed_workers as workers
import pytest
import torch
import torch.multiprocessing
import without_finalizing

import fastmixer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "train_ddp.py"


def spawn(size: int, backend: str, store: Path, *checks: Callable) -> None:
    """Runs the checks of ``distributed_workers`` one after the other in every process of a new group."""
    if backend == "nccl" and torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs, and there are {torch.cuda.device_count()}")
    torch.multiprocessing.spawn(workers.start, (size, backend, str(store), checks), nprocs=size)


# Starting a process takes longer than a check: one group of processes makes them all.
@pytest.mark.slow
@pytest.mark.parametrize(
    "size, backend",
    [
        (2, "gloo"),
        (4, "gloo"),
        pytest.param(2, "nccl", marks=pytest.mark.gpu),
        pytest.param(4, "nccl", marks=pytest.mark.gpu),
    ],
)
def test_trains_as_one_process_does(size: int, backend: str, tmp_path: Path) -> None:
    spawn(
        size,
        backend,
        tmp_path / "store",
        workers.train_replicated,
        partial(workers.train_sharded, kind="own"),
        partial(workers.train_sharded, dtype=torch.bfloat16),
        workers.write_between_calls,
        workers.decline_what_is_sharded,
        workers.train_in_tensor_parallel,
    )


@pytest.mark.parametrize(
    "sizes, backend",
    [
        pytest.param((1, 2), "gloo"),
        pytest.param((4,), "gloo", marks=pytest.mark.slow),
        pytest.param((1, 2), "nccl", marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_a_checkpoint_of_two_ranks_loads_into(sizes: tuple[int, ...], backend: str, tmp_path: Path) -> None:
    load = partial(workers.load, folder=tmp_path)
    in_the_same_processes = [load] if 2 in sizes else []
    spawn(2, backend, tmp_path / "store", partial(workers.save, folder=tmp_path), *in_the_same_processes)
    if 1 in sizes:  # without a process group
        with fastmixer.backend("triton"):
            load(workers.World(0, 1, torch.device("cuda" if backend == "nccl" else "cpu")))
    if 4 in sizes:
        spawn(4, backend, tmp_path / "store of four", load)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--fsdp"], ["--fsdp", "--dtype", "bf16"]], ids=" ".join)
def test_the_example_on_two_processes(options: list[str]) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TRITON_", "FASTMIXER_BACKEND", "FASTMIXER_MEMORY"))
    }
    result = subprocess.run(
        [*launch, without_finalizing.__file__, str(EXAMPLE), "--steps", "20", *options],
        capture_output=True,
        text=True,
        env={**variables, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (accuracy,) = re.findall(r"^test accuracy ([\d.]+)%", result.stdout, re.MULTILINE)  # of rank 0 only
    assert float(accuracy) > 50, "of ten digits, after 20 steps"


def test_the_example_without_torchrun_says_so() -> None:
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    result = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, env=variables)
    assert result.returncode == 2 and "torchrun" in result.stderr


@pytest.mark.filterwarnings("ignore::fastmixer.FallbackWarning")
def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    names: dict[str, object] = {}
    try:
        for snippet in re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
            exec(compile(snippet, "distributed.md", "exec"), names)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert "dcp" in names, "the last snippet"

"""The stages "ncu", "sanitizer", "memcheck" and "racecheck": NVIDIA's tools over fastmixer's kernels."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .plan import STAGES
from .task import Task

# Where they are when the PATH does not say.
FOLDERS = ("/usr/local/cuda/bin", "/opt/nvidia/nsight-compute/*")
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats",
            "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")  # fmt: skip
METRICS = ("Duration", "Compute (SM) Throughput", "Memory Throughput", "DRAM Throughput", "L2 Hit Rate",
           "Achieved Occupancy", "Registers Per Thread", "Issue Slots Busy", "No Eligible",
           "Warp Cycles Per Issued Instruction", "SM Frequency")  # fmt: skip
KERNELS = "regex:_(row_moments|token_mixing|fc1|fc2)_fwd_kernel"
# In a dry run: prints a row as ncu does, and runs what the tool would have run.
STAND_IN = """
import subprocess, sys
print('"Kernel Name","Metric Name","Metric Unit","Metric Value"')
print('"stand_in(int)","Duration","us","1.0"', flush=True)
sys.exit(subprocess.call(sys.argv[1:]))
"""


def ncu(task: Task) -> int:
    """What limits each of the block's kernels, in its second call."""
    profiled = [sys.executable, *STAGES, "profiled", str(task.out), *["--dry-run"] * task.dry]
    # The clocks stay as they are: ncu's default would lock them.
    options = f"--clock-control none --kernel-name {KERNELS} --launch-skip 4 --launch-count 4".split()
    options += [word for section in SECTIONS for word in ("--section", section)]
    options += ["--csv", "--page", "details"]
    output = task.results.with_suffix(".csv")
    try:
        with open(output, "w") as file:
            code = subprocess.call([*_tool(task, "ncu", options), *profiled], stdout=file)
    finally:  # at the limit too: what it has
        lines = output.read_text(errors="replace").splitlines()
        print("\n".join(line for line in lines if not line.startswith('"')), flush=True)
        _note_metrics(task, [line for line in lines if line.startswith('"')])
    return code


def _note_metrics(task: Task, lines: list[str]) -> None:
    """A row for each kernel in the lines of ncu's CSV."""
    kernels: dict[str, dict] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in METRICS:
            name = str(row.get("Kernel Name")).partition("(")[0]
            value = f"{row.get('Metric Value')} {row.get('Metric Unit')}".strip()
            kernels.setdefault(name, {})[row["Metric Name"]] = value
    for name, metrics in kernels.items():
        task.note(name, **metrics)


def profiled(task: Task) -> int:
    """What ncu runs: a block, three times."""
    import torch

    import fastmixer

    subject = task.subject("block", 256)
    with torch.no_grad(), fastmixer.backend("triton"):
        for _ in range(3):
            y = subject.fused(subject.items[0])
    return 0 if bool(y.isfinite().all()) else 1


def sanitizer(task: Task) -> int:
    """The script of tests/every_kernel.py alone, which fills Triton's cache for the tools."""
    return subprocess.call(_every_kernel(task))


def check_memory(task: Task) -> int:
    """compute-sanitizer's tool with the stage's name.

    memcheck: no access outside of any tensor; racecheck: no race in shared memory.
    """
    options = f"--tool {task.name} --error-exitcode 9 --print-limit 20".split()
    # Uncached, every tensor is an allocation of its own, beyond which an access shows.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*_tool(task, "compute-sanitizer", options), *_every_kernel(task)]
    return subprocess.call(command, env=environment)


def _every_kernel(task: Task) -> list[str]:
    """The command that runs every kernel once."""
    sys.path.insert(0, "tests")  # stages run in the checkout
    from every_kernel import EVERY_KERNEL

    return [sys.executable, "-c", EVERY_KERNEL, task.device.type]


def _tool(task: Task, name: str, options: list[str]) -> list[str]:
    """The tool with its options, or in a dry run its stand-in; FileNotFoundError where there is none."""
    if task.dry:
        return [sys.executable, "-c", STAND_IN]
    installed = [str(path) for folder in FOLDERS for path in Path("/").glob(f"{folder[1:]}/{name}")]
    program = next(filter(None, (shutil.which(name), *installed)), None)
    if program is None:
        places = ", ".join(FOLDERS)
        raise FileNotFoundError(f"{name}, of the CUDA toolkit, is neither on the PATH nor in {places}")
    return [program, *options]

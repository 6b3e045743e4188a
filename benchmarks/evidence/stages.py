"""A stage's process: ``python -m fastmixer.benchmarks.evidence.stages NAME DIR [--dry-run]``."""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

from .task import Task

# What runs of which module: each imports what it needs in its own process.
RUN = {
    "environment": "stages.environment",
    "warm": "warm.triton",
    "inductor": "warm.inductor",
    "smoke": "smoke.run",
    "api": "api.run",
    "ncu": "tools.ncu",
    "profiled": "tools.profiled",
    "sanitizer": "tools.sanitizer",
    "memcheck": "tools.check_memory",
    "racecheck": "tools.check_memory",
}
GPU_FIELDS = (
    "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "persistence_mode", "ecc.mode.current",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Runs one stage, or with ``--group`` some cases of "smoke", and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmixer.benchmarks.evidence.stages")
    parser.add_argument("name", choices=RUN)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--group", nargs=2, type=int, metavar=("GROUP", "POSITION"))
    options = parser.parse_args(argv)
    task = Task(options.name, options.out, options.dry_run)
    if options.group:
        from . import smoke

        return smoke.run_group(task, *options.group)
    module, _, function = RUN[options.name].partition(".")
    return getattr(importlib.import_module(f".{module}", __package__), function)(task)


def environment(task: Task) -> int:
    """Versions, the GPU with its clocks and limits, the machine: read, never set."""
    import torch
    from fastmixer.benchmarks import files

    from fastmixer import info, versions

    found = files.environment(task.device)
    found |= {"python": platform.python_version(), "machine": platform.platform(), "cpus": os.cpu_count()}
    found |= {"now": files.nvidia_smi(task.device, *GPU_FIELDS)}
    if not task.dry:
        gpu = torch.cuda.get_device_properties(task.device)
        found |= {"multiprocessors": gpu.multi_processor_count, "memory_bytes": gpu.total_memory}
        found |= {"l2_bytes": gpu.L2_cache_size}
    files.write_atomically(task.out / "results" / "environment.json", found)
    print("\n".join(info.lines()), flush=True)
    if versions.nvidia_smi("name"):
        subprocess.call(["nvidia-smi"])
    return 0


if __name__ == "__main__":
    sys.exit(main())

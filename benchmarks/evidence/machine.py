"""The stage "environment": versions, the GPU with its clocks and limits, the machine. Read, never set."""

from __future__ import annotations

import os
import platform
import subprocess

import torch
from fastmixer.benchmarks import files

from fastmixer import info, versions

from .task import Task

GPU_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "persistence_mode",
    "ecc.mode.current",
)


def run(task: Task) -> int:
    """Writes results/environment.json, and into the log what ``info`` and nvidia-smi say."""
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

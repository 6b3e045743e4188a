"""Where results go and what stands at their head: the folder, the environment, writing that loses nothing."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import fastmixer
from fastmixer import versions
from fastmixer.configs.targets import slug

from .recorded import replaced

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("triton", "timm", "jax", "flax", "mlp-mixer-pytorch")
GPU_FIELDS = ("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")


def results_folder(name: str) -> Path:
    """Where results of the device ``name`` go: beside this file in a clone, else in the current folder."""
    in_clone = (ROOT / "pyproject.toml").is_file()
    return (ROOT / "benchmarks" / "results" if in_clone else Path("fastmixer-results")) / slug(name)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def nvidia_smi(device: torch.device, *fields: str) -> dict[str, str] | None:
    """What ``nvidia-smi`` says of this GPU, found by its UUID; None on a CPU and where it is not found.

    CUDA_VISIBLE_DEVICES and CUDA's own order make torch's index another one than nvidia-smi's.
    """
    if device.type != "cuda":
        return None
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", "")).removeprefix("GPU-")
    for gpu in versions.nvidia_smi("uuid", *fields):
        if gpu.pop("uuid").removeprefix("GPU-") == uuid:
            return gpu
    return None


def cpu_name(file: Path = Path("/proc/cpuinfo")) -> str | None:
    """The CPU's model; None where the system does not say."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or None


def environment(device: torch.device, commit: str | None = None) -> dict[str, object]:
    """Everything a figure depends on besides the code that was timed, and that code's commit.

    commit: what to record where git cannot say which commit this is.
    """
    # Without its own .git the repository around this folder, if there is one, is another.
    state = git_state() if (ROOT / ".git").exists() else {"commit": None, "dirty": None}
    return {
        "gpu": device_name(device),
        "cpu": cpu_name(),
        "nvidia_smi": nvidia_smi(device, *GPU_FIELDS),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "versions": {"torch": torch.__version__, "fastmixer": fastmixer.__version__}
        | {name: versions.package_version(name) for name in PACKAGES},
        "commit": state["commit"] or commit,
        "dirty": state["dirty"],
    }


def git_state(root: Path = ROOT) -> dict[str, object]:
    """{"commit": hash or None, "dirty": whether tracked files differ from it, or None}."""
    command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
    commit, dirty, _ = result.stdout.strip().partition("-dirty")
    return {"commit": commit, "dirty": bool(dirty)}


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def partial_path(output: Path) -> Path:
    """Where a run keeps what it has until it is complete."""
    return output.with_suffix(".partial.json")


def write_atomically(path: Path, content: dict) -> None:
    """Writes JSON as ``replaced`` does, and has it on the disk when it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())

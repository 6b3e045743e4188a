"""What ``python -m fastmixer info`` prints: versions, devices, and which backend would run where and why."""

from __future__ import annotations

import os
import platform

import torch

import fastmixer
from fastmixer import dispatch
from fastmixer.versions import driver_version, package_version

PACKAGES = ("triton", "timm", "numpy")


def lines() -> list[str]:
    """The report, one entry per line."""
    return ["versions", *_versions(), "", "devices", *_devices(), "", "backend", *_backends()]


def fastmixer_version() -> str:
    """The version of this package; for a checkout, installed or not, also where it lies."""
    folder = os.path.dirname(fastmixer.__path__[0])
    return fastmixer.__version__ + f", a checkout in {folder}" * (folder in fastmixer.__path__)


def which_backend(device: torch.device) -> tuple[str, str]:
    """The backend that a bf16 block on ``device`` would run with, without gradients, and why."""
    asked = dispatch.current_backend()
    if asked == "torch":
        return "torch", "FASTMIXER_BACKEND asks for the reference"
    if asked == "auto" and device.type == "cpu":
        return "torch", "on CPU tensors the reference runs unless the triton backend is asked for"
    reason = dispatch.why_not_triton(device, torch.bfloat16, torch.bfloat16)
    if reason is not None:
        return ("torch", reason) if asked == "auto" else ("none: an error", reason)
    return "triton", "in Triton's interpreter" if device.type == "cpu" else "the fused kernels support it"


def _versions() -> list[str]:
    runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    has_runtime = torch.version.hip or torch.version.cuda
    entries = {
        "fastmixer": fastmixer_version(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, built {'with ' + runtime if has_runtime else 'for CPUs only'}",
        **{name: package_version(name) for name in PACKAGES},
        "GPU driver": driver_version(),
    }
    return [f"  {name:<12}{value}" for name, value in entries.items()]


def _devices() -> list[str]:
    devices = [f"  cpu         {os.cpu_count()} logical CPUs, torch uses {torch.get_num_threads()} threads"]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        arch = gpu.gcnArchName.split(":")[0] if torch.version.hip else f"capability {gpu.major}.{gpu.minor}"
        size = f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.1f} GiB"
        devices.append(f"  {f'cuda:{index}':<12}{gpu.name}, {arch}, {size}")
    if len(devices) == 1:
        devices.append("  no CUDA or ROCm GPU that torch can see")
    return devices


def _backends() -> list[str]:
    settings = [
        f"  {name}={os.environ[name]}" if name in os.environ else f"  {name} is not set"
        for name in ("FASTMIXER_BACKEND", "TRITON_INTERPRET")
    ]
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    try:
        chosen = [(str(device), *which_backend(device)) for device in devices]
    except ValueError as error:  # FASTMIXER_BACKEND holds a name that is no backend
        return [*settings, f"  error: {error}"]
    return [*settings, *(f"  {device:<12}{backend}: {why}" for device, backend, why in chosen)]

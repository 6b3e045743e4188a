"""What ``python -m fastmixer info`` prints: versions, devices, and which backend would run where and why."""

from __future__ import annotations

import os
import platform

import torch

import fastmixer
from fastmixer import dispatch
from fastmixer.versions import nvidia_smi, package_version

PACKAGES = ("triton", "timm", "numpy")


def lines() -> list[str]:
    """The report, one entry per line."""
    gpus = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return ["versions", *_versions(), "", "devices", *_devices(gpus), "", "backend", *_backends(gpus)]


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
    runtimes = {"ROCm": torch.version.hip, "CUDA": torch.version.cuda}
    built = [f"with {runtime} {version}" for runtime, version in runtimes.items() if version]
    drivers = [gpu["driver_version"] for gpu in nvidia_smi("driver_version")]
    entries = {
        "fastmixer": fastmixer_version(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}, built {built[0] if built else 'for CPUs only'}",
        **{name: package_version(name) for name in PACKAGES},
        "GPU driver": drivers[0] if drivers else "none seen (nvidia-smi does not answer)",
    }
    return [f"  {name:<12}{value}" for name, value in entries.items()]


def _devices(gpus: list[torch.device]) -> list[str]:
    devices = [f"  cpu         {os.cpu_count()} logical CPUs, torch uses {torch.get_num_threads()} threads"]
    for device in gpus:
        gpu = torch.cuda.get_device_properties(device)
        arch = gpu.gcnArchName.split(":")[0] if torch.version.hip else f"capability {gpu.major}.{gpu.minor}"
        size = f"{gpu.multi_processor_count} multiprocessors, {gpu.total_memory / 2**30:.1f} GiB"
        devices.append(f"  {str(device):<12}{gpu.name}, {arch}, {size}")
    return devices if gpus else [*devices, "  no CUDA or ROCm GPU that torch can see"]


def _backends(gpus: list[torch.device]) -> list[str]:
    settings = [
        f"  {name}={os.environ[name]}" if name in os.environ else f"  {name} is not set"
        for name in ("FASTMIXER_BACKEND", "TRITON_INTERPRET")
    ]
    try:
        for device in (torch.device("cpu"), *gpus):
            backend, why = which_backend(device)
            settings.append(f"  {str(device):<12}{backend}: {why}")
    except ValueError as error:  # FASTMIXER_BACKEND holds a name that is no backend
        settings.append(f"  error: {error}")
    return settings

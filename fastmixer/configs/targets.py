"""What tiles are chosen for: the GPUs that fastmixer knows, and the one behind a torch device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Target:
    """What tiles are chosen for.

    backend: "cuda", "hip" or "interpreter"; arch: compute capability as an int (90), or a gfx name;
    multiprocessors: SMs or CUs; shared_memory: bytes that one program may use; name: the slug of the GPU,
    "nvidia-h200", by which its table of tuned tiles is found, "" for none.
    """

    backend: str
    arch: int | str
    multiprocessors: int
    shared_memory: int
    name: str = ""


INTERPRETER = Target("interpreter", 0, 1, 1 << 40)

# Shared memory a program may opt into: CUDA C++ Programming Guide, table of technical specifications per
# compute capability; CDNA3 ISA for gfx942. Multiprocessors: A100, RTX 3090, RTX 4090, H100 SXM, B200,
# RTX 5090, MI300X; a live device reports its own.
TARGETS = {
    "sm_80": Target("cuda", 80, 108, 163 * 1024),
    "sm_86": Target("cuda", 86, 82, 99 * 1024),
    "sm_89": Target("cuda", 89, 128, 99 * 1024),
    "sm_90": Target("cuda", 90, 132, 227 * 1024),
    "sm_100": Target("cuda", 100, 148, 227 * 1024),
    "sm_120": Target("cuda", 120, 170, 99 * 1024),
    "gfx942": Target("hip", "gfx942", 304, 64 * 1024),
}


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target behind a torch device; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, properties.multi_processor_count, 64 * 1024)
    arch = properties.major * 10 + properties.minor
    return Target("cuda", arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)

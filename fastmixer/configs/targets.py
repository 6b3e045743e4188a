"""What tiles are chosen for: the GPUs that fastmixer knows, and the one behind a torch device."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Target:
    """What tiles are chosen for.

    Attributes:
        backend: "cuda", "hip" or "interpreter".
        arch: compute capability as an int (90), or a gfx name.
        multiprocessors: SMs or CUs.
        shared_memory: bytes that one program may use.
        name: the slug of the GPU, "nvidia-h200", by which its table of tuned tiles is found, "" for none.
        triton: whose compiled code is meant, as "3.6.0"; "" for the installed one, which every launch uses.
    """

    backend: str
    arch: int | str
    multiprocessors: int
    shared_memory: int
    name: str = ""
    triton: str = ""


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


@dataclass(frozen=True)
class Device:
    """What the cost model knows of a GPU: its data sheet, not a measurement.

    name: as torch reports it; clock: GHz at which the data sheet's matrix throughput holds; memory_bandwidth
    and l2_bandwidth: bytes per second; l2: bytes; tensor: dense FLOP per cycle and multiprocessor on the
    matrix units, inputs of float16 or bfloat16 with fp32 accumulation; fp32: fused multiply-adds per cycle
    and multiprocessor on the ordinary ones; source: where from.
    """

    name: str
    target: Target
    clock: float
    memory_bandwidth: float
    l2: int
    l2_bandwidth: float
    tensor: int
    fp32: int
    source: str

    @property
    def slug(self) -> str:
        return slug(self.name)


def slug(name: str) -> str:
    """A GPU's name as a file's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


# The first of an arch stands for those of its GPUs that are not here. Tensor is the figure whose product with
# clock and SMs is the data sheet's dense FLOP/s. L2 bandwidth is the least certain column: only A100's peak
# (5,120 bytes per cycle, 7.2 TB/s) is in a whitepaper. All of it is an ESTIMATE of what the caches can
# deliver, guided by published microbenchmarks (Chips and Cheese on RTX 4090, H100 PCIe, MI300X and B200),
# which vary with the access pattern. H200 has all six stacks of memory on, and with them all the L2 of a full
# GH100 (H100 whitepaper: 60 MB); H100 has five stacks and 50 MB. MI300X's L2 is 4 MB per die: its Infinity
# Cache, 17.2 TB/s at its peak, stands for it.
_DATA_SHEETS = (
    # name                     arch      SMs  GHz    GB/s  L2   TB/s  tensor fp32 source
    ("NVIDIA A100-SXM4-80GB",   "sm_80",  108, 1.41,  2039, 40,  5.0,  2048, 64,  "A100 whitepaper"),
    ("NVIDIA A100-SXM4-40GB",   "sm_80",  108, 1.41,  1555, 40,  5.0,  2048, 64,  "A100 whitepaper"),
    ("NVIDIA GeForce RTX 3090", "sm_86",  82,  1.695, 936,  6,   2.0,  512,  128, "GA102 whitepaper"),
    ("NVIDIA GeForce RTX 4090", "sm_89",  128, 2.52,  1008, 72,  4.5,  512,  128, "Ada whitepaper"),
    ("NVIDIA GeForce RTX 5090", "sm_120", 170, 2.407, 1792, 96,  6.0,  512,  128, "RTX Blackwell whitepaper"),
    ("NVIDIA H100 80GB HBM3",   "sm_90",  132, 1.83,  3350, 50,  6.5,  4096, 128, "H100 data sheet"),
    ("NVIDIA H100 PCIe",        "sm_90",  114, 1.62,  2000, 50,  5.5,  4096, 128, "H100 data sheet"),
    ("NVIDIA H200",             "sm_90",  132, 1.83,  4800, 60,  6.5,  4096, 128, "H200 data sheet"),
    ("NVIDIA B200",             "sm_100", 148, 1.856, 8000, 126, 10.0, 8192, 128, "HGX B200 data sheet"),
    ("AMD Instinct MI300X",     "gfx942", 304, 2.1,   5300, 256, 10.0, 2048, 128, "MI300X data sheet"),
)  # fmt: skip


def _device(name: str, arch: str, multiprocessors: int, clock: float, memory: float, l2: int,
            l2_bandwidth: float, *rest) -> Device:  # fmt: skip
    target = replace(TARGETS[arch], name=slug(name), multiprocessors=multiprocessors)
    return Device(name, target, clock, memory * 1e9, l2 << 20, l2_bandwidth * 1e12, *rest)


DEVICES: dict[str, Device] = {slug(row[0]): _device(*row) for row in _DATA_SHEETS}


def device_data(target: Target) -> Device | None:
    """What is known of a target's GPU: its own entry in DEVICES, else that of the nearest known of its arch.

    The name may go on where an entry's ends: "NVIDIA H200 NVL" is an H200. A stand-in gets the target's own
    count of multiprocessors, and memory and L2 in proportion, which also keeps the laptop's "RTX 4090" from
    passing for the card. None for an arch without an entry and for the interpreter.
    """
    if target.backend == "interpreter":
        return None
    if exact := DEVICES.get(target.name):
        return exact if exact.target == target else replace(exact, target=target)
    of_arch = [device for device in DEVICES.values() if device.target.arch == target.arch]
    if not of_arch:
        return None
    alike = [device for device in of_arch if target.name.startswith(device.slug + "-")]
    like = max(alike, key=lambda device: len(device.slug), default=of_arch[0])
    share = target.multiprocessors / like.target.multiprocessors
    return replace(
        like,
        target=target,
        memory_bandwidth=like.memory_bandwidth * share,
        l2=int(like.l2 * share),
        l2_bandwidth=like.l2_bandwidth * share,
    )


def target_named(name: str) -> Target:
    """The target of an arch ("sm_90", "gfx942") or of a GPU by its slug or full name ("nvidia-h200").

    Raises:
        TypeError: name is not a string.
        ValueError: neither TARGETS nor DEVICES has it.
    """
    if not isinstance(name, str):
        raise TypeError(f"device must be a name or a torch.device, got {type(name).__name__}")
    if name in TARGETS:
        return TARGETS[name]
    if slug(name) in DEVICES:
        return DEVICES[slug(name)].target
    raise ValueError(f"device: expected one of {', '.join([*TARGETS, *DEVICES])}, got {name!r}")


@functools.cache
def target_of(device: torch.device) -> Target:
    """The target behind a torch device; a CPU is Triton's interpreter."""
    if device.type == "cpu":
        return INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    name = slug(properties.name)
    if torch.version.hip:
        arch = properties.gcnArchName.split(":")[0]
        return Target("hip", arch, properties.multi_processor_count, 64 * 1024, name)
    arch = properties.major * 10 + properties.minor
    shared_memory = properties.shared_memory_per_block_optin
    return Target("cuda", arch, properties.multi_processor_count, shared_memory, name)

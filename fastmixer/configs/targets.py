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
    and l2_bandwidth: bytes a second; l2: bytes; tensor, tf32: dense FLOP a cycle and multiprocessor on the
    matrix units, inputs of float16 or bfloat16 with fp32 accumulation, and of TF32 (not used yet); fp32:
    fused multiply-adds a cycle and multiprocessor on the ordinary ones; issue: warp instructions a cycle and
    multiprocessor; launch: seconds from the end of one kernel to the start of the next in a CUDA graph;
    source: where from.
    """

    name: str
    target: Target
    clock: float
    memory_bandwidth: float
    l2: int
    l2_bandwidth: float
    tensor: int
    tf32: int
    fp32: int
    source: str
    issue: int = 4
    # About 1.5 us are reported for CUDA; an ESTIMATE for all.
    launch: float = 1.5e-6

    @property
    def slug(self) -> str:
        return slug(self.name)


def slug(name: str) -> str:
    """A GPU's name as a file's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


_MIB = 1 << 20


def _device(name: str, arch: str, multiprocessors: int | None = None, **data: object) -> Device:
    target = replace(TARGETS[arch], name=slug(name))
    if multiprocessors is not None:
        target = replace(target, multiprocessors=multiprocessors)
    return Device(name=name, target=target, **data)


# FLOP a cycle and SM are those whose product with clock and SMs is the data sheet's dense figure. L2
# bandwidth is the least certain column: only A100's peak (5,120 bytes a cycle, 7.2 TB/s) is in a whitepaper.
# All of it is an ESTIMATE of what the caches can deliver, guided by published microbenchmarks (Chips and
# Cheese on RTX 4090, H100 PCIe, MI300X and B200), which vary with the access pattern.
DEVICES: dict[str, Device] = {
    device.slug: device
    for device in (
        # NVIDIA A100 Tensor Core GPU Architecture (whitepaper): 312 TFLOP/s, 1,555 and 2,039 GB/s, 40 MB.
        _device("NVIDIA A100-SXM4-80GB", "sm_80", clock=1.41, memory_bandwidth=2.039e12, l2=40 * _MIB,
                l2_bandwidth=5.0e12, tensor=2048, tf32=1024, fp32=64, source="A100 whitepaper"),
        _device("NVIDIA A100-SXM4-40GB", "sm_80", clock=1.41, memory_bandwidth=1.555e12, l2=40 * _MIB,
                l2_bandwidth=5.0e12, tensor=2048, tf32=1024, fp32=64, source="A100 whitepaper"),
        # NVIDIA Ampere GA102 (whitepaper): 71 TFLOP/s with fp32 accumulation, 936 GB/s, 6 MB.
        _device("NVIDIA GeForce RTX 3090", "sm_86", clock=1.695, memory_bandwidth=936e9, l2=6 * _MIB,
                l2_bandwidth=2.0e12, tensor=512, tf32=256, fp32=128, source="GA102 whitepaper"),
        # NVIDIA Ada GPU Architecture (whitepaper): 165.2 TFLOP/s with fp32 accumulation, 1,008 GB/s, 72 MB.
        _device("NVIDIA GeForce RTX 4090", "sm_89", clock=2.52, memory_bandwidth=1.008e12, l2=72 * _MIB,
                l2_bandwidth=4.5e12, tensor=512, tf32=256, fp32=128, source="Ada whitepaper"),
        # NVIDIA RTX Blackwell (whitepaper): 209.5 TFLOP/s with fp32 accumulation, 1,792 GB/s, 96 MB.
        _device("NVIDIA GeForce RTX 5090", "sm_120", clock=2.407, memory_bandwidth=1.792e12, l2=96 * _MIB,
                l2_bandwidth=6.0e12, tensor=512, tf32=256, fp32=128, source="RTX Blackwell whitepaper"),
        # NVIDIA H100 Tensor Core GPU Architecture (whitepaper) and data sheet: 989 TFLOP/s, 3.35 TB/s, 50 MB;
        # PCIe: 114 SMs, 756 TFLOP/s, 2.0 TB/s.
        _device("NVIDIA H100 80GB HBM3", "sm_90", clock=1.83, memory_bandwidth=3.35e12, l2=50 * _MIB,
                l2_bandwidth=6.5e12, tensor=4096, tf32=2048, fp32=128, source="H100 data sheet"),
        _device("NVIDIA H100 PCIe", "sm_90", multiprocessors=114, clock=1.62,
                memory_bandwidth=2.0e12, l2=50 * _MIB, l2_bandwidth=5.5e12, tensor=4096, tf32=2048, fp32=128,
                source="H100 data sheet"),
        # NVIDIA H200 data sheet: H100's SMs, 4.8 TB/s. All six stacks of memory are on, and with them all the
        # L2 of a full GH100 (H100 whitepaper: 60 MB); H100 has five stacks and 50 MB.
        _device("NVIDIA H200", "sm_90", clock=1.83, memory_bandwidth=4.8e12, l2=60 * _MIB,
                l2_bandwidth=6.5e12, tensor=4096, tf32=2048, fp32=128, source="H200 data sheet"),
        # NVIDIA Blackwell data sheet (HGX B200): 2.25 PFLOP/s, 8 TB/s; the device reports 148 SMs, 126 MB.
        _device("NVIDIA B200", "sm_100", clock=1.856, memory_bandwidth=8.0e12, l2=126 * _MIB,
                l2_bandwidth=10e12, tensor=8192, tf32=4096, fp32=128, source="HGX B200 data sheet"),
        # AMD Instinct MI300X data sheet: 1,307 TFLOP/s, 5.3 TB/s, 256 MB of Infinity Cache at 17.2 TB/s peak
        # before it, 4 MB of L2 a die. A 64-wide wave takes four cycles of a 16-wide SIMD: one a cycle and CU.
        _device("AMD Instinct MI300X", "gfx942", clock=2.1, memory_bandwidth=5.3e12, l2=256 * _MIB,
                l2_bandwidth=10e12, tensor=2048, tf32=1024, fp32=128, issue=1, source="MI300X data sheet"),
    )
}  # fmt: skip

# The device that stands for an arch when the GPU itself is not in the table.
_OF_ARCH = {
    80: "nvidia-a100-sxm4-80gb",
    86: "nvidia-geforce-rtx-3090",
    89: "nvidia-geforce-rtx-4090",
    90: "nvidia-h100-80gb-hbm3",
    100: "nvidia-b200",
    120: "nvidia-geforce-rtx-5090",
    "gfx942": "amd-instinct-mi300x",
}


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
    if target.arch not in _OF_ARCH:
        return None
    of_arch = [device for device in DEVICES.values() if device.target.arch == target.arch]
    alike = [device for device in of_arch if target.name.startswith(device.slug + "-")]
    like = max(alike, key=lambda device: len(device.slug), default=DEVICES[_OF_ARCH[target.arch]])
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

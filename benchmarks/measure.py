"""How things are timed and where the figures go: statistics, the CUDA timer, the environment, the file.

Nothing here knows what is timed. A timer is any callable ``(opponents, inputs) -> milliseconds``, so that
tests can pass a stub where there is no GPU.
"""

from __future__ import annotations

import datetime
import itertools
import json
import os
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastmixer import info

Call = Callable[[Tensor], Tensor | dict[str, Tensor]]
# Opponents by name, and inputs (N, B, S, C) to rotate through -> milliseconds of every call, by opponent.
Timer = Callable[[dict[str, Call], Tensor], dict[str, list[float]]]

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1  # of the JSON files: raise it when a field changes its meaning
GPU_FIELDS = ("name", "driver_version", "power.limit", "clocks.max.sm", "clocks.max.memory")
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


@dataclass(frozen=True)
class Stats:
    """Median and quantiles of the calls' milliseconds."""

    median: float
    p20: float
    p80: float
    calls: int


def summarise(milliseconds: list[float]) -> Stats:
    """The statistics of at least one time; ValueError without any. Quantiles are interpolated linearly."""
    if not milliseconds:
        raise ValueError("milliseconds must hold at least one time, got none")
    times = torch.tensor(milliseconds, dtype=torch.float64)
    p20, median, p80 = torch.quantile(times, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Stats(median, p20, p80, len(milliseconds))


# ---- timing ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CudaTimer:
    """Times opponents in turn within one run, every call between two CUDA events.

    The opponents alternate in bursts of ``burst`` calls, in another order each round, so that a drift of the
    clocks meets all of them. A burst is enqueued without waiting, so a call takes the GPU's time or the
    host's to launch it, whichever is longer: what a caller sees in a steady loop.
    """

    rounds: int = 20
    burst: int = 10
    warm_up: int = 10

    def __call__(self, opponents: dict[str, Call], inputs: Tensor) -> dict[str, list[float]]:
        """Milliseconds of every timed call. inputs: (N, ...); each call gets the next one, cyclically."""
        order = itertools.cycle(range(inputs.shape[0]))
        for call in opponents.values():
            for _ in range(self.warm_up):
                call(inputs[next(order)])
        torch.cuda.synchronize()
        times: dict[str, list[float]] = {name: [] for name in opponents}
        names = list(opponents)
        for turn in range(self.rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                times[name] += self._burst(opponents[name], [inputs[next(order)] for _ in range(self.burst)])
        return times

    def _burst(self, call: Call, inputs: list[Tensor]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in inputs]
        for (start, end), x in zip(events, inputs, strict=True):
            start.record()
            call(x)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


def cold_copies(bytes_each: int, device: torch.device) -> int:
    """How many inputs to rotate through so that none is still in L2 when its turn comes again.

    Twice the L2's size together; the weights, which all opponents share, may stay in it. 1 on a CPU.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-2 * cache // max(bytes_each, 1)))


def peak_bytes(call: Call, example: Tensor) -> int | None:
    """What one call allocates at its peak, beyond what is allocated before it; None on a CPU.

    After a warm-up, so that packed weights, libraries' workspaces and the like count as there before.
    """
    if example.device.type != "cuda":
        return None
    for _ in range(2):
        call(example)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(example.device)
    torch.cuda.reset_peak_memory_stats(example.device)
    call(example)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(example.device) - before


def graphed(call: Call, example: Tensor) -> Call:
    """``call`` recorded into a CUDA graph: copies its input in and replays, as max-autotune's graphs do."""
    static = example.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(static)

    def replay(x: Tensor) -> Tensor:
        static.copy_(x)
        graph.replay()
        return output

    return replay


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this GPU reaches at best: GB/s of a large copy (read + write), TFLOP/s of an 8192^3 product.

    The yardstick for "share of the floor": measured here and now, unlike a data sheet's figure.
    """
    source = torch.randn(2**30 // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device, dtype=dtype) for _ in range(2))
    timer = CudaTimer(rounds=5, burst=4, warm_up=3)
    times = timer({"copy": lambda _: target.copy_(source), "product": lambda _: a @ b}, source[:1])
    return {
        "copy_gb_per_s": 2 * source.nbytes / summarise(times["copy"]).median / 1e6,
        "product_tflop_per_s": 2 * 8192**3 / summarise(times["product"]).median / 1e9,
    }


# ---- the file --------------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A GPU's name as a folder's: "NVIDIA H100 80GB HBM3" -> "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def environment(device: torch.device) -> dict[str, object]:
    """Everything a figure depends on besides the code that was timed, and that code's commit."""
    gpus = info.nvidia_smi(*GPU_FIELDS) if device.type == "cuda" else []
    return {
        "gpu": device_name(device),
        "nvidia_smi": gpus[device.index or 0] if len(gpus) > (device.index or 0) else None,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "versions": {
            "torch": torch.__version__,
            **{name: info.package_version(name) for name in ("triton", "timm", "fastmixer")},
        },
        **git_state(),
    }


def clocks() -> dict[str, str] | None:
    """The first GPU's clocks, temperature and power draw at this moment."""
    gpus = info.nvidia_smi(*CLOCK_FIELDS)
    return gpus[0] if gpus else None


def git_state(root: Path = ROOT) -> dict[str, object]:
    """{"commit": hash or None, "dirty": whether tracked files differ from it, or None}."""
    commit = _git(root, "rev-parse", "HEAD")
    status = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if commit is None or status is None else bool(status)}


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def now() -> str:
    """The time in UTC, to the second, as ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write_atomically(path: Path, content: dict) -> None:
    """Writes JSON so that a reader, or whoever looks after a crash, finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

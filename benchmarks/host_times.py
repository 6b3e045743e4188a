"""The measuring process of ``host.py``: runs by its path, on the code that PYTHONPATH leads to, prints JSON.

That may be an old commit's: beside PyTorch and Triton it has to have only ``MixerBlock``, ``backend``,
``dispatch.why_not_triton``, ``configs.target_of`` and ``configs.DEVICES``. Parts are timed where there are
plans.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import inspect
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

WARM_UPS = 3
# In a repetition. A GPU's queue takes about 1000 launches before a call waits, and ten calls take less than a
# time slice: where other processes run, too, most repetitions are undisturbed.
CALLS = 10
LIBRARY = "libcuda.so.1"

Call = Callable[[], object]
Step = Callable[[], Sequence[float]]  # returns the seconds of its spans


def measured(asked: dict[str, Any]) -> dict[str, Any]:
    """What ``host.py`` asks a process for: microseconds by row, and what they depend on."""
    import torch

    torch.set_num_threads(1)
    if not asked["gpu"]:
        _fake_torch(torch)
    import triton

    import fastmixer

    if not asked["gpu"]:
        _fake_device()
    clock = Clock(asked["gpu"], asked["repetitions"])
    S, C, D, E = asked["sizes"]
    where = {"dtype": getattr(torch, asked["dtype"]), "device": "cuda" if asked["gpu"] else "cpu"}
    torch.manual_seed(0)
    block = fastmixer.MixerBlock(C, S, (D / C, E / C), **where)
    x = torch.randn(asked["batch"], S, C, **where)
    launches, peers = None, {}
    gc.collect()
    gc.disable()
    with fastmixer.backend("triton"):
        rows = _totals(block, block, x, clock)
        if importlib.util.find_spec("fastmixer.ops.plan"):
            launches, parts = _parts(block, x, clock)
            rows |= parts
    if asked["peers"]:
        peers = {name: _totals(call, block, x, clock) for name, call in _peers(block).items()}
    four = torch.ones(4)
    return {
        "code": str(Path(fastmixer.__file__).resolve().parents[1]),
        "gpu": torch.cuda.get_device_name() if asked["gpu"] else None,
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "launches": launches,
        "add": clock({"add": partial(torch.add, four, four)})["add"],
        "rows": rows,
        "peers": peers,
    }


class Clock:
    """Times calls on the host. gpu: whether there is a real one."""

    def __init__(self, gpu: bool, repetitions: int) -> None:
        self._gpu, self._repetitions = gpu, repetitions

    def __call__(self, calls: dict[str, Call]) -> dict[str, float]:
        """Microseconds of each call, which take turns: the median of the repetitions."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        for call in [*calls.values()] * WARM_UPS:
            call()
        for _ in range(self._repetitions):
            for name, call in calls.items():
                self._settle()
                began = time.perf_counter()
                for _ in range(CALLS):
                    call()
                times[name].append(time.perf_counter() - began)
        self._settle()
        return {name: statistics.median(found) / CALLS * 1e6 for name, found in times.items()}

    def spans(self, step: Step) -> list[float]:
        """Microseconds of each span of a step: the median of all steps."""
        for _ in range(WARM_UPS):
            step()
        times = []
        for _ in range(self._repetitions):
            self._settle()
            times += [step() for _ in range(CALLS)]
        self._settle()
        return [statistics.median(span) * 1e6 for span in zip(*times, strict=True)]

    def _settle(self) -> None:
        """Empties the queue of launches, or the stub's list of them."""
        import torch

        if self._gpu:
            torch.cuda.synchronize()
        else:
            ctypes.c_int.in_dll(ctypes.CDLL(LIBRARY), "fake_count_launches").value = 0


def _totals(call: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor, clock: Clock) -> dict[str, float]:
    """The calls as a whole; ``call`` runs ``block``."""
    import torch

    block.eval()
    with torch.no_grad():
        found = clock({"eval": partial(call, x)})
    block.train()
    x, gradient = x.clone().requires_grad_(), torch.randn_like(x)
    leaves = [x, *block.parameters()]

    def step() -> tuple[float, float]:
        began = time.perf_counter()
        y = call(x)
        middle = time.perf_counter()
        y.backward(gradient)
        end = time.perf_counter()
        for leaf in leaves:  # gradients are handed over, not added
            leaf.grad = None
        return middle - began, end - middle

    forward, backward = clock.spans(step)
    both = {"training forward": forward, "training backward": backward, "training": forward + backward}
    return found | both


# ---- parts -----------------------------------------------------------------------------------------------


def _parts(block: nn.Module, x: Tensor, clock: Clock) -> tuple[int, dict[str, float]]:
    """The number of launches of an eval call, and its parts: each without what is timed inside of it."""
    import torch

    from fastmixer import functional

    block.eval()
    with torch.no_grad():
        with mock.patch.object(functional, "prepared", return_value=lambda: x) as prepared:
            block(x)
        args = prepared.call_args.args
        call = functional.prepared(*args)
        plan, tensors = call.func.__self__, call.args
        ready = _ready_launches(plan, tensors)
        times = clock(
            {
                "block": partial(block, x),
                "prepared": lambda: functional.prepared(*args)(),
                "plan": partial(plan, *tensors),
                "allocations": partial(_allocate, plan, x.device),
                "launches": partial(_run_all, [partial(f, *a, stream=stream) for f, a, stream in ready]),
                "bare": partial(_run_all, [_bare(*launch) for launch in ready]),
            }
        )
    above = times["plan"] - times["allocations"] - times["bare"]
    return len(ready), {
        "eval: checks": times["block"] - times["prepared"],
        "eval: plan": times["prepared"] - times["plan"],
        "eval: allocation and binding": times["plan"] - times["launches"],
        "eval: launches": times["launches"],
        "eval: above Triton's launcher, per launch": above / len(ready),
    }


def _run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _ready_launches(plan: Any, tensors: Sequence[Tensor | None]) -> list[tuple[Callable, tuple, int]]:
    """The runner, the arguments and the stream of every launch of a call.

    Most of what they point to is freed after it: to run them again is safe while nothing else is allocated
    and kept, as PyTorch keeps the memory itself.
    """
    ready = []

    def noting(step: Any) -> Any:
        if not hasattr(step, "runner"):  # allocates or releases
            return step

        def note(*args: object, stream: int) -> None:
            ready.append((step.runner, args, stream))

        return replace(step, runner=note)

    replace(plan, steps=tuple(map(noting, plan.steps)))(*tensors)
    return ready


def _bare(runner: Callable, args: tuple, stream: int) -> Call:
    """What ``runner``, made by Triton's ``CompiledKernel.__getitem__``, calls in the end; without hooks."""
    found = inspect.getclosurevars(runner).nonlocals
    kernel, grid = found["self"], found["grid"]
    fixed = kernel.function, kernel.packed_metadata, None, None, None
    return partial(kernel.run, *grid[:3], stream, *fixed, *args)


def _allocate(plan: Any, device: torch.device) -> list[Tensor]:
    """What a call of the plan allocates."""
    import torch

    from fastmixer.ops.plan import Allocation

    memories = [torch.empty(plan.workspace, dtype=torch.uint8, device=device)]
    for shape, stride, dtype in (step for step in plan.steps if isinstance(step, Allocation)):
        memories.append(torch.empty_strided(shape, stride, dtype=dtype, device=device))
    return memories


# ---- beside it, and without a GPU ------------------------------------------------------------------------


def _peers(block: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    """Eager PyTorch on the same block, module by module as timm runs it, and compiled."""
    import torch

    eager = block.forward_modules
    compiled = partial(torch.compile, eager, dynamic=False)
    return {
        "eager": eager,
        "compile": compiled(),
        "max_autotune": compiled(mode="max-autotune-no-cudagraphs"),
    }


def _fake_torch(torch: Any) -> None:
    """Has CPU tensors pass for a GPU's with Triton, and PyTorch's products allocate only."""
    cuda = torch.cuda
    cuda.is_available, cuda.current_device = lambda: True, lambda: 0
    cuda.get_device_capability = lambda device=None: (9, 0)
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    # Autograd's engine asks PyTorch's own CUDA runtime, for which the stub is not enough.
    warnings.filterwarnings("ignore", message="CUDA initialization")

    def product(*tensors: Tensor, out: Tensor | None = None) -> Tensor:
        a, b = tensors[-2:]
        return a.new_empty((*a.shape[:-1], b.shape[-1])) if out is None else out

    torch.mm = torch.bmm = torch.addmm = product


def _fake_device() -> None:
    """Has fastmixer take the CPU for an H100."""
    from fastmixer import configs, dispatch

    target = configs.DEVICES["nvidia-h100-80gb-hbm3"].target
    configs.target_of = lambda device: target
    dispatch.why_not_triton = lambda *_: None


if __name__ == "__main__":
    # Python puts this folder first: the modules in it must not pass for somebody's top-level ones.
    sys.path[:] = [path for path in sys.path if path != str(Path(__file__).parent)]
    print(json.dumps(measured(json.loads(sys.argv[1]))))

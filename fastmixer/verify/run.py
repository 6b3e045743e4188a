"""``python -m fastmixer verify``: are a real model's fused blocks as close to the truth as eager PyTorch?"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from fastmixer import interpreter
from fastmixer.blocks import freezing, surgery
from fastmixer.checkpoint.load import load_checkpoint
from fastmixer.demo import build_model, photographs, randomise
from fastmixer.usage import DEFAULT_MODEL, UsageError
from fastmixer.verify import measure, table

DEMO_PACKAGES = ("timm", "sklearn", "rich", "PIL")
INTERPRETED_BLOCKS = 3  # whose gradients are compared where nobody says: the interpreter takes its time


def run(
    name: str = DEFAULT_MODEL,
    dtype: str = "bfloat16",
    batch: int = 1,
    checkpoint: str | None = None,
    *,
    gradients: int | str | None = None,
    freeze: bool = False,
    build: Callable[[str], nn.Module] | None = None,
) -> int:
    """Verifies one model, prints the table, and returns the exit code: 0 passed, 1 failed.

    Args:
        name: a timm model, or one of the paper's seven.
        dtype: a torch dtype's name: "bfloat16", "float16" or "float32".
        batch: number of images.
        checkpoint: a file of weights for the model; without one they are random.
        gradients: of how many blocks to compare the gradients too: a number, "all", which includes the model
            end to end, or "auto": all on a GPU, a few in the interpreter. None: of no block.
        freeze: run the fused model frozen, and fail too if its packed weights are not those of the model.
        build: makes the model from its name instead of timm.

    Raises:
        UsageError: a package is missing, the model is unknown, the checkpoint does not fit, or no block of
            the model can be fused, so that there is nothing to verify.
    """
    device = _device()
    model = (build or build_model)(name)
    weights = _fill(model, checkpoint)
    images = photographs(model, batch).to(device, getattr(torch, dtype))
    model = model.to(device, getattr(torch, dtype)).eval()
    fused = copy.deepcopy(model)
    report = surgery.fuse(fused)
    if not report.fused:
        raise UsageError(f"nothing to verify: no block of {name} can be fused\n{report}")
    if freeze:
        freezing.freeze(fused)
    on_gpu = device.type == "cuda"
    names = [row.name for row in report.fused]
    counts = {None: 0, "all": len(names), "auto": len(names) if on_gpu else INTERPRETED_BLOCKS}
    chosen = choose(names, counts.get(gradients, gradients))
    end_to_end = len(chosen) == len(names)
    with table.progress_bar(len(names) + 3 + 3 * on_gpu + len(chosen) + end_to_end) as advance:
        result, inputs = measure.outputs(model, fused, report, images, advance, chosen)
        if chosen:
            whole = images if end_to_end else None
            result.gradients = measure.gradients(model, fused, inputs, whole, advance)
        if on_gpu:
            result.milliseconds = measure.time_on_gpu(model, fused, images, advance)
    place = torch.cuda.get_device_name() if on_gpu else "the CPU, in Triton's interpreter"
    table.render(result, f"{name}, {dtype}, batch {batch}, {'frozen, ' * freeze}on {place}", weights)
    stale = freezing.stale(fused)
    if stale:
        print(f"stale: the packed weights of {', '.join(stale)} are not those of the model")
    return 0 if result.ok and not stale else 1


def choose(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names, or all: the first, the last, and the others evenly in between."""
    places = np.linspace(0, len(names) - 1, min(count, len(names)))
    return [names[round(place)] for place in places]


def _fill(model: nn.Module, checkpoint: str | None) -> str:
    """Gives the model its weights and says which."""
    if checkpoint is None:
        randomise(model)
        return "random weights: LayerNorm and biases are randomised too, no checkpoint was given"
    try:
        load_checkpoint(model, checkpoint)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--checkpoint: {error}") from error
    return f"weights from {checkpoint}"


def _device() -> torch.device:
    """A GPU, or the CPU where Triton is interpreting; UsageError where no kernel or no table can be had."""
    missing = [package for package in DEMO_PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(f'verify needs {", ".join(missing)}: pip install "fastmixer[demo]"')
    if importlib.util.find_spec("triton") is None:
        raise UsageError("verify runs Triton kernels, and triton is not installed (Linux only)")
    if interpreter.is_interpreted():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    raise UsageError(
        "there is no GPU, and triton was imported before TRITON_INTERPRET=1 was set: "
        "set it in the environment before Python starts"
    )

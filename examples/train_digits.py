"""Trains a small MLP-Mixer on handwritten digits twice, with PyTorch's own operations and fused.

    python examples/train_digits.py

Both runs start from the same weights and see the same batches; only ``fastmixer.backend`` differs. Without a
GPU the fused run goes through Triton's interpreter: one block and few steps, which takes two minutes or so.
With one it runs natively: a deeper model for longer. Both learning curves go into a PNG.

Exit codes: 0 both runs classify at least 95% of the test digits, within 1 point of each other, and in fp32
their losses agree over the first 50 steps; 1 they do not, with the reason; 2 what was asked cannot be done.
Needs scikit-learn, rich and matplotlib besides fastmixer.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

import fastmixer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
BACKENDS = {"torch": "reference", "triton": "fused"}  # what fastmixer.backend is told -> what we call it

LEAST_ACCURACY = 95.0  # percent
MOST_APART = 1.0  # points between the two accuracies
COMPARED_STEPS = 50
LOSS_TOLERANCE = 1e-3  # relative, in fp32


@dataclass(frozen=True)
class Plan:
    """The model and how it is trained."""

    num_blocks: int
    embed_dim: int
    steps: int
    batch: int
    learning_rate: float
    evaluations: int  # of the test set, evenly over the run
    betas: tuple[float, float] = (0.8, 0.95)  # AdamW; a short memory, for few steps
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    warm_up: float = 0.15  # share of the steps
    drop_path: float = 0.0
    dtype: str = "fp32"
    memory: str = "balanced"
    seed: int = 0


# In the interpreter a tile takes about as long at any size, so that what counts is the number of samples:
# one block and 2,160 of them, one and a half epochs, are what two minutes allow.
INTERPRETED = Plan(num_blocks=1, embed_dim=256, steps=90, batch=24, learning_rate=2e-3, evaluations=3)
NATIVE = Plan(num_blocks=4, embed_dim=128, steps=400, batch=128, learning_rate=2e-3, evaluations=20)


@dataclass
class Run:
    """What one training run measured."""

    losses: list[float] = field(default_factory=list)  # one a step
    accuracies: list[tuple[int, float]] = field(default_factory=list)  # (steps done, percent of the test set)
    seconds: float = 0.0  # evaluation included

    @property
    def accuracy(self) -> float:
        return self.accuracies[-1][1]


# ---- the digits ------------------------------------------------------------------------------------------

VIEWS = 4  # a side


class Digits(NamedTuple):
    """Images (N, 1, 32, 32) fp32 and labels (N,), split into what is trained on and what is tested on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load(device: torch.device) -> Digits:
    """scikit-learn's 1,797 digits; always the same fifth of them is for testing."""
    pixels, labels = load_digits(return_X_y=True)
    split = train_test_split(pixels, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2])
    mean, std = train.mean(dim=0), train.std(dim=0) + 1  # of each pixel, 0 to 16; some are never inked
    images = [deal_out((part - mean) / std).to(device) for part in (train, test)]
    labels = [torch.tensor(part).to(device) for part in split[2:]]
    return Digits(images[0], labels[0], images[1], labels[1])


def deal_out(images: Tensor) -> Tensor:
    """Digits (N, 1, 8, 8) -> (N, 1, 32, 32): 4 x 4 patches, each a view of the whole digit.

    The digit is enlarged 4 times, and patch (i, j) gets every fourth pixel from (i, j) on: the whole digit,
    moved by a fraction of a pixel. A patch of 8 x 8 pixels cut out of the enlarged digit would show a few
    strokes' ends; where they were, a Mixer would have to learn, which takes it far more samples.
    """
    large = F.interpolate(images, scale_factor=VIEWS, mode="bilinear", align_corners=False)
    views = F.pixel_unshuffle(large, VIEWS)  # (N, 16, 8, 8)
    return views.view(-1, VIEWS, VIEWS, 8, 8).permute(0, 1, 3, 2, 4).reshape(-1, 1, 8 * VIEWS, 8 * VIEWS)


def draw_batches(count: int, plan: Plan) -> Tensor:
    """(steps, batch) indices into ``count`` samples: one shuffled epoch after the other."""
    generator = torch.Generator().manual_seed(plan.seed)
    needed = plan.steps * plan.batch
    epochs = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
    return torch.cat(epochs)[:needed].view(plan.steps, plan.batch)


# ---- training --------------------------------------------------------------------------------------------


def build_model(plan: Plan) -> nn.Module:
    """A Mixer of 16 tokens; the plan's seed decides its weights."""
    torch.manual_seed(plan.seed)
    return fastmixer.MlpMixer(
        num_classes=10,
        img_size=8 * VIEWS,
        in_chans=1,
        patch_size=8,
        num_blocks=plan.num_blocks,
        embed_dim=plan.embed_dim,
        drop_path_rate=plan.drop_path,
    )


def build_optimizer(model: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    """AdamW; weights decay, biases and LayerNorm's parameters do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": plan.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.learning_rate, betas=plan.betas)


def rate(step: int, plan: Plan) -> float:
    """The learning rate at a step, relative to the highest: a linear warm-up, then half a cosine."""
    rising = plan.warm_up * plan.steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / (plan.steps - rising)))


def train(digits: Digits, plan: Plan, advance: Callable[[float], None]) -> Run:
    """One training run with the backend in force; ``advance`` gets the loss of every step."""
    device = digits.train_images.device
    dtype = DTYPES[plan.dtype]
    model = build_model(plan).to(device)
    optimizer = build_optimizer(model, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, plan))
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    every = max(plan.steps // plan.evaluations, 1)
    run = Run()
    start = time.perf_counter()
    for step, indices in enumerate(draw_batches(len(digits.train_labels), plan).to(device), 1):
        with autocast:
            logits = model(digits.train_images[indices])
            labels = digits.train_labels[indices]
            loss = F.cross_entropy(logits, labels, label_smoothing=plan.label_smoothing)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        run.losses.append(loss.item())
        if step % every == 0 or step == plan.steps:
            with autocast:
                run.accuracies.append((step, evaluate(model, digits)))
        advance(run.losses[-1])
    run.seconds = time.perf_counter() - start
    return run


@torch.no_grad()
def evaluate(model: nn.Module, digits: Digits) -> float:
    """Percent of the test digits that the model classifies correctly."""
    model.eval()
    right = model(digits.test_images).argmax(dim=1) == digits.test_labels
    model.train()
    return 100 * right.float().mean().item()


def train_both(digits: Digits, plan: Plan) -> dict[str, Run]:
    """The same plan with each backend, under a progress bar on stderr."""
    columns = (
        TextColumn("{task.description:<9}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeElapsedColumn(),
    )
    runs = {}
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for backend, name in BACKENDS.items():
            task = progress.add_task(name, total=plan.steps, loss="")

            def advance(loss: float, task=task) -> None:
                progress.update(task, advance=1, loss=f"loss {loss:.3f}")

            with fastmixer.backend(backend), fastmixer.memory(plan.memory), warnings.catch_warnings():
                # A fused run that fell back to the reference would compare it with itself.
                warnings.simplefilter("error", fastmixer.FallbackWarning)
                runs[backend] = train(digits, plan, advance)
    return runs


# ---- the comparison --------------------------------------------------------------------------------------


def largest_difference(runs: dict[str, Run]) -> float:
    """The largest relative difference of the two runs' losses over the first 50 steps."""
    pairs = list(zip(runs["torch"].losses, runs["triton"].losses, strict=True))[:COMPARED_STEPS]
    differences = [abs(fused - reference) / abs(reference) for reference, fused in pairs]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def complaints(runs: dict[str, Run], plan: Plan) -> list[str]:
    """What is wrong with the two runs; empty if nothing is."""
    found = []
    for backend, run in runs.items():
        if not run.accuracy >= LEAST_ACCURACY:
            found.append(f"the {BACKENDS[backend]} run reaches {run.accuracy:.1f}%, not {LEAST_ACCURACY}%")
    apart = abs(runs["torch"].accuracy - runs["triton"].accuracy)
    if not apart <= MOST_APART:
        found.append(f"the accuracies are {apart:.2f} points apart, over {MOST_APART}")
    difference = largest_difference(runs)
    if plan.dtype == "fp32" and not difference <= LOSS_TOLERANCE:
        steps = f"the first {COMPARED_STEPS} steps"
        found.append(f"the losses of {steps} differ by {difference:.1e}, over {LOSS_TOLERANCE:.0e}")
    return found


def environment(device: torch.device) -> dict[str, str]:
    """Where this ran, and with which versions."""
    import triton  # not at the top: by now choose_device has decided how triton is to run kernels

    interpreted = device.type == "cpu"
    return {
        "device": "CPU in Triton's interpreter" if interpreted else torch.cuda.get_device_name(device),
        "fastmixer": fastmixer.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


# ---- what the user gets ----------------------------------------------------------------------------------


def plot(runs: dict[str, Run], plan: Plan, where: dict[str, str], path: Path) -> None:
    """Both losses and both accuracies over the steps, as a PNG."""
    figure = Figure(figsize=(9, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    # The reference is broad and pale, so that it shows beneath a fused curve that covers it.
    styles = {
        "torch": {"color": "#f0b27a", "linewidth": 5, "solid_capstyle": "round"},
        "triton": {"color": "#1b4f72", "linewidth": 1.5},
    }
    for backend, run in runs.items():
        style = {**styles[backend], "label": BACKENDS[backend]}
        left.plot(range(1, len(run.losses) + 1), run.losses, **style)
        steps, accuracies = zip(*run.accuracies, strict=True)
        marker = {"marker": "o", "markersize": 2.5 * style["linewidth"] ** 0.6}
        style["label"] += f", {run.accuracy:.1f}% at the end"
        right.plot(steps, accuracies, **style, **marker)
    left.set(ylabel="training loss", title="Loss of each batch")
    right.set(ylabel="correct", title="Accuracy on the test digits")
    right.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.set_xlim(0, plan.steps * 1.02)
        axes.grid(color="#e5e7e9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontsize("medium")
    left.legend(frameon=False)
    right.legend(frameon=False, loc="upper left")
    versions = ", ".join(f"{name} {where[name]}" for name in ("fastmixer", "torch", "triton"))
    title = f"MLP-Mixer on handwritten digits: {where['device']}, {plan.dtype}"
    figure.suptitle(f"{title}\n{versions}", fontsize="medium")
    figure.savefig(path, dpi=150, format="png")


def print_table(runs: dict[str, Run], plan: Plan, where: dict[str, str]) -> None:
    """What was measured, on stdout, and what the seconds mean."""
    print(f"{where['device']}, {plan.dtype}, {plan.steps} steps of {plan.batch}, seed {plan.seed}\n")
    print(f"{'run':<12}{'test accuracy':>14}{'last loss':>12}{'seconds':>10}")
    for backend, run in runs.items():
        accuracy = f"{run.accuracy:.2f}%"
        print(f"{BACKENDS[backend]:<12}{accuracy:>14}{run.losses[-1]:>12.4f}{run.seconds:>10.1f}")
    compared = min(COMPARED_STEPS, plan.steps)
    print(
        f"\nlargest relative difference of the losses, first {compared} steps: {largest_difference(runs):.1e}"
    )
    if where["device"].startswith("CPU"):
        print("The fused seconds are those of Triton's interpreter, in Python: they say nothing about speed.")
    else:
        print("The seconds include compiling the kernels; `python -m fastmixer bench` measures speed.")


def write_json(runs: dict[str, Run], plan: Plan, where: dict[str, str], path: Path) -> None:
    """Everything that was measured, with the plan and the environment."""
    content = {
        "environment": where,
        "plan": asdict(plan),
        "runs": {BACKENDS[backend]: asdict(run) for backend, run in runs.items()},
        "largest_relative_loss_difference": largest_difference(runs),
        "complaints": complaints(runs, plan),
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def choose_device() -> torch.device:
    """A GPU that the kernels run on; otherwise one thread of the CPU, with Triton's interpreter turned on.

    The interpreter can only be chosen before triton is imported, which fastmixer does at the first kernel.
    """
    native = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    if native and (torch.version.hip or torch.cuda.get_device_capability() >= (8, 0)):
        return torch.device("cuda")
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)  # the interpreter's many small operations only wait for more
    return torch.device("cpu")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(description="Trains a small Mixer on digits: reference and fused.")
    for name in ("steps", "batch"):
        defaults = f"default: {getattr(INTERPRETED, name)}, on a GPU {getattr(NATIVE, name)}"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=defaults)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="16 bits by autocast; default: fp32")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches, default: 0")
    parser.add_argument("--memory", choices=("balanced", "lean"), default="balanced")
    parser.add_argument("--drop-path", type=float, default=0.0, metavar="RATE", help="default: 0")
    parser.add_argument("--output", type=Path, default="digits.png", metavar="FILE.png", help="the picture")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything that was measured")
    options = parser.parse_args(arguments)
    for name in ("steps", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.drop_path < 1:
        parser.error(f"--drop-path must be at least 0 and below 1, got {options.drop_path}")
    for name in ("output", "json"):
        path = getattr(options, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name}: cannot write {path}")
    if importlib.util.find_spec("triton") is None:
        parser.error("the fused run needs triton, which is not installed (Linux only)")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, compares, draws, and returns the exit code; ``arguments`` defaults to the process's own."""
    options = parse(arguments)
    device = choose_device()
    known = {setting.name for setting in fields(Plan)}
    given = {k: v for k, v in vars(options).items() if k in known and v is not None}
    plan = replace(INTERPRETED if device.type == "cpu" else NATIVE, **given)
    runs = train_both(load(device), plan)
    where = environment(device)
    plot(runs, plan, where, options.output)
    if options.json is not None:
        write_json(runs, plan, where, options.json)
    print_table(runs, plan, where)
    found = complaints(runs, plan)
    for complaint in found:
        print(f"FAILED: {complaint}", file=sys.stderr)
    if not found:
        print(f"PASSED: the fused run learns what the reference learns; curves in {options.output}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())

"""Trains the small MLP-Mixer of ``train_digits.py`` on several processes, fused: DDP, or FSDP2 with --fsdp.

    torchrun --standalone --nproc-per-node 2 examples/train_ddp.py --steps 20

One process a GPU with nccl; without a GPU gloo, and the kernels run in Triton's interpreter: 20 steps take
half a minute or so on two cores, the default about two. Every batch is shared out over the processes, so that
their number changes the time and not what is learnt.

Exit codes: 0 trained, with the test accuracy on stdout; 2 what was asked cannot be done.

Needs scikit-learn, rich and matplotlib besides fastmixer.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from train_digits import (
    DTYPES,
    INTERPRETED,
    NATIVE,
    Digits,
    Plan,
    build_model,
    build_optimizer,
    choose_device,
    draw_batches,
    evaluate,
    load,
    rate,
)

import fastmixer


def distribute(model: nn.Module, plan: Plan, *, fsdp: bool) -> nn.Module:
    """The model for several processes. A model of foreign blocks would be given to ``fuse`` before."""
    if not fsdp:
        return DistributedDataParallel(model)
    # Weights are gathered in the dtype of the products; gradients are summed, and kept, in fp32.
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[plan.dtype], reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=replace(policy, output_dtype=torch.float32))  # for the loss


def train(digits: Digits, plan: Plan, *, fsdp: bool) -> nn.Module:
    """The model, trained on this process's share of every batch."""
    rank, size = dist.get_rank(), dist.get_world_size()
    device = digits.train_images.device
    model = distribute(build_model(plan).to(device), plan, fsdp=fsdp)
    optimizer = build_optimizer(model, plan)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, plan))
    autocast = torch.autocast(device.type, DTYPES[plan.dtype], enabled=plan.dtype != "fp32" and not fsdp)
    with Progress(console=Console(stderr=True), transient=True, disable=rank != 0) as progress:
        for batch in progress.track(draw_batches(len(digits.train_labels), plan), description="training"):
            indices = batch[rank::size].to(device)
            with autocast:
                logits = model(digits.train_images[indices])
                labels = digits.train_labels[indices]
                loss = F.cross_entropy(logits, labels, label_smoothing=plan.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def evaluate_together(model: nn.Module, digits: Digits) -> float:
    """Percent of the test digits that the model classifies correctly, each process trying its share."""
    share = slice(dist.get_rank(), None, dist.get_world_size())
    mine = digits._replace(test_images=digits.test_images[share], test_labels=digits.test_labels[share])
    count = len(mine.test_labels)
    sums = torch.tensor([evaluate(model, mine) * count, count], device=digits.test_images.device)
    dist.all_reduce(sums)
    return (sums[0] / sums[1]).item()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; argparse exits with 2 where they make no sense."""
    parser = argparse.ArgumentParser(description="Trains a small Mixer on digits on several processes.")
    for name in ("steps", "batch"):
        defaults = f"default: {getattr(INTERPRETED, name)}, on GPUs {getattr(NATIVE, name)}"
        parser.add_argument(f"--{name}", type=int, metavar="N", help=defaults)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters (FSDP2) instead of DDP")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batches, default: 0")
    options = parser.parse_args(arguments)
    if not dist.is_torchelastic_launched():
        parser.error("start it with torchrun --standalone --nproc-per-node 2 examples/train_ddp.py")
    size = int(os.environ["WORLD_SIZE"])
    for name, unit in (("steps", 1), ("batch", size)):
        value = getattr(options, name)
        if value is not None and (value < unit or value % unit):
            parser.error(f"--{name} must be a positive multiple of {unit}, got {value}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, and prints the accuracy in the first process; ``arguments`` defaults to the process's own."""
    options = parse(arguments)
    device = choose_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    given = {name: value for name, value in vars(options).items() if name != "fsdp" and value is not None}
    plan = replace(INTERPRETED if device.type == "cpu" else NATIVE, **given)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend)
    try:
        digits = load(device)
        with fastmixer.backend("triton"), warnings.catch_warnings():
            warnings.simplefilter("error", fastmixer.FallbackWarning)
            accuracy = evaluate_together(train(digits, plan, fsdp=options.fsdp), digits)
        if dist.get_rank() == 0:
            how = f"{'FSDP2' if options.fsdp else 'DDP'}, {backend}, {dist.get_world_size()} processes"
            print(f"test accuracy {accuracy:.1f}% after {plan.steps} steps: {how}, {plan.dtype}")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())

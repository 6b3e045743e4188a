"""The kernel level: every launch of a fused block on its own, recorded from a real call and run again.

A launch is recorded with the buffers it ran on, once for every input that is rotated through, and run again
on them as it is. Only launches of device code are cells here: products that PyTorch does are not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import measure
from .levels import Case, EagerHalf, FusedHalf, Subject

# Matrix products that a kernel does, of B * S * C * hidden multiplications each.
PRODUCTS = {
    "token_mixing": 2,
    "fc1": 1,
    "fc2": 1,
    "token_dgrad": 3,  # the hidden again, its gradient, the gradient of LN(x)
    "mlp_hidden_bwd": 1,
}


@dataclass
class Recorder:
    """Runs launches and keeps them while ``keeps`` is set."""

    keeps: bool = False
    found: list[Any] = field(default_factory=list)

    def __call__(self, launch: Any) -> None:
        from fastmixer.ops.launch import execute

        execute(launch)
        if self.keeps:
            self.found.append(launch)


class RecordedBlock(nn.Module):
    """A fused block whose halves report their launches: ``recorders`` by half."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.recorders = {half: Recorder() for half in ("token", "channel")}
        self.halves = [
            FusedHalf(EagerHalf(block, half), recorder) for half, recorder in self.recorders.items()
        ]

    def forward(self, x: Tensor) -> Tensor:
        from fastmixer.ops import checks, packing

        token, channel = self.halves
        both = {"token": token.eager.params(), "channel": channel.eager.params()}
        with torch.no_grad():  # as a block does, in one launch for both
            dtype = checks.compute_dtype(x, both["token"])
            packed = packing.pack_forward(x, both, dtype, token.context(x)).packed
        return channel.mix(*token.mix(x, packed=packed), packed)[0]


@dataclass(frozen=True)
class Op:
    """One kernel launch of a block: the same launch once for every input, and what it computes and moves."""

    name: str
    launches: list[Any]
    flops: int

    @property
    def bytes(self) -> int:
        """Of every tensor that the launch is given, each once."""
        tensors = self.launches[0].tensors()
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def block_subject(subject: Subject) -> Subject:
    """The subject of a block, with the fused side's launches recorded."""
    fused = RecordedBlock(subject.eager)
    return replace(subject, fused=fused, owner=subject.eager)


def record(subject: Subject, call: measure.Call) -> list[Op]:
    """The launches of one call on each of the items; of ``block_subject``'s subject."""
    runs = []
    call(subject.items[0])
    for item in subject.items:
        for recorder in subject.fused.recorders.values():
            recorder.keeps, recorder.found = True, []
        call(item)
        runs.append({half: recorder.found for half, recorder in subject.fused.recorders.items()})
        for recorder in subject.fused.recorders.values():
            recorder.keeps = False
    return [
        Op(
            title,
            [repeatable(run[half][index]) for run in runs],
            flops_of(runs[0][half][index], subject.case, half),
        )
        for half in runs[0]
        for index, title in enumerate(titles([op_name(launch, half) for launch in runs[0][half]]))
    ]


def titles(names: list[str]) -> list[str]:
    """The names, those that occur repeatedly numbered from 1."""
    counts, seen, found = Counter(names), Counter(), []
    for name in names:
        seen[name] += 1
        found.append(f"{name}_{seen[name]}" if counts[name] > 1 else name)
    return found


def op_name(launch: Any, half: str) -> str:
    """What ``fastmixer.configs`` calls the launch: as the cost model's predictions are named."""
    name = kernel_name(launch)
    if name == "token_wgrad":
        return "token_wgrad_fc1" if _wants_fc1(launch) else "token_wgrad_fc2"
    alone = name.startswith("token_") or (half == "token" and name in ("pack_weights", "row_moments"))
    return name if alone else f"{half}_{name}"


def _wants_fc1(launch: Any) -> bool:
    return launch.args["dw1_ptr"] is not None or launch.args["db1_ptr"] is not None


def kernel_name(launch: Any) -> str:
    """What ``launch.kernels()`` calls the launch's kernel."""
    from fastmixer.ops.launch import kernels

    return next(name for name, kernel in vars(kernels()).items() if kernel is launch.kernel)


def repeatable(launch: Any) -> Any:
    """The launch with an output of its own where it would overwrite what it reads.

    Run again and again in place, its numbers would grow without bound.
    """
    args = launch.args
    if args.get("dx_ptr") is None or args["dx_ptr"] is not args.get("dn_ptr"):
        return launch
    return replace(launch, args={**args, "dx_ptr": torch.empty_like(args["dx_ptr"])})


def flops_of(launch: Any, case: Case, half: str) -> int:
    """Of the matrix products that the launch does, recomputed ones too, without padding."""
    S, C = case.shape.tokens, case.shape.channels
    hidden = case.shape.token_hidden if half == "token" else case.shape.channel_hidden
    kernel, given = kernel_name(launch), launch.args
    products = PRODUCTS.get(kernel, 0)
    if kernel == "token_wgrad":  # the hidden again for both, its gradient for fc1's, and one product each
        products = 1 + 2 * _wants_fc1(launch) + (given["dw2_ptr"] is not None)
    if kernel == "mlp_hidden_bwd" and given["p_ptr"] is None:
        products += 1
    return 2 * products * case.batch * S * C * hidden


def run_again(launch: Any) -> None:
    """Runs a recorded launch on the buffers it has."""
    from fastmixer.ops.launch import execute

    execute(launch)


# ---- ceilings --------------------------------------------------------------------------------------------


def ceiling(op: Op, case: Case) -> dict[str, Callable[[Any], Any]]:
    """{"cublas": the bare product} for a kernel of one product, {"copy": as many bytes} for any other."""
    if op.flops == 2 * case.batch * case.shape.tokens * case.shape.channels * case.shape.channel_hidden:
        rows, E, C = case.batch * case.shape.tokens, case.shape.channel_hidden, case.shape.channels
        K, N = (E, C) if op.name == "channel_fc2" else (C, E)
        device = _device_of(op)
        a, b = (torch.randn(*shape, device=device, dtype=case.product_dtype) for shape in ((rows, K), (K, N)))
        return {"cublas": lambda _: a @ b}
    source = torch.empty(max(op.bytes // 2, 1), dtype=torch.uint8, device=_device_of(op))
    target = torch.empty_like(source)
    return {"copy": lambda _: target.copy_(source)}


def _device_of(op: Op) -> torch.device:
    return next(op.launches[0].tensors()).device

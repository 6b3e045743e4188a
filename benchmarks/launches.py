"""The kernel level: every launch of a fused block on its own, recorded from a real call and run again.

A launch is recorded with the buffers it ran on, once for every input that is rotated through, and run again
on them as it is. Only launches of device code are cells here: products that PyTorch does are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fastmixer.ops.launch import Launch, execute

from . import measure
from .levels import Case, EagerHalf, Subject, mix

# Matrix products that a kernel does at least, of B * S * C * hidden multiplications each; ``flops_of`` adds.
PRODUCTS = {
    "token_mixing": 2,
    "fc1": 1,
    "fc2": 1,
    "token_dgrad": 3,  # the hidden again, its gradient, the gradient of LN(x)
    "token_wgrad": 1,  # the hidden again
    "mlp_hidden_bwd": 1,
}


class RecordedBlock:
    """A fused block on an eager block's parameters. launched: (half, launch) of the last call."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.launched: list[tuple[str, Launch]] = []

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.block.named_parameters()

    def __call__(self, x: Tensor) -> Tensor:
        self.launched = []
        halves = {name: EagerHalf(self.block, name).params() for name in ("token", "channel")}
        return mix(x, halves, self._execute)

    def _execute(self, launch: Launch) -> None:
        execute(launch)
        self.launched.append((launch.half, launch))


@dataclass(frozen=True)
class Op:
    """One kernel launch of a block: the same launch once for every input, and what it computes and moves."""

    name: str
    launches: list[Launch]
    flops: int

    @property
    def bytes(self) -> int:
        """Of every tensor that the launch is given, each once."""
        tensors = self.launches[0].tensors()
        return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


def record(subject: Subject, call: measure.Call) -> list[Op]:
    """The launches of one call on each of the items; the fused side of the subject is a ``RecordedBlock``."""
    call(subject.items[0])
    runs = []
    for item in subject.items:
        call(item)
        # Those of a half stand together: its backward comes after the other half's.
        runs.append(sorted(subject.fused.launched, key=lambda entry: entry[0] != "token"))
    names = [op_name(launch, half) for half, launch in runs[0]]
    ops = []
    for index, same in enumerate(zip(*runs, strict=True)):
        name, (half, first) = names[index], same[0]
        if names.count(name) > 1:
            name = f"{name}_{names[: index + 1].count(name)}"
        ops.append(Op(name, [repeatable(launch) for _, launch in same], flops_of(first, subject.case, half)))
    return ops


def op_name(launch: Launch, half: str) -> str:
    """The row of a tuned op, else half and kernel: as the cost model's predictions are named."""
    name = launch.kernel_name
    if name == "token_wgrad":
        return "token_wgrad_fc1" if _wants_fc1(launch) else "token_wgrad_fc2"
    if _recomputes(launch):
        name += "_recompute"
    alone = name.startswith("token_") or (half == "token" and name in ("pack_weights", "row_moments"))
    return name if alone else f"{half}_{name}"


def _wants_fc1(launch: Launch) -> bool:
    return launch.args["dw1_ptr"] is not None or launch.args["db1_ptr"] is not None


def _recomputes(launch: Launch) -> bool:
    return launch.kernel_name == "mlp_hidden_bwd" and launch.args["p_ptr"] is None


def repeatable(launch: Launch) -> Launch:
    """The launch with an output of its own where it would overwrite what it reads.

    Run again and again in place, its numbers would grow without bound.
    """
    args = launch.args
    if args.get("dx_ptr") is None or args["dx_ptr"] is not args.get("dn_ptr"):
        return launch
    return replace(launch, args={**args, "dx_ptr": torch.empty_like(args["dx_ptr"])})


def flops_of(launch: Launch, case: Case, half: str) -> int:
    """Of the matrix products that the launch does, recomputed ones too, without padding."""
    S, C = case.shape.tokens, case.shape.channels
    hidden = case.shape.token_hidden if half == "token" else case.shape.channel_hidden
    products = PRODUCTS.get(launch.kernel_name, 0) + _recomputes(launch)
    if launch.kernel_name == "token_wgrad":  # one product each, for fc1's the hidden's gradient too
        products += 2 * _wants_fc1(launch) + (launch.args["dw2_ptr"] is not None)
    return 2 * products * case.batch * S * C * hidden


def ceiling(op: Op, case: Case) -> dict[str, measure.Call]:
    """{"cublas": the bare product} for a kernel of one product, {"copy": as many bytes} for any other."""
    device = next(op.launches[0].tensors()).device
    rows, C, E = case.batch * case.shape.tokens, case.shape.channels, case.shape.channel_hidden
    if op.flops == 2 * rows * C * E:
        K, N = (E, C) if op.name == "channel_fc2" else (C, E)
        a, b = (torch.randn(*shape, device=device, dtype=case.product_dtype) for shape in ((rows, K), (K, N)))
        return {"cublas": lambda _: a @ b}
    source = torch.empty(max(op.bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"copy": lambda _: target.copy_(source)}

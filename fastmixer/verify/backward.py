"""The backward half of ``verify``: every gradient of a model's fused blocks, against the truth and eager.

A block on its own: the fused block, eager and the fp64 truth get the input that the fused block got on the
photographs, and one random gradient of its output. What they answer is compared tensor by tensor: the
output, which with gradients enabled comes from other code than without, then the gradients of the input and
of every parameter.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmixer import dispatch, parity
from fastmixer.verify.forward import Advance, fused_or_error, judge

INTERPRETED_BLOCKS = 3  # how many blocks are compared where nobody says: the interpreter takes its time
WHOLE_MODEL = "end to end"


@dataclass(frozen=True)
class Part:
    """One block, or the model end to end: its tensors by name, each with its comparison."""

    name: str
    tensors: dict[str, parity.Parity]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(name for name, p in self.tensors.items() if not p.ok)

    @property
    def worst(self) -> str:
        """The tensor that is nearest its bound, or farthest beyond it."""
        return max(self.tensors, key=lambda name: self.tensors[name].share_of_bound)


@dataclass(frozen=True)
class Gradients:
    """All that was compared, and the fused blocks that were not."""

    parts: tuple[Part, ...]
    left_out: tuple[str, ...]
    memory: str  # what the forward kept: "balanced" or "lean"

    @property
    def ok(self) -> bool:
        return bool(self.parts) and not any(part.failed for part in self.parts)


def choose(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names, or all: the first, the last, and the others evenly in between."""
    if count >= len(names):
        return list(names)
    step = (len(names) - 1) / max(count - 1, 1)
    return [names[round(index * step)] for index in range(count)]


@contextlib.contextmanager
def recorded_inputs(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Fills a dict with what each of the named modules of ``model`` is given inside the ``with`` block."""
    inputs: dict[str, Tensor] = {}

    def record(name: str, args: tuple[Tensor, ...]) -> None:
        inputs[name] = args[0].detach()

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: record(name, args))
        for name in names
    ]
    try:
        yield inputs
    finally:
        for hook in hooks:
            hook.remove()


def measure(
    eager: nn.Module,
    fused: nn.Module,
    names: Sequence[str],
    inputs: dict[str, Tensor],
    images: Tensor,
    advance: Advance,
) -> Gradients:
    """Compares the blocks in ``inputs``, and if they are all that are fused, the gradient of the images too.

    Args:
        eager, fused: the model and its fused copy, in the images' dtype.
        names: the fused blocks.
        inputs: what the blocks to compare were given, by name.
        images: (batch, 3, H, W).
    """
    parts = []
    for name, x in inputs.items():
        advance(f"gradients of {name}")
        parts.append(Part(name, compare(eager.get_submodule(name), fused.get_submodule(name), x)))
    left_out = tuple(name for name in names if name not in inputs)
    if not left_out:
        advance(f"gradients {WHOLE_MODEL}")
        found = compare(eager, fused, images, parameters=False)
        parts.append(Part(WHOLE_MODEL, {"logits": found["output"], "images": found["x"]}))
    return Gradients(tuple(parts), left_out, dispatch.current_memory())


def compare(
    eager: nn.Module, fused: nn.Module, x: Tensor, *, parameters: bool = True
) -> dict[str, parity.Parity]:
    """The comparison of "output", "x" (its gradient) and, unless they are left out, every parameter's."""
    truth = copy.deepcopy(eager).double()
    with dispatch.backend("triton"), fused_or_error():
        of_fused = _answers(fused, x, x.dtype, parameters)
    with dispatch.backend("torch"):
        of_eager = _answers(eager, x, x.dtype, parameters)
        of_truth = _answers(truth, x.double(), x.dtype, parameters)
    return {name: judge(of_fused[name], of_eager[name], exact) for name, exact in of_truth.items()}


def _answers(module: nn.Module, x: Tensor, dtype: torch.dtype, parameters: bool) -> dict[str, Tensor]:
    """The output and the gradients, by name, for a gradient of the output drawn in ``dtype``."""
    with torch.enable_grad():
        sources = {"x": x.detach().requires_grad_()}
        if parameters:
            sources |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        output = module(sources["x"])
        given = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        # A gradient that was forgotten counts as zeros, and fails.
        found = torch.autograd.grad(
            output, list(sources.values()), given.to(output), allow_unused=True, materialize_grads=True
        )
    return {"output": output.detach(), **dict(zip(sources, found, strict=True))}

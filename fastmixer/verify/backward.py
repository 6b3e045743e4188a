"""The backward half of ``verify``: every gradient of a model's fused blocks, against the truth and eager.

A block on its own: the fused block, eager and the fp64 truth get the input that the fused block got on the
photographs, and one random gradient of its output. What they answer is compared tensor by tensor: the
output, which with gradients enabled comes from other code than without, then the gradients of the input and
of every parameter.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastmixer import dispatch
from fastmixer.parity import Parity
from fastmixer.verify.forward import Advance, fused_or_error, judge

INTERPRETED_BLOCKS = 3  # how many blocks are compared where nobody says: the interpreter takes its time
WHOLE_MODEL = "end to end"


def choose(names: Sequence[str], count: int) -> list[str]:
    """``count`` of the names, or all: the first, the last, and the others evenly in between."""
    if count >= len(names):
        return list(names)
    step = (len(names) - 1) / max(count - 1, 1)
    return [names[round(index * step)] for index in range(count)]


def failed(tensors: dict[str, Parity]) -> list[str]:
    """The tensors whose comparison failed."""
    return [name for name, parity in tensors.items() if not parity.ok]


def worst(tensors: dict[str, Parity]) -> str:
    """The tensor that is nearest its bound, or farthest beyond it."""
    return max(tensors, key=lambda name: tensors[name].share_of_bound)


def measure(
    eager: nn.Module, fused: nn.Module, inputs: dict[str, Tensor], images: Tensor | None, advance: Advance
) -> dict[str, dict[str, Parity]]:
    """By block and tensor the comparisons of the gradients; ``images`` adds the whole model's.

    Args:
        eager, fused: the model and its fused copy, in the inputs' dtype.
        inputs: what the blocks to compare were given, by name.
        images: (batch, 3, H, W), or None.
    """
    gradients = {}
    for name, x in inputs.items():
        advance(f"gradients of {name}")
        gradients[name] = compare(eager.get_submodule(name), fused.get_submodule(name), x)
    if images is not None:
        advance(f"gradients {WHOLE_MODEL}")
        whole = compare(eager, fused, images, parameters=False)
        gradients[WHOLE_MODEL] = {"logits": whole["output"], "images": whole["x"]}
    return gradients


def compare(eager: nn.Module, fused: nn.Module, x: Tensor, *, parameters: bool = True) -> dict[str, Parity]:
    """The comparison of "output", "x" (its gradient) and, unless they are left out, every parameter's."""
    truth = copy.deepcopy(eager).double()
    with dispatch.backend("triton"), fused_or_error():
        candidate = _gradients(fused, x, x.dtype, parameters)
    with dispatch.backend("torch"):
        baseline = _gradients(eager, x, x.dtype, parameters)
        exact = _gradients(truth, x.double(), x.dtype, parameters)
    return {name: judge(candidate[name], baseline[name], exact[name]) for name in exact}


def _gradients(module: nn.Module, x: Tensor, dtype: torch.dtype, parameters: bool) -> dict[str, Tensor]:
    """The output and the gradients, by name, for a gradient of the output drawn in ``dtype``."""
    with torch.enable_grad():
        sources = {"x": x.detach().requires_grad_()}
        if parameters:
            sources |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        output = module(sources["x"])
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        # A gradient that was forgotten counts as zeros, and fails.
        gradients = torch.autograd.grad(
            output, list(sources.values()), upstream.to(output), allow_unused=True, materialize_grads=True
        )
    return {"output": output.detach(), **dict(zip(sources, gradients, strict=True))}

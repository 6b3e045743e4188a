"""``freeze``, ``unfreeze`` and ``stale``: packed weights that outlive the call, for serving."""

from __future__ import annotations

import torch
from torch import nn

from fastmixer.blocks.block import fused_blocks, fused_forwards
from fastmixer.blocks.frozen import Frozen


def freeze(model: nn.Module) -> int:
    """Packs the weights of every fused block of ``model`` once and keeps them: a call is a launch shorter.

    By default a block packs its weights in every call, from what they are then. Frozen it does not: **the
    weights must not change**. A parameter that was replaced, moved or written since, as far as PyTorch shows
    it, or a call that asks for gradients thaws its block with a ``ThawWarning``: it packs in every call
    again. What PyTorch does not show is your promise: writes through ``weight.data``, NumPy or another
    process, and replays of a CUDA graph; :func:`stale` finds them.

    ``unfreeze`` and ``model.train()`` undo it, ``model.to()`` does where it moves or casts, and all of them
    free the packed memory at once, as does dropping the model. Copies and pickles are not frozen. A CUDA
    graph that was captured while frozen reads the packed weights: keep the model frozen as long as the graph
    is replayed. Under ``torch.compile`` and ``torch.export`` a block packs in every call all the same. Freeze
    under the autocast that serves: what other dtypes need is packed, and kept, at their first call.

    Args:
        model: in eval mode, with at least one fused block.

    Returns:
        How many blocks are frozen now.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
        ValueError: no block of it is fused, or one is in training mode or sharded by FSDP2. Nothing is
            frozen then.
    """
    check_module(model)
    for name, forward in fused_forwards(model):
        check_freezable(name, forward.block)
    blocks = list(fused_blocks(model))
    if not blocks:
        raise ValueError(f"model: no block of this {type(model).__name__} is fused: see fastmixer.fuse")
    unfreeze(model)
    for _, forward, structure in blocks:
        forward.freeze(structure, Frozen(structure))
    return len(blocks)


def unfreeze(model: nn.Module) -> int:
    """Undoes ``freeze``: every block of ``model`` packs its weights in every call again.

    Returns:
        How many blocks were frozen.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    check_module(model)
    frozen = [forward for _, forward in fused_forwards(model) if forward.frozen is not None]
    for forward in frozen:
        forward.thaw()
    return len(frozen)


def stale(model: nn.Module) -> list[str]:
    """The names of the frozen blocks whose packed weights are not, bit by bit, what their weights give now.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    check_module(model)
    frozen = ((name, forward.frozen, structure) for name, forward, structure in fused_blocks(model))
    with torch.no_grad():
        return [name for name, kept, structure in frozen if kept is not None and kept.is_stale(structure)]


def check_freezable(name: str, block: nn.Module) -> None:
    """Raises ValueError for a block in training mode, or whose weights FSDP2 gathers anew for every call."""
    if block.training:
        raise ValueError(
            f"model must be in eval mode to be frozen, its block {name} is not: call model.eval()"
        )
    if "_is_fsdp_managed_module" in block.__dict__:
        raise ValueError(f"model is sharded by FSDP2 and cannot be frozen: its block {name}")


def check_module(model: object) -> None:
    """Raises TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")

"""``freeze``, ``unfreeze`` and ``stale``: packed weights that outlive the call, for serving."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from . import dispatch, launch, packing
from .adapters.structure import Structure
from .block import fused_blocks, fused_forwards
from .half import Half
from .launch import Context, PackedLinear
from .reference import product_dtype

_BATCH = 64  # packed for at first: one that needs another layout has it packed, and kept, at its first call


class Frozen(packing.Kept):
    """What a frozen block keeps: its packed weights, and which parameters they were made of."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self._parameters = [(name, p, _state(p)) for name, p in _parameters(structure)]

    def broken(self, structure: Structure) -> str | None:
        """What happened to the parameters since, as far as PyTorch shows it; None if nothing."""
        for (name, then, state), (_, now) in zip(self._parameters, _parameters(structure), strict=True):
            if now is not then:
                return f"{name} was replaced"
            if _state(now) != state:
                return f"{name} was written or moved"
        return None

    def keep(self, role: str, layout: packing.Layout, packed: PackedLinear) -> None:
        """Keeps what a call had to pack; not what is a CUDA graph's, whose replays make it anew."""
        if packed.weight.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return
            torch.cuda.current_stream(packed.weight.device).synchronize()  # other streams may read it next
        super().keep(role, layout, packed)

    def is_stale(self, structure: Structure) -> bool:
        """Whether packing the weights as they are now gives other bits."""
        halves = {"token": structure.token.half(), "channel": structure.channel.half()}
        weight = halves["token"].fc1_weight
        with launch.device_of(weight):
            for (role, _), (layout, kept) in self._packed.items():
                now = layout.renewed(role, launch.with_dense_vectors(halves[role.partition("_")[0]]))
                fresh = packing.pack({role: now}, _context(weight.device))[role]
                if not all(map(_equal, kept, fresh)):
                    return True
        return False


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
    if not any(True for _ in fused_blocks(model)):
        raise ValueError(f"model: no block of this {type(model).__name__} is fused: see fastmixer.fuse")
    unfreeze(model)
    count = 0
    for _, forward, structure in fused_blocks(model):
        frozen = Frozen(structure)
        _pack(structure, frozen)
        forward.freeze(structure, frozen)
        count += 1
    return count


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


def _pack(structure: Structure, frozen: Frozen) -> None:
    """Packs for an input in the weights' dtype, if kernels run there at all."""
    token, channel = structure.token.half(), structure.channel.half()
    weight = token.fc1_weight
    dtype = product_dtype(weight.device, weight.dtype)
    if dispatch.why_not_triton(weight.device, weight.dtype, dtype) is not None:
        return
    x = torch.empty(
        (_BATCH, structure.token.width, structure.channel.width), dtype=weight.dtype, device="meta"
    )
    with torch.no_grad(), launch.device_of(weight):
        packing.pack_forward(x, {"token": token, "channel": channel}, dtype, _context(weight.device, frozen))


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and torch.equal(one, other)


def _context(device: torch.device, kept: Frozen | None = None) -> Context:
    return launch.context_of(device, kept, kernels_only=dispatch.current_backend() == "triton")


def _parameters(structure: Structure) -> Iterator[tuple[str, Tensor | None]]:
    for of, half in (("token", structure.token), ("channel", structure.channel)):
        for name, parameter in zip(Half._fields[:6], half.parameters(), strict=True):
            yield f"{name} of the {of} half", parameter


def _state(parameter: Tensor | None) -> tuple | None:
    """What PyTorch shows of a parameter's contents: where they are, and how often they were written."""
    if parameter is None:
        return None
    version = None if parameter.is_inference() else parameter._version
    return parameter.data_ptr(), version, parameter.dtype

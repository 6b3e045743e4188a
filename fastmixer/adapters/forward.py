"""The forward of a fused block: one code path for fastmixer's own block and for foreign ones."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmixer import functional
from fastmixer.adapters import match
from fastmixer.adapters.probe import disproof, settings_key
from fastmixer.adapters.structure import Structure
from fastmixer.dispatch import FallbackWarning, ThawWarning, constant_in_traces, is_traced

if TYPE_CHECKING:
    from fastmixer.freezing import Frozen

_GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)


def _is_plain_call(args: tuple, kwargs: dict) -> bool:
    traced = torch.jit.is_tracing() or any(isinstance(arg, torch.fx.Proxy) for arg in args)
    return len(args) == 1 and not kwargs and not traced


class FusedForward:
    """Called in place of a block's forward: runs the fused block, or the block's own forward where it must.

    It must when a call passes more than x, is traced by fx or ``torch.jit.trace``, when dropout is active, or
    when the block is no longer what was fused: a module inside it was replaced, hooked, patched or
    parametrised. That last case warns, once a reason; so does an x with more or fewer axes than the block's.

    A copy (``copy.deepcopy``, ``torch.save``) belongs to the copied block; so does a replica of
    ``torch.nn.DataParallel``, which lives for one call.

    Args:
        block: the block. Only a weak reference is kept, so that dropping a model frees its memory at once.
        eager: name of the method of the block's class that runs it unfused.
        verdicts: what trying out the block's forward has already shown, see ``decide``.
    """

    def __init__(self, block: nn.Module, *, eager: str = "forward", verdicts: dict | None = None) -> None:
        self._block = weakref.ref(block)
        self._eager = eager
        self._verdicts: dict[Hashable, str | None] = dict(verdicts or {})
        self._structure: Structure | None = None
        self._warned: str | None = None
        self.frozen: Frozen | None = None

    @property
    def block(self) -> nn.Module | None:
        """The block that this is the forward of, or None if it no longer exists."""
        return self._block()

    def __call__(self, *args, **kwargs) -> Tensor:
        block = self._block()
        if block is None:
            raise ReferenceError("the block that this forward belongs to no longer exists")
        settled = self._settle() if torch.compiler.is_compiling() else True
        structure = self._structure
        # A trace takes the comparison for its guards: what changes later is noticed there too.
        if structure is None or not structure.unchanged(block) or any(_GLOBAL_HOOKS):
            structure = self._look_again(block) if settled else None
        if structure is None or not _is_plain_call(args, kwargs) or structure.unfused_now() is not None:
            return self._run_eager(block, *args, **kwargs)
        x = args[0]
        if self._eager == "forward" and (not isinstance(x, Tensor) or x.ndim != structure.ndim):
            self._warn(f"x is not a tensor with {structure.ndim} dimensions")
            return self._run_eager(block, x)
        if structure.ndim == 3:
            return self._run_fused(block, structure, x)
        return self._run_fused(block, structure, x.flatten(0, -3)).unflatten(0, x.shape[:-2])

    def install(self, structure: Structure | None = None) -> None:
        """Puts this forward in place of its block's, and of its replicas'; structure: what decide found."""
        block = self._block()
        self._structure = structure
        block.forward = self
        block._replicate_for_data_parallel = self._replicate

    @staticmethod
    def remove(block: nn.Module) -> bool:
        """Undoes ``install``; whether there was something to undo."""
        if not isinstance(block.__dict__.get("forward"), FusedForward):
            return False
        block.forward.thaw()
        del block.__dict__["forward"]
        block.__dict__.pop("_replicate_for_data_parallel", None)
        return True

    def _replicate(self) -> nn.Module:
        """Called by ``nn.DataParallel``, which copies the block's attributes, ``forward`` among them."""
        block = self._block()
        replica = type(block)._replicate_for_data_parallel(block)
        FusedForward(replica, eager=self._eager, verdicts=self._verdicts).install()
        return replica

    def _run_fused(self, block: nn.Module, structure: Structure, x: Tensor) -> Tensor:
        """The fused block for x (B, S, C)."""
        token, channel = structure.halves(x)
        frozen = self.frozen
        # A trace packs in every call: it would not see that the weights were written.
        if frozen is None or is_traced(x):
            return functional.mixer_block(x, token, channel)
        if functional.needs_gradients(x, token, channel):
            self.thaw("gradients were asked for")
        else:
            self._look_after(structure)
        return functional.mixer_block(x, token, channel, kept=self.frozen)

    def freeze(self, structure: Structure, frozen: Frozen) -> None:
        """Has calls use packed weights that are kept, until the parameters change or ``thaw``.

        The block's ``train`` and ``_apply``, which ``to``, ``cpu`` and the like call, are watched meanwhile.
        """
        self._structure, self.frozen = structure, frozen
        self._block().__dict__.update(train=self._train, _apply=self._apply)

    def thaw(self, reason: str | None = None) -> None:
        """Undoes ``freeze``; warns if there is a reason."""
        self.frozen = None
        for name in ("train", "_apply"):
            self._block().__dict__.pop(name, None)
        if reason is not None:
            kind = type(self._block()).__name__
            warnings.warn(f"a frozen {kind} was thawed: {reason}", ThawWarning, stacklevel=4)

    def _look_after(self, structure: Structure) -> None:
        """Thaws if the parameters are no longer those that were packed, as far as PyTorch shows it."""
        reason = self.frozen and self.frozen.broken(structure)
        if reason is not None:
            self.thaw(reason)

    def _train(self, mode: bool = True) -> nn.Module:
        """In place of ``block.train`` while frozen."""
        block = self._block()
        if mode:
            self.thaw()
        return type(block).train(block, mode)

    def _apply(self, *args, **kwargs) -> nn.Module:
        """In place of ``block._apply`` while frozen: what moves the parameters, or casts them, thaws."""
        block = self._block()
        type(block)._apply(block, *args, **kwargs)
        self._look_after(self._structure)
        return block

    def _run_eager(self, block: nn.Module, *args, **kwargs) -> Tensor:
        """The unfused forward of the block's class."""
        return getattr(type(block), self._eager)(block, *args, **kwargs)

    def why_not(self) -> str | None:
        """Why a call would run the block unfused just now, or None if it would be fused."""
        block = self._block()
        if block is None:
            return "its block no longer exists"
        decision = self.decide(block)
        return decision if isinstance(decision, str) else decision.unfused_now()

    def decide(self, block: nn.Module, verdicts: dict[Hashable, str | None] | None = None) -> Structure | str:
        """The structure to compute, or the reason why the block cannot be fused.

        verdicts: what trying out the forward showed, by settings; None or a reason. Shared between the blocks
        of one ``fuse`` call, so that each kind of block is tried out once.
        """
        if any(_GLOBAL_HOOKS):
            return "global module hooks are registered, which the modules inside must see"
        structure = match(block)
        if isinstance(structure, str) or self._takes_on_trust(structure):
            return structure
        verdicts = self._verdicts if verdicts is None else verdicts
        try:
            key = settings_key(block, structure)
        except Exception as error:  # from the repr of some attribute of a foreign block
            return f"its attributes cannot be read: {type(error).__name__}: {error}"
        if key not in verdicts:
            verdicts[key] = disproof(block, self._run_eager, match)
        self._verdicts = {key: verdicts[key]}
        return verdicts[key] or structure

    def _takes_on_trust(self, structure: Structure) -> bool:
        """Our own block made of MLPs whose forward we know need not be tried out."""
        if self._eager == "forward":
            return False
        from fastmixer.block import known_mlps

        return all(type(mlp) in known_mlps() for mlp, _ in structure.containers)

    @constant_in_traces
    def _settle(self) -> bool:
        """Finds the structure before a trace looks for it; whether there is one. Never traced itself."""
        block = self._block()
        structure = self._structure
        if structure is None or not structure.unchanged(block) or any(_GLOBAL_HOOKS):
            structure = self._look_again(block)
        return structure is not None

    def _look_again(self, block: nn.Module) -> Structure | None:
        if self.frozen is not None:
            self.thaw("it is no longer what was frozen")
        decision = self.decide(block)
        if isinstance(decision, Structure):
            self._structure = decision
            return decision
        self._structure = None
        self._warn(decision)
        return None

    @constant_in_traces
    def _warn(self, reason: str) -> None:
        if reason != self._warned:
            block = self._block()
            self._warned = reason
            warnings.warn(f"a {type(block).__name__} runs unfused: {reason}", FallbackWarning, stacklevel=4)

    def __getstate__(self) -> dict[str, object]:
        return {"block": self._block(), "eager": self._eager, "verdicts": self._verdicts}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(state["block"], eager=state["eager"], verdicts=state["verdicts"])

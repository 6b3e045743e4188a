"""The forward of a fused block: one code path for fastmixer's own block and for foreign ones."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from fastmixer import functional
from fastmixer.blocks.families import match
from fastmixer.blocks.frozen import Frozen
from fastmixer.blocks.layers import loaded_classes
from fastmixer.blocks.probe import disproof, settings_key
from fastmixer.blocks.state import ATTACHED, INSTALLED, WATCHED
from fastmixer.blocks.structure import HOOKS, Structure
from fastmixer.dispatch import is_traced
from fastmixer.notices import ThawWarning, constant_in_traces, warn

_GLOBAL_HOOKS = tuple(getattr(nn.modules.module, f"_global{hooks}") for hooks in HOOKS)

# What need not be tried out: forwards that compute a Mixer block of their modules, and MLPs that compute
# fc2(act(fc1(x))) where their modules look like it.
TRUSTED_FORWARDS: set[Callable] = set()
TRUSTED_MLPS = "fastmixer.blocks.layers.Mlp", "timm.layers.mlp.Mlp"


class FusedForward:
    """Called in place of a block's forward: runs the fused block, or the block's own forward where it must.

    It must when a call passes more than x, is traced by fx, ``torch.jit.trace`` or ``torch.onnx``, when
    dropout is active, or when the block is no longer what was fused: a module inside it was replaced, hooked,
    patched or parametrised, an attribute set, a class patched. That last case warns, once per reason; so does
    an x of another shape than the block was fused for.

    It has the name, the signature and the docstring of the forward that it stands for. A copy
    (``copy.copy``, ``copy.deepcopy``, ``torch.save``) belongs to the copied block and is not frozen; so does
    a replica of ``torch.nn.DataParallel``, which lives for one call.

    Args:
        block: the block. Only a weak reference is kept, so that dropping a model frees its memory at once.
        eager: name of the method of the block's class that runs it unfused.
        verdicts: what trying out forwards has shown, by settings; None or a reason. Shared between the blocks
            of one ``fuse`` call and their copies, so that each kind of block is tried out once.
        name: the block's name in the model, for warnings.
    """

    def __init__(
        self,
        block: nn.Module,
        *,
        eager: str = "forward",
        verdicts: dict[Hashable, str | None] | None = None,
        name: str | None = None,
    ) -> None:
        self._block: Callable[[], nn.Module | None] = weakref.ref(block)
        self._eager = eager
        self.verdicts = {} if verdicts is None else verdicts
        self._structure: Structure | None = None
        self._warned: set[str] = set()
        self.frozen: Frozen | None = None
        self._shadowed: dict[str, object] = {}  # what ``freeze`` set its own attributes in place of
        self._remains: tuple[type, dict[str, object]] | None = None
        self._retired = False
        self._argument: str | None = None  # the name of x, where it may be passed by name
        self.name = name

    @property
    def block(self) -> nn.Module | None:
        """The block that this is the forward of, or None if it no longer exists."""
        return self._block()

    @property
    def __globals__(self) -> dict[str, object]:
        """What ``torch.jit.script`` asks of a method before it compiles its source."""
        raise AttributeError(
            "torch.jit.script cannot compile a fused block: call fastmixer.unfuse on the model before, "
            "or use torch.export or torch.jit.trace"
        )

    def __call__(self, *args, **kwargs) -> Tensor:
        block = self._block()
        if block is None:
            block = self._revived()
        if not args and len(kwargs) == 1 and self._argument in kwargs:
            args, kwargs = (kwargs[self._argument],), {}
        is_plain = len(args) == 1 and not kwargs and not self._retired
        if not is_plain or torch.jit.is_tracing() or isinstance(args[0], torch.fx.Proxy):
            return self._run_eager(block, *args, **kwargs)
        settled = self._settle() if torch.compiler.is_compiling() else True
        structure = self._structure
        # A trace takes the comparison for its guards: what changes later is noticed there too.
        if structure is None or not structure.unchanged(block) or any(_GLOBAL_HOOKS):
            structure = self._look_again() if settled else None
        if structure is None or not settled or structure.unfused_now() is not None:
            return self._run_eager(block, *args)
        x = args[0]
        fits = isinstance(x, Tensor) and x.ndim == structure.ndim and tuple(x.shape[-2:]) == structure.size
        if self._eager == "forward" and not fits:
            leading = ("B", "B, V")[structure.ndim - 3]
            self._warn(f"x is not a tensor of shape ({leading}, {structure.size[0]}, {structure.size[1]})")
            return self._run_eager(block, x)
        if structure.ndim == 3:
            return self._prepared(structure, x)()
        return self._prepared(structure, x.flatten(0, -3))().unflatten(0, x.shape[:-2])

    def install(self, structure: Structure | None = None, names: Sequence[str] = ("forward",)) -> None:
        """Puts this forward in place of its block's, and makes it that of replicas and copies.

        It takes over the name, the docstring and the signature of the forward of the block's class.
        structure: what ``decide`` returned. names: the attributes to set to it.
        """
        block = self._block()
        function = type(block).forward
        functools.update_wrapper(self, function, updated=())
        if hasattr(function, "__code__"):
            self.__code__ = function.__code__  # for torch.export, which says where a forward is
        self.__signature__ = inspect.signature(types.MethodType(function, block))
        first = next(iter(self.__signature__.parameters.values()), None)
        self._argument = first.name if first and first.kind is first.POSITIONAL_OR_KEYWORD else None
        block.__dict__.update(
            dict.fromkeys(names, self),
            _replicate_for_data_parallel=self._replicate,
            __reduce_ex__=self._reduce,
        )
        if structure is not None:
            self._settle_on(structure)

    @classmethod
    def of(cls, block: nn.Module) -> FusedForward | None:
        """What ``install`` gave to ``block``, also where something else has wrapped its forward since."""
        installed = getattr(block.__dict__.get("__reduce_ex__"), "__self__", None)
        return installed if isinstance(installed, cls) and installed.block is block else None

    @classmethod
    def remove(cls, block: nn.Module) -> bool:
        """Undoes ``install``; whether there was something to undo.

        A wrapper of the forward, such as accelerate's hooks, stays: what it wraps runs unfused from now on.
        """
        installed = cls.of(block)
        if isinstance(block.__dict__.get("forward"), cls):
            del block.__dict__["forward"]
        if installed is None:
            return False
        installed.thaw()
        installed._retired = True
        for name in ("_replicate_for_data_parallel", "__reduce_ex__"):
            block.__dict__.pop(name, None)
        return True

    def _settle_on(self, structure: Structure) -> None:
        block, self._structure = self._block(), structure
        structure.watch.count(block)
        # For _revived. The modules are in a dict that is shared with the block.
        kept = {k: v for k, v in block.__dict__.items() if k not in INSTALLED and k not in ATTACHED}
        self._remains = type(block), kept

    def _revived(self) -> nn.Module:
        """Its block once more, for who kept only the forward: a bound method keeps its object, too."""
        if self._remains is None:
            raise ReferenceError("the block that this forward belongs to no longer exists, and was never run")
        kind, attributes = self._remains
        block = kind.__new__(kind)
        block.__dict__.update(attributes)
        self._block = lambda: block
        return block

    def _replicate(self) -> nn.Module:
        """Called by ``nn.DataParallel``, which copies the block's attributes, ``forward`` among them."""
        block = self._block()
        replica = type(block)._replicate_for_data_parallel(block)
        FusedForward(replica, **self._settings()).install()
        return replica

    def _prepared(self, structure: Structure, x: Tensor) -> Callable[[], Tensor]:
        """The call of the fused block for x (B, S, C)."""
        token = structure.token.params(structure.token.draw(x))
        halves = {"token": token, "channel": structure.channel.params(structure.channel.draw(x))}
        # A trace packs in every call: it would not see that the weights were written.
        if self.frozen is None or is_traced(x):
            return functional.prepared(x, halves)
        if functional.needs_gradients(x, *halves.values()):
            self.thaw("gradients were asked for")
        elif (reason := self.frozen.broken(structure)) is not None:
            self.thaw(reason)
        return functional.prepared(x, halves, self.frozen)

    def _reduce(self, protocol: int) -> tuple:
        """Called for every copy and pickle of the block: it gets a forward of its own, whoever copies how."""
        block = self._block()
        make, arguments, *rest = type(block).__reduce_ex__(block, protocol)
        names = [name for name, value in block.__dict__.items() if value is self]
        if rest and isinstance(rest[0], dict):
            rest[0] = self.without_own(rest[0])
        return _fused_copy, (make, arguments, names, self._settings()), *rest

    def without_own(self, attributes: dict[str, object]) -> dict[str, object]:
        """A block's attributes without this forward and its methods, and with what they stand in place of."""
        own = {
            name
            for name, value in attributes.items()
            if value is self or getattr(value, "__self__", None) is self
        }
        shadowed = {name: value for name, value in self._shadowed.items() if name in own}
        return {name: value for name, value in attributes.items() if name not in own} | shadowed

    def _settings(self) -> dict[str, object]:
        return {"eager": self._eager, "verdicts": self.verdicts, "name": self.name}

    def freeze(self, structure: Structure, frozen: Frozen) -> None:
        """Has calls use packed weights that are kept, until the parameters change or ``thaw``.

        The block's ``train`` and ``_apply``, which ``to``, ``cpu`` and the like call, are watched meanwhile.
        """
        block, self.frozen = self._block(), frozen
        self._shadowed = {name: block.__dict__[name] for name in WATCHED if name in block.__dict__}
        block.__dict__.update(train=self._train, _apply=self._apply)
        self._settle_on(structure)

    def thaw(self, reason: str | None = None) -> None:
        """Undoes ``freeze``; warns if there is a reason. The next call looks at the block again."""
        if self.frozen is None:
            return
        block, self.frozen, self._structure = self._block(), None, None
        for name, method in (("train", self._train), ("_apply", self._apply)):
            if block.__dict__.get(name) == method:  # what somebody has set since, stays
                del block.__dict__[name]
                if name in self._shadowed:
                    block.__dict__[name] = self._shadowed[name]
        if reason is not None:
            warn(f"{self._named()} is no longer frozen: {reason}", ThawWarning)

    def _train(self, mode: bool = True) -> nn.Module:
        """In place of ``block.train`` while frozen."""
        train = self._watched("train")  # before it is put back
        if mode:
            self.thaw()
        return train(mode)

    def _apply(self, *args, **kwargs) -> nn.Module:
        """In place of ``block._apply`` while frozen: what moves the parameters, or casts them, thaws."""
        block = self._watched("_apply")(*args, **kwargs)
        reason = self.frozen and self.frozen.broken(self._structure)
        if reason is not None:
            self.thaw(reason)
        return block

    def _watched(self, name: str) -> Callable:
        """What ``freeze`` set its own method in place of."""
        block = self._block()
        return self._shadowed.get(name) or types.MethodType(getattr(type(block), name), block)

    def _run_eager(self, block: nn.Module, *args, **kwargs) -> Tensor:
        """The unfused forward of the block's class."""
        return getattr(type(block), self._eager)(block, *args, **kwargs)

    def why_not(self) -> str | None:
        """Why a call would run the block unfused just now, or None if it would be fused."""
        decision = self.decide()
        return decision if isinstance(decision, str) else decision.unfused_now()

    def decide(self) -> Structure | str:
        """The structure to compute, or the reason why the block cannot be fused."""
        block = self._block()
        if block is None:
            return "its block no longer exists"
        if any(_GLOBAL_HOOKS):
            return "global module hooks are registered, which the modules inside must see"
        structure = match(block)
        if isinstance(structure, str) or self._is_trusted(block, structure):
            return structure
        try:
            key = settings_key(block, structure)
        except Exception as error:  # from the repr of some attribute of a foreign block
            return f"its attributes cannot be read: {type(error).__name__}: {error}"
        if key not in self.verdicts:
            self.verdicts[key] = disproof(block, self._run_eager, match)
        return self.verdicts[key] or structure

    def _is_trusted(self, block: nn.Module, structure: Structure) -> bool:
        """Our own block made of MLPs whose forward we know need not be tried out, but for patched classes."""
        if self._eager == "forward" or getattr(type(block), self._eager) not in TRUSTED_FORWARDS:
            return False
        if any(type(mlp) not in loaded_classes(*TRUSTED_MLPS) for mlp, _ in structure.containers):
            return False
        for _, kind in structure.inner:  # a forward that is not where it was written was put there later
            places = [(base.__module__, f"{base.__qualname__}.forward") for base in kind.__mro__]
            if (kind.forward.__module__, kind.forward.__qualname__) not in places:
                return False
        return True

    @constant_in_traces
    def _settle(self) -> bool:
        """Finds the structure before a trace looks for it; whether to use one. Never traced itself."""
        structure = self._structure
        if structure is None or not structure.unchanged(self._block()) or any(_GLOBAL_HOOKS):
            structure = self._look_again()
        # To ONNX there are no operators of ours.
        exports_to_onnx = "torch.onnx._internal.exporter" in sys.modules and torch.onnx.is_in_onnx_export()
        return structure is not None and not exports_to_onnx

    def _look_again(self) -> Structure | None:
        self.thaw("it was changed")
        decision = self.decide()
        if isinstance(decision, str):
            self._structure = None
            self._warn(decision)
            return None
        self._settle_on(decision)
        return decision

    @constant_in_traces
    def _warn(self, reason: str) -> None:
        if reason not in self._warned:
            warn(f"{self._named()} runs unfused: {reason}")
            self._warned.add(reason)  # after it: where warnings are errors, every such call raises

    def _named(self) -> str:
        kind = type(self._block()).__name__
        return f"a {kind}" if self.name is None else f"{self.name} ({kind})"

    def __getstate__(self) -> dict[str, object]:
        return {"block": self._block(), **self._settings()}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)


def _fused_copy(make: Callable, arguments: tuple, names: Sequence[str], settings: dict) -> nn.Module:
    """An empty copy of a fused block, which is given its state next, with a forward of its own."""
    block = make(*arguments)
    FusedForward(block, **settings).install(names=names)
    return block

"""The state of a block beside its parameters and modules: what a forward may read, and may leave behind.

Described by value, to tell blocks apart and to see what a call changed; watched by identity, at every call.
"""

from __future__ import annotations

import enum
import functools
import logging
import types
from collections.abc import Iterable, Iterator
from itertools import chain
from operator import is_

import torch
from torch import Tensor, nn

# What a fused block carries, see FusedForward.install and MixerBlock.
WATCHED = ("train", "_apply")  # while it is frozen
INSTALLED = ("forward", "_replicate_for_data_parallel", "__reduce_ex__", "_fused", *WATCHED)

# What accelerate keeps in the module whose forward it wraps.
ATTACHED = ("_hf_hook", "_old_forward", "_original_forward")

# What none of these calls a setting of the module's own, nor PyTorch.
BOOKKEEPING = frozenset(nn.Module().__dict__) | {
    *INSTALLED,
    *ATTACHED,
    "_is_replica",
    "_former_parameters",
    "_compiled_call_impl",
    "_is_fsdp_managed_module",
    "_fsdp_use_orig_params",
}
COMPOSABLE = "__composable_api_state_key_"  # begins where FSDP and its like keep their state


# Larger tensors are described by two sums, larger containers watched as a whole, and so is what lies deeper.
SMALL, DEPTH = 256, 6

# Shared by the whole process, or functions: nothing of theirs is a block's own.
OPAQUE = nn.Module, type, types.FunctionType, types.MethodType, types.ModuleType, logging.Logger

# Where the class of a fused block's forward is, which whoever wraps one may keep in the block.
FORWARDS = "fastmixer.blocks.fused_forward"


def parameters_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own parameters by name; a replica of ``nn.DataParallel`` keeps those it has elsewhere."""
    state = module.__dict__
    if "_is_replica" in state:
        return {**state["_parameters"], **state.get("_former_parameters", {})}
    return state["_parameters"]


def attributes_of(module: nn.Module) -> dict[str, object]:
    """The plain attributes of ``module``, which its forward may consult."""
    hidden = BOOKKEEPING | parameters_of(module).keys()  # a replica has its parameters among them
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in hidden and not name.startswith(COMPOSABLE)
    }


def classes_of(module: nn.Module) -> list[type]:
    """The classes that make ``module`` what it is, without what every module is and what FSDP puts on top."""
    return [
        kind
        for kind in type(module).__mro__
        if kind not in (nn.Module, object) and not kind.__module__.startswith("torch.distributed")
    ]


def class_attributes(kind: type) -> dict[str, object]:
    """The attributes and methods that ``kind`` itself defines."""
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("__") or isinstance(value, types.FunctionType)
    }


def described(value: object, inside: tuple[int, ...] = ()) -> object:
    """``value`` as strings, bytes and tuples of them: equal where a forward could not tell the values apart.

    Of functions the code counts, with defaults and closures, not the globals that they use; of modules among
    the attributes the class, of parameters the shape. inside: the ids of what contains the value, as it may
    contain itself.
    """
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.Size, enum.Enum)):
        return repr(value)
    if id(value) in inside or len(inside) > DEPTH:
        return "..."
    if isinstance(value, Tensor):
        values = "a parameter's" if isinstance(value, nn.Parameter) else _values(value)
        return str(value.dtype), tuple(value.shape), values
    kind = value if isinstance(value, type) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    inside = (*inside, id(value))
    if isinstance(value, (set, frozenset)):
        return name, *sorted(repr(described(item, inside)) for item in value)
    if isinstance(value, (dict, types.MappingProxyType)):
        parts = chain.from_iterable(value.items())
    elif isinstance(value, (list, tuple)):
        parts = value
    elif isinstance(value, types.CodeType):
        parts = value.co_code, value.co_names, value.co_consts
    elif isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        parts = value.__qualname__, value.__code__, value.__defaults__, value.__kwdefaults__, cells
    elif isinstance(value, (types.MethodType, staticmethod, classmethod)):
        parts = (value.__func__,)
    elif isinstance(value, property):
        parts = value.fget, value.fset, value.fdel
    elif isinstance(value, functools.partial):
        parts = value.func, value.args, value.keywords
    elif isinstance(value, OPAQUE) or kind.__module__ == FORWARDS:
        return name
    elif hasattr(value, "__dict__"):
        parts = (vars(value),)
    else:
        return name if kind.__repr__ is object.__repr__ else repr(value)
    return name, *(described(part, inside) for part in parts)


def _values(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "meta"
    if tensor.numel() <= SMALL:
        return repr(tensor.tolist())
    values = tensor.detach().double()
    return repr((values.sum().item(), values.norm().item()))


class Watch:
    """Whether a block's attributes, and its classes' methods and attributes, are still the same objects.

    Lists, dicts, sets and plain objects among the attributes are looked into, tensors asked for their
    version. It holds no reference to the block itself.

    Args:
        block: the block, whose attributes are watched.
        modules: modules inside, whose attributes are watched as well.
        leaves: modules inside of known classes, of which only the class's forward is watched.
    """

    def __init__(self, block: nn.Module, modules: Iterable[nn.Module], leaves: Iterable[nn.Module]) -> None:
        self._inside = tuple(modules)
        watched = block, *self._inside
        self._attributes = tuple(tuple(attributes_of(module).items()) for module in watched)
        classes = dict.fromkeys(kind for module in watched for kind in classes_of(module))
        self._classes = tuple((kind, tuple(vars(kind).values())) for kind in classes)
        # For traces, which cannot see that a module has one attribute more, but that one of these is another.
        self._defaults = tuple(
            tuple(
                (name, getattr(module, name))
                for kind in classes_of(module)
                for name, value in class_attributes(kind).items()
                if isinstance(value, (bool, int, float, str, type(None)))
            )
            for module in watched
        )
        kinds = dict.fromkeys([*(type(module) for module in leaves), *classes])
        self._forwards = tuple((kind, kind.forward) for kind in kinds if hasattr(kind, "forward"))
        attributes = [value for items in self._attributes for _, value in items]
        attributes += [value for kind in classes for value in class_attributes(kind).values()]
        parts = list({id(part): part for value in attributes for part in _parts(value, ())}.values())
        self._containers = tuple((p, tuple(_items(p))) for p in parts if not isinstance(p, Tensor))
        self._tensors = tuple((p, p._version) for p in parts if isinstance(p, Tensor))

    def count(self, block: nn.Module) -> None:
        """Takes the numbers of attributes for what they should be: once fastmixer has set its own."""
        self._sizes = tuple(len(module.__dict__) for module in (block, *self._inside))

    def unchanged(self, block: nn.Module) -> bool:
        """Whether all is as it was. A trace takes the comparisons for its guards, as far as it can."""
        watched = block, *self._inside
        for module, attributes in zip(watched, self._attributes, strict=True):
            state = module.__dict__
            for name, value in attributes:
                if name not in state or state[name] is not value:
                    return False
        for kind, forward in self._forwards:
            if kind.forward is not forward:
                return False
        if not torch.compiler.is_compiling():
            return self._same_contents(watched)
        for module, defaults in zip(watched, self._defaults, strict=True):
            for name, value in defaults:
                if getattr(module, name) is not value:
                    return False
        return True

    def _same_contents(self, watched: tuple[nn.Module, ...]) -> bool:
        for module, size in zip(watched, self._sizes, strict=True):
            if len(module.__dict__) != size:
                return False
        for kind, values in self._classes:
            now = kind.__dict__
            if len(now) != len(values) or not all(map(is_, now.values(), values)):
                return False
        for container, items in self._containers:
            now = tuple(_items(container))
            if len(now) != len(items) or not all(map(is_, now, items)):
                return False
        return all(tensor._version == version for tensor, version in self._tensors)


def _parts(value: object, inside: tuple[int, ...]) -> Iterator[object]:
    """Everything mutable that ``value`` is or contains, modules and what they contain left out."""
    if id(value) in inside or len(inside) > DEPTH:
        return
    if isinstance(value, OPAQUE) or type(value).__module__ == FORWARDS:
        return
    if isinstance(value, Tensor):
        if not isinstance(value, nn.Parameter) and not value.is_inference():  # which has no version
            yield value
        return
    kinds = list, dict, set, tuple
    content = value if isinstance(value, kinds) else getattr(value, "__dict__", None)
    if not isinstance(content, kinds) or len(content) > SMALL:
        return
    if not isinstance(content, tuple):
        yield content
    for item in content.values() if isinstance(content, dict) else content:
        yield from _parts(item, (*inside, id(value)))


def _items(container: list | dict | set) -> Iterable[object]:
    return chain(container, container.values()) if isinstance(container, dict) else container

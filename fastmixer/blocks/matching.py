"""From where an adapter says the modules of a block are to a Structure, or to every reason against it.

The rules are the same for all families: every module is where it should be and of exactly the class that it
should be, nothing is attached to it, and the block contains nothing else. Which function the block makes of
its modules, the numeric trial finds out (:mod:`fastmixer.blocks.probe`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import nn

from fastmixer.blocks.state import Watch, parameters_of
from fastmixer.blocks.structure import HOOKS, PLAIN_TENSORS, HalfModules, Structure

# Modules that only move axes. einops need not be installed, nor need the class be its own: the trial shows
# what they do.
LAYOUTS = ("Rearrange", "Transpose", "Permute")


@dataclass(frozen=True)
class HalfPaths:
    """Where the modules of one half are, as dotted names below the block.

    norm, fc1, fc2: must be there. act: the GELU, or None where the forward calls the function. The others may
    be missing: dropouts may also be ``nn.Identity``; idle must be one; layouts only move axes; drop_path may
    be of any class and serve both halves.
    """

    norm: str
    fc1: str
    fc2: str
    act: str | None = None
    dropouts: tuple[str, ...] = ()
    idle: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    drop_path: str | None = None

    def required(self) -> tuple[str, ...]:
        return tuple(path for path in (self.norm, self.fc1, self.act, self.fc2) if path is not None)

    def optional(self) -> tuple[str, ...]:
        return (*self.dropouts, *self.idle, *self.layouts, *([self.drop_path] if self.drop_path else []))

    def mlp(self) -> str:
        """The innermost name above both linear layers."""
        one, other = self.fc1.split(".")[:-1], self.fc2.split(".")[:-1]
        same = [a for a, b in zip(one, other, strict=False) if a == b]
        return ".".join(same)


def structure_of(
    block: nn.Module, token: HalfPaths, channel: HalfPaths, *, ndim: int = 3, reasons: Iterable[str] = ()
) -> Structure | str:
    """The structure of ``block`` with its modules at these places, or every reason why it has none.

    ndim: axes of its input, see ``Structure``. reasons: what the adapter itself holds against the block.
    """
    modules = dict(block.named_modules(remove_duplicate=False))
    halves = (token, channel)
    required = {path for half in halves for path in half.required()}
    known = required | {path for half in halves for path in half.optional()}
    # Only what is required makes its parents required.
    containers = list(dict.fromkeys(parent for half in halves for parent in _parents(half)))
    kinds = dict(_kinds(modules, halves))
    problems = list(reasons)
    for path in ["", *containers]:
        if path in modules:
            problems += _problems_at(path, modules, {*required, *containers}, known | set(containers), kinds)
    for half in halves:
        problems += _size_problems(half, modules, kinds)
    if not problems:
        problems += _misfits(token, channel, modules)
    if problems:
        return "; ".join(problems)
    inner = {id(m): m for path in (*containers, *sorted(known)) if (m := modules.get(path)) is not None}
    parts = _half_modules(token, modules), _half_modules(channel, modules)
    # Of PyTorch's own modules inside, a call reads the settings anew, or takes the module itself.
    opaque = [m for m in inner.values() if type(m).__name__ in LAYOUTS]
    opaque += [part.drop_path for part in parts if part.drop_path and not part.draws_per_sample]
    return Structure(
        token=parts[0],
        channel=parts[1],
        dropouts=tuple(m for m in inner.values() if type(m) is nn.Dropout),
        children=tuple(block._modules.values()),
        containers=tuple((modules[path], tuple(modules[path]._modules.values())) for path in containers),
        inner=tuple((module, type(module)) for module in inner.values()),
        watch=Watch(block, [*(modules[path] for path in containers), *opaque], inner.values()),
        size=(parts[0].width, parts[1].width),
        ndim=ndim,
    )


def _half_modules(half: HalfPaths, modules: dict[str, nn.Module]) -> HalfModules:
    drop_path = modules.get(half.drop_path)
    if type(drop_path) is nn.Identity:
        drop_path = None
    return HalfModules(
        norm=modules[half.norm],
        fc1=modules[half.fc1],
        act=None if half.act is None else modules[half.act],
        fc2=modules[half.fc2],
        drop_path=drop_path,
        draws_per_sample=type(drop_path) in _known_drop_paths(),
        replica="_is_replica" in modules[half.fc1].__dict__,
        convolutions=any(isinstance(modules[path], nn.Conv1d) for path in (half.fc1, half.fc2)),
    )


def _parents(half: HalfPaths) -> Iterator[str]:
    """The modules between the block and those of the half, outer ones first."""
    for path in half.required():
        parts = path.split(".")[:-1]
        for end in range(1, len(parts) + 1):
            yield ".".join(parts[:end])


def _kinds(
    modules: dict[str, nn.Module], halves: tuple[HalfPaths, ...]
) -> Iterator[tuple[str, tuple[type, ...]]]:
    """The classes that each module may have, the first being the one to name; none: any class."""
    linears = (nn.Linear, nn.Conv1d, *_class_if_loaded("mmcv.cnn.bricks.wrappers", "Linear"))
    for half in halves:
        yield half.norm, (nn.LayerNorm,)
        yield half.fc1, linears
        yield half.fc2, linears
        if half.act is not None:
            yield half.act, (nn.GELU,)
        for path in half.dropouts:
            yield path, (nn.Dropout, nn.Identity)
        for path in half.idle:
            yield path, (nn.Identity,)
        for path in half.layouts:
            kind = type(modules.get(path))
            yield path, (kind,) if kind.__name__ in LAYOUTS else (nn.Identity,)
        if half.drop_path is not None:
            yield half.drop_path, ()


def _problems_at(
    path: str,
    modules: dict[str, nn.Module],
    required: set[str],
    known: set[str],
    kinds: dict[str, tuple[type, ...]],
) -> list[str]:
    """What is wrong with the module at ``path``, "" being the block itself, and with its known children."""
    module = modules[path]
    prefix = f"{path}." if path else ""
    children = {prefix + name: child for name, child in module._modules.items() if child is not None}
    missing = sorted(p for p in required if _parent(p) == path and p not in children)
    extra = sorted(name.removeprefix(prefix) for name in children.keys() - known)
    problems = tampering(module) if path else []  # the block itself may have hooks: they run as ever
    problems += [f"has no {name.removeprefix(prefix)}" for name in missing]
    problems += [f"has modules a Mixer block lacks: {', '.join(extra)}"] if extra else []
    problems += _own_tensors(module)
    for name, child in children.items():
        if name in kinds:
            about = name.removeprefix(prefix)
            problems += [f"{about} {problem}" for problem in _not_plain(child, kinds[name])]
    label = f"{path} ({type(module).__name__}): " if path else ""
    return [label + problem for problem in problems]


def _size_problems(half: HalfPaths, modules: dict[str, nn.Module], kinds: dict[str, tuple]) -> list[str]:
    fc1, fc2 = modules.get(half.fc1), modules.get(half.fc2)
    if any(fc is None or _not_plain(fc, kinds[half.fc1]) for fc in (fc1, fc2)):
        return []
    hidden, taken = parameters_of(fc1)["weight"].shape[0], parameters_of(fc2)["weight"].shape[1]
    if hidden == taken:
        return []
    mlp = half.mlp()
    label = f"{mlp} ({type(modules[mlp]).__name__}): " if mlp else ""
    first, second = (path.removeprefix(f"{mlp}.") for path in (half.fc1, half.fc2))
    return [f"{label}{first} gives {hidden} features and {second} takes {taken}"]


def _misfits(token: HalfPaths, channel: HalfPaths, modules: dict[str, nn.Module]) -> list[str]:
    """Sizes that do not fit together: each MLP must return what it takes, and C be the same throughout."""
    problems = []
    for half in (token, channel):
        taken = parameters_of(modules[half.fc1])["weight"].shape[1]
        returned = parameters_of(modules[half.fc2])["weight"].shape[0]
        if taken != returned:
            problems.append(f"{half.mlp()} takes {taken} features and returns {returned}")
    channels = parameters_of(modules[channel.fc1])["weight"].shape[1]
    for half in (token, channel):
        shape = tuple(modules[half.norm].normalized_shape)
        if shape != (channels,):
            problems.append(f"{half.norm} normalises {shape} but {channel.mlp()} takes {channels}")
    if modules[token.norm] is modules[channel.norm]:
        problems.append("one LayerNorm serves both halves")
    return problems


def _not_plain(module: nn.Module, kinds: tuple[type, ...]) -> list[str]:
    """Why ``module`` is not exactly of one of ``kinds`` with plain parameters and nothing attached to it."""
    kind = type(module)
    if kinds and kind not in kinds:
        wanted = kinds[0].__name__
        name = kind.__name__ if kind.__name__ != wanted else f"{kind.__module__}.{kind.__name__}"
        return [f"is {name}, not torch.nn.{wanted}"]
    problems = tampering(module)
    if kind.__name__ in LAYOUTS:
        return problems + _own_tensors(module) + (["has modules of its own"] if module._modules else [])
    if kind is nn.LayerNorm or issubclass(kind, (nn.Linear, nn.Conv1d)):
        problems += _bad_parameters(module)
    if kind is nn.Conv1d:
        plain = {"kernel_size": (1,), "stride": (1,), "groups": 1}
        settings = {name: getattr(module, name) for name in plain}
        problems += [f"has {name}={value!r}" for name, value in settings.items() if value != plain[name]]
        if module.padding not in ((0,), "valid", "same"):
            problems.append(f"has padding={module.padding!r}")
    if kind is nn.GELU and module.approximate not in ("none", "tanh"):
        problems.append(f"has approximate={module.approximate!r}")
    return problems


def _bad_parameters(module: nn.Module) -> list[str]:
    problems = []
    for name in ("weight", "bias"):
        parameter = parameters_of(module).get(name, "missing")
        absent_allowed = type(module) is nn.LayerNorm or name == "bias"
        if parameter is None and absent_allowed:
            continue
        if type(parameter) not in PLAIN_TENSORS or not parameter.is_floating_point():
            problems.append(f"has a {name} that is not a plain floating-point Parameter")
    return problems


def tampering(module: nn.Module) -> list[str]:
    """Hooks, or a forward of its own: the module may then do more than its class says."""
    problems = ["has hooks"] if any(module.__dict__.get(hooks) for hooks in HOOKS) else []
    if "forward" in module.__dict__:
        problems.append("has had its forward replaced")
    return problems


def _own_tensors(module: nn.Module) -> list[str]:
    names = [*parameters_of(module), *module._buffers]
    return [f"has parameters or buffers of its own: {', '.join(names)}"] if names else []


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _known_drop_paths() -> tuple[type[nn.Module], ...]:
    """The stochastic-depth classes that multiply each sample by one factor drawn over (B, 1, 1)."""
    from fastmixer.blocks.layers import DropPath

    places = (("timm.layers.drop", "DropPath"), ("mmcv.cnn.bricks.drop", "DropPath"))
    return (DropPath, *(kind for place in places for kind in _class_if_loaded(*place)))


def _class_if_loaded(module: str, name: str) -> tuple[type[nn.Module], ...]:
    """The class, if its module was imported: otherwise nothing can be an instance of it."""
    loaded = sys.modules.get(module)
    return () if loaded is None else (getattr(loaded, name),)

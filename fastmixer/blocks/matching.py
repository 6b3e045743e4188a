"""From where a family has the modules of a block to a Structure, or to every reason against it.

The rules are the same for all families: every module is where it should be and of exactly the class that it
should be, nothing is attached to it, and the block contains nothing else. Which function the block makes of
its modules, the numeric trial finds out (:mod:`fastmixer.blocks.probe`).
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn

from fastmixer.blocks.layers import loaded_classes
from fastmixer.blocks.state import Watch, parameters_of
from fastmixer.blocks.structure import HOOKS, PLAIN_TENSORS, HalfModules, Structure


class Role(enum.Enum):
    """What a module is there for: the classes that it may have, the first one to be named; none: any."""

    NORM = (nn.LayerNorm,)
    LINEAR = (nn.Linear, nn.Conv1d)  # two in each half, fc1 first
    GELU = (nn.GELU,)  # absent where the forward calls the function
    DROPOUT = (nn.Dropout, nn.Identity)
    IDLE = (nn.Identity,)  # or what only moves axes
    DROP_PATH = ()  # may serve both halves


REQUIRED = Role.NORM, Role.LINEAR, Role.GELU

# Modules that only move axes. einops need not be installed, nor need the class be its own: the trial shows
# what they do.
LAYOUTS = ("Rearrange", "Transpose", "Permute")

# Stochastic depth that multiplies each sample by one factor drawn over (B, 1, 1).
KNOWN_DROP_PATHS = (
    "fastmixer.blocks.layers.DropPath",
    "timm.layers.drop.DropPath",
    "mmcv.cnn.bricks.drop.DropPath",
)


class Layout(NamedTuple):
    """Where a block has its modules: the roles of both halves by dotted names below the block.

    ndim: axes of its input, see ``Structure``. problems: what its family itself holds against it.
    """

    token: dict[str, Role]
    channel: dict[str, Role]
    ndim: int = 3
    problems: Sequence[str] = ()


def structure_of(block: nn.Module, layout: Layout) -> Structure | str:
    """The structure of ``block`` with its modules at these places, or every reason why it has none."""
    modules = dict(block.named_modules(remove_duplicate=False))
    roles = layout.token | layout.channel
    required = [path for path, role in roles.items() if role in REQUIRED]
    # Only what is required makes the modules between it and the block required, outer ones first.
    dots = ((path, end) for path in required for end, letter in enumerate(path) if letter == ".")
    containers = list(dict.fromkeys(path[:end] for path, end in dots))
    problems = []
    for path in ["", *containers]:
        if path in modules:
            problems += _problems_at(path, modules, roles, [*required, *containers])
    problems = [*layout.problems, *(problems or _size_problems(layout, modules))]
    if problems:
        return "; ".join(problems)
    parents = [modules[path] for path in containers]
    inner = {id(m): m for m in (*parents, *map(modules.get, sorted(roles))) if m is not None}
    token, channel = (_half_modules(half, modules) for half in layout[:2])
    # Of PyTorch's own modules inside, a call reads the settings anew, or takes the module itself.
    opaque = [m for m in inner.values() if type(m).__name__ in LAYOUTS]
    opaque += [half.drop_path for half in (token, channel) if half.drop_path and not half.draws_per_sample]
    return Structure(
        token=token,
        channel=channel,
        dropouts=tuple(m for m in inner.values() if type(m) is nn.Dropout),
        children=tuple(block._modules.values()),
        containers=tuple((module, tuple(module._modules.values())) for module in parents),
        inner=tuple((module, type(module)) for module in inner.values()),
        watch=Watch(block, [*parents, *opaque], inner.values()),
        size=(token.width, channel.width),
        ndim=layout.ndim,
    )


def _paths(half: dict[str, Role], role: Role) -> list[str]:
    return [path for path, other in half.items() if other is role]


def _half_modules(half: dict[str, Role], modules: dict[str, nn.Module]) -> HalfModules:
    (norm,), (fc1, fc2), acts, drop_paths = (
        [modules.get(path) for path in _paths(half, role)]
        for role in (Role.NORM, Role.LINEAR, Role.GELU, Role.DROP_PATH)
    )
    drop_path = next((m for m in drop_paths if m is not None and type(m) is not nn.Identity), None)
    return HalfModules(
        norm=norm,
        fc1=fc1,
        act=acts[0] if acts else None,
        fc2=fc2,
        drop_path=drop_path,
        draws_per_sample=type(drop_path) in loaded_classes(*KNOWN_DROP_PATHS),
        replica="_is_replica" in fc1.__dict__,
    )


def _problems_at(
    path: str, modules: dict[str, nn.Module], roles: dict[str, Role], required: list[str]
) -> list[str]:
    """What is wrong with the module at ``path``, "" being the block itself, and with its known children."""
    module = modules[path]
    prefix = f"{path}." if path else ""
    children = {name: child for name, child in module._modules.items() if child is not None}
    expected = {p.removeprefix(prefix) for p in required if p.rpartition(".")[0] == path}
    extra = sorted(name for name in children if prefix + name not in {*roles, *required})
    problems = _tampering(module) if path else []  # the block itself may have hooks: they run as ever
    problems += [f"has no {name}" for name in sorted(expected - children.keys())]
    problems += [f"has modules a Mixer block lacks: {', '.join(extra)}"] if extra else []
    problems += _own_tensors(module)
    for name, child in children.items():
        if prefix + name in roles:
            problems += [f"{name} {problem}" for problem in _not_plain(child, roles[prefix + name])]
    label = f"{path} ({type(module).__name__}): " if path else ""
    return [label + problem for problem in problems]


def _size_problems(layout: Layout, modules: dict[str, nn.Module]) -> Iterator[str]:
    """Sizes that do not fit together: each MLP must return what it takes, and C be the same throughout."""
    widths, mlps = [], []
    for half in layout[:2]:
        paths = _paths(half, Role.LINEAR)
        (hidden, width), (returned, taken) = (parameters_of(modules[p])["weight"].shape[:2] for p in paths)
        same = zip(*(path.split(".")[:-1] for path in paths), strict=False)
        mlp = ".".join(one for one, other in same if one == other)  # the innermost name above both
        widths.append(width)
        mlps.append(mlp)
        if hidden != taken:
            label = f"{mlp} ({type(modules[mlp]).__name__}): " if mlp else ""
            first, second = (path.removeprefix(f"{mlp}.") for path in paths)
            yield f"{label}{first} gives {hidden} features and {second} takes {taken}"
        if width != returned:
            yield f"{mlp} takes {width} features and returns {returned}"
    norms = [_paths(half, Role.NORM)[0] for half in layout[:2]]
    for norm in norms:
        shape = tuple(modules[norm].normalized_shape)
        if shape != (widths[1],):
            yield f"{norm} normalises {shape} but {mlps[1]} takes {widths[1]}"
    if modules[norms[0]] is modules[norms[1]]:
        yield "one LayerNorm serves both halves"


def _not_plain(module: nn.Module, role: Role) -> list[str]:
    """Why ``module`` is not exactly of a class of its role, with plain parameters and nothing attached."""
    kind = type(module)
    is_layout = kind.__name__ in LAYOUTS
    allowed = role.value
    if role is Role.LINEAR:
        allowed += loaded_classes("mmcv.cnn.bricks.wrappers.Linear")
    if allowed and kind not in allowed and not (role is Role.IDLE and is_layout):
        wanted = allowed[0].__name__
        name = kind.__name__ if kind.__name__ != wanted else f"{kind.__module__}.{kind.__name__}"
        return [f"is {name}, not torch.nn.{wanted}"]
    problems = _tampering(module)
    if is_layout:
        return problems + _own_tensors(module) + (["has modules of its own"] if module._modules else [])
    if kind is nn.LayerNorm or issubclass(kind, Role.LINEAR.value):
        optional = ("weight", "bias") if kind is nn.LayerNorm else ("bias",)
        for name in ("weight", "bias"):
            parameter = parameters_of(module).get(name, "missing")
            plain = type(parameter) in PLAIN_TENSORS and parameter.is_floating_point()
            if not plain and not (parameter is None and name in optional):
                problems.append(f"has a {name} that is not a plain floating-point Parameter")
    if kind is nn.Conv1d:
        plain = {"kernel_size": [(1,)], "stride": [(1,)], "groups": [1], "padding": [(0,), "valid", "same"]}
        settings = {name: getattr(module, name) for name in plain}
        problems += [f"has {name}={value!r}" for name, value in settings.items() if value not in plain[name]]
    if kind is nn.GELU and module.approximate not in ("none", "tanh"):
        problems.append(f"has approximate={module.approximate!r}")
    return problems


def _tampering(module: nn.Module) -> list[str]:
    """Hooks, or a forward of its own: the module may then do more than its class says."""
    problems = ["has hooks"] if any(module.__dict__.get(hooks) for hooks in HOOKS) else []
    if "forward" in module.__dict__:
        problems.append("has had its forward replaced")
    return problems


def _own_tensors(module: nn.Module) -> list[str]:
    names = [*parameters_of(module), *module._buffers]
    return [f"has parameters or buffers of its own: {', '.join(names)}"] if names else []

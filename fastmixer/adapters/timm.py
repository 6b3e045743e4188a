"""Recognises the Mixer block of timm (https://github.com/huggingface/pytorch-image-models), by structure.

    norm1, mlp_tokens{fc1, act, drop1, norm, fc2, drop2}, drop_path, norm2, mlp_channels{the same}

The class may be any: what counts is which modules the block consists of. Which function it makes of them, the
numeric probe finds out (:mod:`fastmixer.adapters.probe`). timm need not be installed.
"""

from __future__ import annotations

import sys

from torch import nn

from fastmixer.adapters.structure import HOOKS, PLAIN_TENSORS, HalfModules, Structure

# Children that only blocks of this family have (ResMLP's block has linear_tokens, gMLP's mlp_channels alone).
FAMILY = ("mlp_tokens", "mlp_channels", "linear_tokens")

BLOCK_CHILDREN = {"norm1", "mlp_tokens", "norm2", "mlp_channels"}
MLP_CHILDREN = {"fc1", "act", "fc2"}
MLP_DROPOUTS = ("drop", "drop1", "drop2")


def looks_like_block(module: nn.Module) -> bool:
    """Whether ``module`` is worth a row in a report: it has a child that only a Mixer-like block has."""
    return any(name in module._modules for name in FAMILY)


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or every reason why it is not a block that fastmixer can compute."""
    problems = _wrong_children(block, BLOCK_CHILDREN, optional=("drop_path",)) + _own_tensors(block)
    halves = []
    dropouts: list[nn.Dropout] = []
    for norm_name, mlp_name in (("norm1", "mlp_tokens"), ("norm2", "mlp_channels")):
        norm, mlp = block._modules.get(norm_name), block._modules.get(mlp_name)
        if norm is not None:
            problems += [f"{norm_name} {problem}" for problem in _not_plain(norm, nn.LayerNorm)]
        if mlp is None:
            continue
        label = f"{mlp_name} ({type(mlp).__name__})"
        mlp_problems = _mlp_problems(mlp, dropouts)
        if mlp_problems and hasattr(mlp, "gate_last"):  # timm's GluMlp
            mlp_problems.insert(0, "is gated")
        problems += [f"{label}: {problem}" for problem in mlp_problems]
        if norm is not None and not mlp_problems:
            children = mlp._modules
            halves.append(HalfModules(norm, mlp, children["fc1"], children["act"], children["fc2"]))
    drop_path = block._modules.get("drop_path")
    if drop_path is not None:
        problems += [f"drop_path {problem}" for problem in _tampered(drop_path)]
    if not problems:
        problems += _inconsistent(*halves)
    if problems:
        return "; ".join(problems)
    identity = drop_path is None or type(drop_path) is nn.Identity
    return Structure(
        token=halves[0],
        channel=halves[1],
        drop_path=None if identity else drop_path,
        dropouts=tuple(dropouts),
        draws_per_sample=not identity and type(drop_path) in _known_drop_paths(),
        children=tuple(block._modules.values()),
    )


def _mlp_problems(mlp: nn.Module, dropouts: list[nn.Dropout]) -> list[str]:
    """What keeps ``mlp`` from being fc2(act(fc1(x))); its dropouts are appended to ``dropouts``."""
    problems = _tampered(mlp) + _own_tensors(mlp)
    problems += _wrong_children(mlp, MLP_CHILDREN, optional=(*MLP_DROPOUTS, "norm"))
    for name, kind in (("fc1", nn.Linear), ("act", nn.GELU), ("fc2", nn.Linear)):
        child = mlp._modules.get(name)
        if child is not None:
            problems += [f"{name} {problem}" for problem in _not_plain(child, kind)]
    norm = mlp._modules.get("norm")
    if norm is not None:
        problems += [f"norm {problem}" for problem in _not_plain(norm, nn.Identity)]
    for name in MLP_DROPOUTS:
        child = mlp._modules.get(name)
        if child is None:
            continue
        kind = nn.Identity if type(child) is nn.Identity else nn.Dropout
        problems += [f"{name} {problem}" for problem in _not_plain(child, kind)]
        if kind is nn.Dropout:
            dropouts.append(child)
    if not problems:
        hidden, taken = mlp.fc1.weight.shape[0], mlp.fc2.weight.shape[1]
        if hidden != taken:
            problems.append(f"fc1 gives {hidden} features and fc2 takes {taken}")
    return problems


def _inconsistent(token: HalfModules, channel: HalfModules) -> list[str]:
    """Sizes that do not fit together: each MLP must return what it takes, and C be the same throughout."""
    problems = []
    for name, half in (("mlp_tokens", token), ("mlp_channels", channel)):
        taken, given = half.fc1.weight.shape[1], half.fc2.weight.shape[0]
        if taken != given:
            problems.append(f"{name} takes {taken} features and returns {given}")
    channels = (channel.fc1.weight.shape[1],)
    for name, norm in (("norm1", token.norm), ("norm2", channel.norm)):
        if tuple(norm.normalized_shape) != channels:
            problems.append(
                f"{name} normalises {tuple(norm.normalized_shape)} but mlp_channels takes {channels[0]}"
            )
    return problems


def _not_plain(module: nn.Module, kind: type[nn.Module]) -> list[str]:
    """Why ``module`` is not exactly a ``kind`` with plain parameters and nothing attached to it."""
    if type(module) is not kind:
        return [f"is {type(module).__name__}, not torch.nn.{kind.__name__}"]
    problems = _tampered(module)
    for name in ("weight", "bias") if kind in (nn.Linear, nn.LayerNorm) else ():
        parameter = module._parameters.get(name, "missing")
        absent_allowed = kind is nn.LayerNorm or name == "bias"
        if parameter is None and absent_allowed:
            continue
        if type(parameter) not in PLAIN_TENSORS or not parameter.is_floating_point():
            problems.append(f"has a {name} that is not a plain floating-point Parameter")
    if kind is nn.GELU and module.approximate not in ("none", "tanh"):
        problems.append(f"has approximate={module.approximate!r}")
    return problems


def _tampered(module: nn.Module) -> list[str]:
    """Hooks, or a forward of its own: the module may then do more than its class says."""
    problems = ["has hooks"] if any(module.__dict__.get(hooks) for hooks in HOOKS) else []
    if "forward" in module.__dict__:
        problems.append("has had its forward replaced")
    return problems


def _own_tensors(module: nn.Module) -> list[str]:
    names = [*module._parameters, *module._buffers]
    return [f"has parameters or buffers of its own: {', '.join(names)}"] if names else []


def _wrong_children(module: nn.Module, required: set[str], optional: tuple[str, ...]) -> list[str]:
    names = {name for name, child in module._modules.items() if child is not None}
    problems = [f"has no {name}" for name in sorted(required - names)]
    extra = sorted(names - required - set(optional))
    return problems + ([f"has modules a Mixer block lacks: {', '.join(extra)}"] if extra else [])


def _known_drop_paths() -> tuple[type[nn.Module], ...]:
    """The stochastic-depth classes that multiply each sample by one factor drawn over (B, 1, 1)."""
    from fastmixer.block import DropPath

    # If timm was never imported, no module can be an instance of its class: no need to import it here.
    timm_drop = sys.modules.get("timm.layers.drop")
    return (DropPath,) if timm_drop is None else (DropPath, timm_drop.DropPath)

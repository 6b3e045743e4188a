"""Blocks whose halves are ``nn.Sequential`` of any depth, transposed by einops' ``Rearrange`` modules.

    token_mix = Sequential(LayerNorm, Rearrange, FeedForward{Linear, GELU, Dropout, Linear}, Rearrange)
    channel_mix = Sequential(LayerNorm, FeedForward{the same})

Many small implementations are written like this, among them https://github.com/rishikksh20/MLP-Mixer-pytorch.
The modules take their parts by kind and order; whether the block uses them in that order, the trial shows.
"""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.matching import LAYOUTS, HalfPaths, structure_of
from fastmixer.blocks.structure import Structure

NAMES = (
    ("token_mix", "channel_mix"),
    ("token_mixing", "channel_mixing"),
    ("token_mixer", "channel_mixer"),
)


def looks_like_block(module: nn.Module) -> bool:
    """Whether ``module`` has two sequential halves with the names that they usually have."""
    return _names(module) is not None


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or every reason why it is not a block that fastmixer can compute."""
    halves = [_half(name, block.get_submodule(name)) for name in _names(block)]
    reasons = [half for half in halves if isinstance(half, str)]
    return "; ".join(reasons) or structure_of(block, *halves)


def _names(module: nn.Module) -> tuple[str, str] | None:
    children = module._modules
    names = (p for p in NAMES if all(isinstance(children.get(name), nn.Sequential) for name in p))
    return next(names, None)


def _half(name: str, half: nn.Module) -> HalfPaths | str:
    """Where the parts of one half are, by the kind of each module, or why they cannot be told apart."""
    parts: dict[type, list[str]] = {nn.LayerNorm: [], nn.Linear: [], nn.GELU: [], nn.Dropout: []}
    layouts = []
    for path, module in half.named_modules(prefix=name, remove_duplicate=False):
        kind = nn.Linear if isinstance(module, nn.Conv1d) else type(module)
        if type(module).__name__ in (*LAYOUTS, "Identity"):
            layouts.append(path)
            continue
        for part, paths in parts.items():
            if issubclass(kind, part):
                paths.append(path)
    norms, linears, acts, dropouts = parts.values()
    if (len(norms), len(linears), len(acts)) != (1, 2, 1):
        classes = [type(m).__name__ for m in half.modules() if not m._modules]
        return f"{name} is not one LayerNorm, two linear layers and one GELU but {', '.join(classes)}"
    return HalfPaths(norms[0], linears[0], linears[1], acts[0], tuple(dropouts), layouts=tuple(layouts))

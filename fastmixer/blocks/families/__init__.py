"""Which foreign blocks fastmixer recognises: one short module a family, each with the two functions below."""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.families import lucidrains, mmpretrain, patchtsmixer, relatives, sequential, timm
from fastmixer.blocks.structure import Structure

ADAPTERS = (timm, lucidrains, sequential, mmpretrain, patchtsmixer, relatives)


def looks_like_block(module: nn.Module) -> bool:
    """Whether any adapter takes ``module`` for a block, be it one that it will decline."""
    return any(adapter.looks_like_block(module) for adapter in ADAPTERS)


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or the reason why the adapter that knows its family declines it."""
    for adapter in ADAPTERS:
        if adapter.looks_like_block(block):
            return adapter.match(block)
    return "is of no family that fastmixer knows"

"""The block of lucidrains' mlp-mixer-pytorch (https://github.com/lucidrains/mlp-mixer-pytorch).

    Sequential(PreNormResidual{fn: Sequential(Conv1d, GELU, Dropout, Conv1d, Dropout), norm},
               PreNormResidual{fn: Sequential(Linear, GELU, Dropout, Linear, Dropout), norm})

The token MLP is two convolutions of kernel size 1 over (B, S, C) with the tokens as their channels.
"""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.matching import HalfPaths, structure_of
from fastmixer.blocks.structure import Structure


def looks_like_block(module: nn.Module) -> bool:
    """Whether ``module`` is two modules in a row with a sequential ``fn`` and a ``norm`` each."""
    halves = list(module._modules.values()) if isinstance(module, nn.Sequential) else []
    return len(halves) == 2 and all(
        half is not None
        and half._modules.keys() == {"fn", "norm"}
        and isinstance(half._modules["fn"], nn.Sequential)
        for half in halves
    )


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or every reason why it is not a block that fastmixer can compute."""
    token, channel = block._modules
    return structure_of(block, _half(token), _half(channel))


def _half(name: str) -> HalfPaths:
    return HalfPaths(
        norm=f"{name}.norm",
        fc1=f"{name}.fn.0",
        act=f"{name}.fn.1",
        fc2=f"{name}.fn.3",
        dropouts=(f"{name}.fn.2", f"{name}.fn.4"),
    )

"""The Mixer block of mmpretrain (https://github.com/open-mmlab/mmpretrain), whose MLPs are mmcv's ``FFN``.

    ln1, token_mix, ln2, channel_mix
    FFN: layers{0{0: Linear, 1: GELU, 2: Dropout}, 1: Linear, 2: Dropout}, dropout_layer, gamma2

The channel half's residual is added inside its FFN. mmcv need not be installed.
"""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.matching import HalfPaths, structure_of
from fastmixer.blocks.structure import Structure


def looks_like_block(module: nn.Module) -> bool:
    """Whether ``module`` has mmpretrain's two halves, be their layers what they may."""
    halves = [module._modules.get(name) for name in ("token_mix", "channel_mix")]
    return all(half is not None and "layers" in half._modules for half in halves)


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or every reason why it is not a block that fastmixer can compute."""
    return structure_of(block, _half("ln1", "token_mix"), _half("ln2", "channel_mix"))


def _half(norm: str, ffn: str) -> HalfPaths:
    return HalfPaths(
        norm=norm,
        fc1=f"{ffn}.layers.0.0",
        act=f"{ffn}.layers.0.1",
        fc2=f"{ffn}.layers.1",
        dropouts=(f"{ffn}.layers.0.2", f"{ffn}.layers.2"),
        idle=(f"{ffn}.gamma2",),  # LayerScale where it is switched on
        drop_path=f"{ffn}.dropout_layer",
    )

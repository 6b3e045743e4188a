"""The Mixer block of timm (https://github.com/huggingface/pytorch-image-models), and whatever looks like it.

    norm1, mlp_tokens{fc1, act, drop1, norm, fc2, drop2}, drop_path, norm2, mlp_channels{the same}

timm's other families share its names: gMixer's MLPs are gated, ResMLP's block has linear_tokens and affine
"norms", gMLP's an MLP of the channels alone. They are listed, and declined.
"""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.matching import HalfPaths, structure_of
from fastmixer.blocks.structure import Structure

# Children that only blocks of this family have.
FAMILY = ("mlp_tokens", "mlp_channels", "linear_tokens")


def looks_like_block(module: nn.Module) -> bool:
    """Whether ``module`` is worth a row in a report: it has a child that only a Mixer-like block has."""
    return any(name in module._modules for name in FAMILY)


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or every reason why it is not a block that fastmixer can compute."""
    mlps = {name: block._modules.get(name) for name in ("mlp_tokens", "mlp_channels")}
    gated = [
        f"{name} ({type(mlp).__name__}): is gated"
        for name, mlp in mlps.items()
        if hasattr(mlp, "gate_last")  # timm's GluMlp
    ]
    return structure_of(block, _half("norm1", "mlp_tokens"), _half("norm2", "mlp_channels"), reasons=gated)


def _half(norm: str, mlp: str) -> HalfPaths:
    return HalfPaths(
        norm=norm,
        fc1=f"{mlp}.fc1",
        act=f"{mlp}.act",
        fc2=f"{mlp}.fc2",
        dropouts=(f"{mlp}.drop", f"{mlp}.drop1", f"{mlp}.drop2"),
        idle=(f"{mlp}.norm",),
        drop_path="drop_path",
    )

"""The layer of Hugging Face's PatchTSMixer (https://huggingface.co/docs/transformers/model_doc/patchtsmixer).

    patch_mixer{norm{norm}, mlp{fc1, dropout1, fc2, dropout2}}, feature_mixer{the same}

Its input is (B, V, S, C), V series of S patches, and nothing mixes the series: B V samples of (S, C).
"""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.matching import HalfPaths, structure_of
from fastmixer.blocks.structure import Structure

# What the layer may have besides, and why it is then no Mixer block.
EXTRAS = {
    "channel_feature_mixer": 'mixes the series too (mode="mix_channel")',
    "patch_mixer.gating_block": "is gated (gated_attn=True)",
    "patch_mixer.self_attn_layer": "has self-attention (self_attn=True)",
    "patch_mixer.norm.norm.batchnorm": 'normalises over the batch (norm_mlp="BatchNorm")',
}


def looks_like_block(module: nn.Module) -> bool:
    """Whether ``module`` mixes patches, then features."""
    return {"patch_mixer", "feature_mixer"} <= module._modules.keys()


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or every reason why it is not a block that fastmixer can compute."""
    names = {name for name, _ in block.named_modules()}
    reasons = [reason for path, reason in EXTRAS.items() if path in names]
    return structure_of(block, _half("patch_mixer"), _half("feature_mixer"), ndim=4, reasons=reasons)


def _half(name: str) -> HalfPaths:
    return HalfPaths(
        norm=f"{name}.norm.norm",
        fc1=f"{name}.mlp.fc1",
        fc2=f"{name}.mlp.fc2",
        dropouts=(f"{name}.mlp.dropout1", f"{name}.mlp.dropout2"),
    )

"""Relatives of the Mixer block that fastmixer does not compute: listed in a report, each with its reason."""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.structure import Structure

LINEAR_TIME = "is a TSMixer: one linear layer mixes the time steps, not an MLP"

# The children that make a relative known, and why it is not fused.
RELATIVES = {
    ("temporal_mixer", "feature_mixer"): LINEAR_TIME,  # neuralforecast's TSMixer and TSMixerx
    ("time_mixing", "feature_mixing"): LINEAR_TIME,  # PyTorch ports of Google's
    ("proj_in", "sgu", "proj_out"): "is a gMLP: a spatial gating unit mixes the tokens",
}

# Ports of Keras' example and of early sketches in JAX: two MLPs and one LayerNorm.
SHARED_NORM = (
    ("normalize", "mlp1", "mlp2"),
    ("ln", "tokens_mlp_block", "channels_mlp_block"),
    ("layer_norm", "token_mixing", "channel_mixing"),
)


def looks_like_block(module: nn.Module) -> bool:
    """Whether ``module`` is a relative by the names of its children."""
    return _reason(module) is not None


def match(block: nn.Module) -> Structure | str:
    """Why ``block`` is not a block that fastmixer can compute, with the modules that show it."""
    batch_norms = [
        f"{name} is {type(module).__name__}, not torch.nn.LayerNorm"
        for name, module in block.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    return "; ".join([_reason(block), *batch_norms])


def _reason(module: nn.Module) -> str | None:
    present = {name for name, child in module._modules.items() if child is not None}
    for names, reason in RELATIVES.items():
        if present.issuperset(names):
            return reason
    for names in SHARED_NORM:
        if present.issuperset(names) and sum(isinstance(m, nn.LayerNorm) for m in module.modules()) == 1:
            return f"one LayerNorm ({names[0]}) serves both halves"
    return None

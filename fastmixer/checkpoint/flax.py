"""Google's checkpoints of MLP-Mixer: Flax's names and layouts, and Flax's function.

The names are those that flax.linen gives the parameters of ``vit_jax/models_mixer.py`` in
https://github.com/google-research/vision_transformer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

# Our name of a layer -> Flax's: of a block, and around the blocks.
BLOCK_LAYERS = {
    "norm1": "LayerNorm_0",
    "mlp_tokens.fc1": "token_mixing/Dense_0",
    "mlp_tokens.fc2": "token_mixing/Dense_1",
    "norm2": "LayerNorm_1",
    "mlp_channels.fc1": "channel_mixing/Dense_0",
    "mlp_channels.fc2": "channel_mixing/Dense_1",
}
OTHER_LAYERS = {"stem.proj": "stem", "norm": "pre_head_layer_norm", "head": "head"}

EPS = 1e-6  # of flax.linen.LayerNorm
HEAD = ("head.weight", "head.bias")
OUTER = ("stem.proj.weight", "stem.proj.bias", "norm.weight", "norm.bias")  # every such model has these
SHOWN = 4  # names that an error message gives as examples

# Names of formats before the published one, and what they are.
OUTDATED = {
    r"MixerBlock_\d+/(kernel|bias)\d+": "its token MLPs are raw parameters of the block, as in an early "
    "version of the code, which told their two layers apart by a size or a number",
    r"MixerBlock_\d+/LayerNorm_[2-9]/.+": "its layers are counted as before flax.linen",
    r"arr_\d+": "its arrays are numbered, not named",
}


def as_torch(arrays: dict[str, Tensor], expected: Iterable[str], path: Path) -> dict[str, Tensor]:
    """The arrays by the names of ``expected``, the model's, in PyTorch's layouts.

    An array that has no place in the model keeps its name, marked as the file's. Raises ValueError if that is
    so of all of them, and for names of outdated versions.
    """
    for name in arrays:
        if reason := next((text for pattern, text in OUTDATED.items() if re.fullmatch(pattern, name)), None):
            raise ValueError(
                f"{path} is not in the format of the published checkpoints: {reason} (entry {name!r}). "
                "Expected are names such as 'MixerBlock_0/token_mixing/Dense_0/kernel'."
            )
    places = {flax_name(name): name for name in expected}
    if not places.keys() & arrays.keys():
        names = ", ".join(sorted(arrays)[:SHOWN]) or "nothing"
        raise ValueError(f"{path} has none of the model's weights by the names of Flax's Mixer, but {names}")
    places |= {flax_name(name): name for name in HEAD}  # a model without a head is told of the file's
    return {places.get(name, f"{name} (in the file)"): _torch_layout(array) for name, array in arrays.items()}


def _torch_layout(array: Tensor) -> Tensor:
    """Kernels of a convolution, (height, width, in, out), become (out, in, height, width); matrices turn."""
    if array.ndim == 4:
        return array.permute(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array


def flax_name(name: str) -> str | None:
    """Flax's name of a parameter: of "blocks.3.norm1.weight" it is "MixerBlock_3/LayerNorm_0/scale".

    None for a parameter that Flax's Mixer lacks.
    """
    layer, _, kind = name.rpartition(".")
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
    prefix = f"MixerBlock_{block[1]}/" if block else ""
    flax_layer = BLOCK_LAYERS.get(block[2]) if block else OTHER_LAYERS.get(layer)
    if flax_layer is None or kind not in ("weight", "bias"):
        return None
    weight = "scale" if "norm" in layer else "kernel"
    return f"{prefix}{flax_layer}/{weight if kind == 'weight' else kind}"


def check_eps(model: nn.Module) -> None:
    """Raises ValueError unless every LayerNorm has Flax's eps."""
    norms = {name: m.eps for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    others = [f"{name} {eps:g}" for name, eps in norms.items() if eps != EPS]
    if others:
        raise ValueError(
            f"the weights are for LayerNorms with eps={EPS:g}, and {len(others)} of the model's have another "
            f"({others[0]}): create the model without norm_layer, or load with gelu='keep', which keeps "
            "both its eps and its GELU. The model is unchanged."
        )


def exact_gelus(model: nn.Module) -> list[nn.GELU]:
    """The model's GELUs, whatever their names, that are to be set to the tanh approximation.

    Raises ValueError if an MLP has another activation, or none that is a module.
    """
    gelus = [module for module in model.modules() if type(module) is nn.GELU]
    problem = "" if gelus else f"the {type(model).__name__} has no torch.nn.GELU to set"
    for name, mlp in model.named_modules():
        layers = dict(mlp.named_children())
        is_mlp = "act" in layers or {"fc1", "fc2"} <= layers.keys()
        if is_mlp and not any(type(layer) is nn.GELU for layer in layers.values()):
            activation = f".act is a {type(layers['act']).__name__}" if "act" in layers else " has none"
            problem = f"the model's {name}{activation}, not a torch.nn.GELU"
            break
    if problem:
        raise ValueError(
            f"the weights are for the tanh approximation of GELU, and {problem}; gelu='keep' loads them all "
            "the same. The model is unchanged."
        )
    return [module for module in gelus if module.approximate != "tanh"]

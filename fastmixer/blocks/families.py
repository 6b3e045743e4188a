"""Which foreign blocks fastmixer recognises: one function per family, which knows where the modules are.

Each returns None for a module that is no block of its family, and otherwise where the modules of both halves
are, or why fastmixer does not compute it.
"""

from __future__ import annotations

from torch import nn

from fastmixer.blocks.matching import LAYOUTS, Layout, Role, structure_of
from fastmixer.blocks.structure import Structure


def timm(block: nn.Module) -> Layout | None:
    """The Mixer block of timm (https://github.com/huggingface/pytorch-image-models), and what looks like it.

        norm1, mlp_tokens{fc1, act, drop1, norm, fc2, drop2}, drop_path, norm2, mlp_channels{the same}

    timm's other families share its names: gMixer's MLPs are gated, ResMLP's block has linear_tokens and
    affine "norms", gMLP's an MLP of the channels alone. They are listed, and declined.
    """

    def half(norm: str, mlp: str) -> dict[str, Role]:
        return {
            norm: Role.NORM,
            f"{mlp}.fc1": Role.LINEAR,
            f"{mlp}.act": Role.GELU,
            f"{mlp}.fc2": Role.LINEAR,
            f"{mlp}.norm": Role.IDLE,
            **dict.fromkeys((f"{mlp}.drop", f"{mlp}.drop1", f"{mlp}.drop2"), Role.DROPOUT),
            "drop_path": Role.DROP_PATH,
        }

    children = block._modules
    if not children.keys() & {"mlp_tokens", "mlp_channels", "linear_tokens"}:
        return None
    mlps = ((name, children.get(name)) for name in ("mlp_tokens", "mlp_channels"))
    gated = [f"{name} ({type(mlp).__name__}): is gated" for name, mlp in mlps if hasattr(mlp, "gate_last")]
    return Layout(half("norm1", "mlp_tokens"), half("norm2", "mlp_channels"), problems=gated)


def lucidrains(block: nn.Module) -> Layout | None:
    """The block of lucidrains' mlp-mixer-pytorch (https://github.com/lucidrains/mlp-mixer-pytorch).

        Sequential(PreNormResidual{fn: Sequential(Conv1d, GELU, Dropout, Conv1d, Dropout), norm},
                   PreNormResidual{fn: Sequential(Linear, GELU, Dropout, Linear, Dropout), norm})

    The token MLP is two convolutions of kernel size 1 over (B, S, C) with the tokens as their channels.
    """

    def half(name: str) -> dict[str, Role]:
        roles = Role.LINEAR, Role.GELU, Role.DROPOUT, Role.LINEAR, Role.DROPOUT
        return {f"{name}.norm": Role.NORM, **{f"{name}.fn.{i}": role for i, role in enumerate(roles)}}

    children = block._modules if isinstance(block, nn.Sequential) else {}
    alike = (
        child is not None
        and child._modules.keys() == {"fn", "norm"}
        and isinstance(child._modules["fn"], nn.Sequential)
        for child in children.values()
    )
    return Layout(*map(half, children)) if len(children) == 2 and all(alike) else None


def sequential(block: nn.Module) -> Layout | str | None:
    """Blocks whose halves are ``nn.Sequential`` of any depth, transposed by einops' ``Rearrange`` modules.

        token_mix = Sequential(LayerNorm, Rearrange, FeedForward{Linear, GELU, Dropout, Linear}, Rearrange)
        channel_mix = Sequential(LayerNorm, FeedForward{the same})

    Many small implementations are written like this, among them
    https://github.com/rishikksh20/MLP-Mixer-pytorch. The modules take their parts by kind and order; whether
    the block uses them in that order, the trial shows.
    """

    def half(name: str) -> dict[str, Role] | str:
        roles: dict[str, Role] = {}
        for path, module in block._modules[name].named_modules(prefix=name, remove_duplicate=False):
            is_layout = type(module).__name__ in LAYOUTS
            for role in (Role.IDLE, Role.NORM, Role.LINEAR, Role.GELU, Role.DROPOUT):
                if isinstance(module, role.value) or (is_layout and role is Role.IDLE):
                    roles.setdefault(path, role)
        if [list(roles.values()).count(role) for role in (Role.NORM, Role.LINEAR, Role.GELU)] == [1, 2, 1]:
            return roles
        classes = ", ".join(type(m).__name__ for m in block._modules[name].modules() if not m._modules)
        return f"{name} is not one LayerNorm, two linear layers and one GELU but {classes}"

    for suffix in ("mix", "mixing", "mixer"):
        names = f"token_{suffix}", f"channel_{suffix}"
        if all(isinstance(block._modules.get(name), nn.Sequential) for name in names):
            halves = [half(name) for name in names]
            return "; ".join(part for part in halves if isinstance(part, str)) or Layout(*halves)
    return None


def mmpretrain(block: nn.Module) -> Layout | None:
    """The block of mmpretrain (https://github.com/open-mmlab/mmpretrain), whose MLPs are mmcv's ``FFN``.

        ln1, token_mix, ln2, channel_mix
        FFN: layers{0{0: Linear, 1: GELU, 2: Dropout}, 1: Linear, 2: Dropout}, dropout_layer, gamma2

    The channel half's residual is added inside its FFN. mmcv need not be installed.
    """

    def half(norm: str, ffn: str) -> dict[str, Role]:
        return {
            norm: Role.NORM,
            f"{ffn}.layers.0.0": Role.LINEAR,
            f"{ffn}.layers.0.1": Role.GELU,
            f"{ffn}.layers.0.2": Role.DROPOUT,
            f"{ffn}.layers.1": Role.LINEAR,
            f"{ffn}.layers.2": Role.DROPOUT,
            f"{ffn}.gamma2": Role.IDLE,  # LayerScale where it is switched on
            f"{ffn}.dropout_layer": Role.DROP_PATH,
        }

    ffns = [block._modules.get(name) for name in ("token_mix", "channel_mix")]
    if not all(ffn is not None and "layers" in ffn._modules for ffn in ffns):
        return None
    return Layout(half("ln1", "token_mix"), half("ln2", "channel_mix"))


def patchtsmixer(block: nn.Module) -> Layout | None:
    """The layer of Hugging Face's PatchTSMixer.

        patch_mixer{norm{norm}, mlp{fc1, dropout1, fc2, dropout2}}, feature_mixer{the same}

    https://huggingface.co/docs/transformers/model_doc/patchtsmixer: its input is (B, V, S, C), V series of S
    patches, and nothing mixes the series: B V samples of (S, C).
    """

    def half(name: str) -> dict[str, Role]:
        linear_layers = {f"{name}.mlp.fc1": Role.LINEAR, f"{name}.mlp.fc2": Role.LINEAR}
        dropouts = {f"{name}.mlp.dropout1": Role.DROPOUT, f"{name}.mlp.dropout2": Role.DROPOUT}
        return {f"{name}.norm.norm": Role.NORM, **linear_layers, **dropouts}

    if not {"patch_mixer", "feature_mixer"} <= block._modules.keys():
        return None
    extras = {
        "channel_feature_mixer": 'mixes the series too (mode="mix_channel")',
        "patch_mixer.gating_block": "is gated (gated_attn=True)",
        "patch_mixer.self_attn_layer": "has self-attention (self_attn=True)",
        "patch_mixer.norm.norm.batchnorm": 'normalises over the batch (norm_mlp="BatchNorm")',
    }
    names = dict(block.named_modules())
    problems = [problem for path, problem in extras.items() if path in names]
    return Layout(half("patch_mixer"), half("feature_mixer"), ndim=4, problems=problems)


def relatives(block: nn.Module) -> str | None:
    """Relatives of the Mixer block that fastmixer does not compute, known by the names of their children."""
    linear_time = "is a TSMixer: one linear layer mixes the time steps, not an MLP"
    reasons = {
        ("temporal_mixer", "feature_mixer"): linear_time,  # neuralforecast's TSMixer and TSMixerx
        ("time_mixing", "feature_mixing"): linear_time,  # PyTorch ports of Google's
        ("proj_in", "sgu", "proj_out"): "is a gMLP: a spatial gating unit mixes the tokens",
    }
    # Ports of Keras' example and of early sketches in JAX: two MLPs and one LayerNorm.
    shared_norm = (
        ("normalize", "mlp1", "mlp2"),
        ("ln", "tokens_mlp_block", "channels_mlp_block"),
        ("layer_norm", "token_mixing", "channel_mixing"),
    )
    reasons |= {names: f"one LayerNorm ({names[0]}) serves both halves" for names in shared_norm}
    present = {name for name, child in block._modules.items() if child is not None}
    names = next((names for names in reasons if present.issuperset(names)), None)
    if names is None:
        return None
    if names in shared_norm and sum(isinstance(module, nn.LayerNorm) for module in block.modules()) != 1:
        return None
    batch_norms = (
        f"{name} is {type(module).__name__}, not torch.nn.LayerNorm"
        for name, module in block.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    )
    return "; ".join([reasons[names], *batch_norms])


FAMILIES = (timm, lucidrains, sequential, mmpretrain, patchtsmixer, relatives)


def layout_of(module: nn.Module) -> Layout | str | None:
    """What the first family that takes ``module`` for its block says of it; None: no block of any."""
    layouts = (family(module) for family in FAMILIES)
    return next((layout for layout in layouts if layout is not None), None)


def match(block: nn.Module) -> Structure | str:
    """The structure of ``block``, or every reason why it is not a block that fastmixer can compute."""
    layout = layout_of(block)
    if layout is None:
        return "is of no family that fastmixer knows"
    return layout if isinstance(layout, str) else structure_of(block, layout)

"""Miniatures of the families that fuse knows: the modules, names and forwards of the originals, small."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import fastmixer
from fastmixer import parity
from fastmixer.dtypes import accumulate_dtype

SEQ, DIM = 10, 24
TOKEN_HIDDEN, CHANNEL_HIDDEN = 14, 40


# ---- lucidrains: mlp-mixer-pytorch -----------------------------------------------------------------------


class PreNormResidual(nn.Module):
    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x)) + x


def lucidrains(dropout: float = 0.0) -> nn.Module:
    def mlp(dense: Callable, width: int, hidden: int) -> nn.Module:
        first, second = dense(width, hidden), dense(hidden, width)
        return nn.Sequential(first, nn.GELU(), nn.Dropout(dropout), second, nn.Dropout(dropout))

    def convolution(taken: int, given: int) -> nn.Conv1d:
        return nn.Conv1d(taken, given, kernel_size=1)

    token = mlp(convolution, SEQ, TOKEN_HIDDEN)
    return nn.Sequential(PreNormResidual(token), PreNormResidual(mlp(nn.Linear, DIM, CHANNEL_HIDDEN)))


def real_lucidrains(dropout: float = 0.0) -> nn.Module:
    package = pytest.importorskip("mlp_mixer_pytorch", reason="mlp-mixer-pytorch is not installed")
    model = package.MLPMixer(
        image_size=(8, 20),
        channels=1,
        patch_size=4,
        dim=DIM,
        depth=1,
        num_classes=2,
        expansion_factor=1.5,
        expansion_factor_token=2,
        dropout=dropout,
    )
    return model[2]


# ---- Sequential halves and Rearrange ---------------------------------------------------------------------


class Rearrange(nn.Module):
    """einops' layer for the one pattern that Mixer blocks need."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = pattern

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        layers = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width)
        self.net = nn.Sequential(*layers, nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class SequentialBlock(nn.Module):
    def __init__(self, dropout: float = 0.0, rearrange: Callable[[str], nn.Module] = Rearrange) -> None:
        super().__init__()
        self.token_mix = nn.Sequential(
            nn.LayerNorm(DIM),
            rearrange("b n d -> b d n"),
            FeedForward(SEQ, TOKEN_HIDDEN, dropout),
            rearrange("b d n -> b n d"),
        )
        self.channel_mix = nn.Sequential(nn.LayerNorm(DIM), FeedForward(DIM, CHANNEL_HIDDEN, dropout))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(x)
        return x + self.channel_mix(x)


def einops_block(dropout: float = 0.0) -> nn.Module:
    layers = pytest.importorskip("einops.layers.torch", reason="einops is not installed")
    return SequentialBlock(dropout, layers.Rearrange)


# ---- mmpretrain ------------------------------------------------------------------------------------------


class MmcvLinear(nn.Linear):
    """mmcv wraps nn.Linear for the sake of old versions of PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class MmcvDropPath(nn.Module):
    """mmcv's draws: floor(keep + uniform) a sample."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        uniform = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), dtype=x.dtype, device=x.device)
        return x.div(keep) * (keep + uniform).floor()


class FFN(nn.Module):
    def __init__(
        self, width: int, hidden: int, dropout: float, drop_path: float, add_identity: bool, linear: type
    ) -> None:
        super().__init__()
        first = nn.Sequential(linear(width, hidden), nn.GELU(), nn.Dropout(dropout))
        self.layers = nn.Sequential(first, linear(hidden, width), nn.Dropout(dropout))
        self.dropout_layer = MmcvDropPath(drop_path)
        self.add_identity = add_identity
        self.gamma2 = nn.Identity()

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        out = self.dropout_layer(self.gamma2(self.layers(x)))
        if not self.add_identity:
            return out
        return (x if identity is None else identity) + out


class MmpretrainBlock(nn.Module):
    def __init__(self, dropout: float = 0.0, drop_path: float = 0.0, linear: type = MmcvLinear) -> None:
        super().__init__()
        self.norm1_name, self.norm2_name = "ln1", "ln2"
        self.ln1 = nn.LayerNorm(DIM)
        self.token_mix = FFN(SEQ, TOKEN_HIDDEN, dropout, drop_path, False, linear)
        self.ln2 = nn.LayerNorm(DIM)
        self.channel_mix = FFN(DIM, CHANNEL_HIDDEN, dropout, drop_path, True, linear)

    @property
    def norm1(self) -> nn.Module:
        return getattr(self, self.norm1_name)

    @property
    def norm2(self) -> nn.Module:
        return getattr(self, self.norm2_name)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.channel_mix(self.norm2(x), identity=x)


def pretend_mmcv(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the miniature's classes those that mmcv would have loaded."""
    for name, attribute, kind in (
        ("mmcv.cnn.bricks.wrappers", "Linear", MmcvLinear),
        ("mmcv.cnn.bricks.drop", "DropPath", MmcvDropPath),
    ):
        module = types.ModuleType(name)
        setattr(module, attribute, kind)
        monkeypatch.setitem(sys.modules, name, module)


# ---- Hugging Face: PatchTSMixer --------------------------------------------------------------------------


class PatchTSMixerNormLayer(nn.Module):
    def __init__(self, norm_mlp: str) -> None:
        super().__init__()
        self.norm_mlp = norm_mlp
        self.norm = PatchTSMixerBatchNorm() if "batch" in norm_mlp.lower() else nn.LayerNorm(DIM)

    def forward(self, x: Tensor) -> Tensor:
        if "batch" in self.norm_mlp.lower():
            return self.norm(x.reshape(-1, *x.shape[2:])).reshape(x.shape)
        return self.norm(x)


class PatchTSMixerBatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.batchnorm(x.transpose(1, 2)).transpose(1, 2)


class PatchTSMixerMLP(nn.Module):
    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dropout1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout2(self.fc2(self.dropout1(F.gelu(self.fc1(x)))))


class PatchTSMixerGatedAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn_layer = nn.Linear(width, width)
        self.attn_softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.attn_softmax(self.attn_layer(x))


class PatchTSMixerHalf(nn.Module):
    """PatchMixerBlock, FeatureMixerBlock and the channel mixer: they differ in the axis that they mix."""

    def __init__(
        self, axis: int, width: int, hidden: int, dropout: float, gated: bool, norm_mlp: str, attention: bool
    ) -> None:
        super().__init__()
        self.axis, self.gated_attn, self.self_attn = axis, gated, attention
        self.norm = PatchTSMixerNormLayer(norm_mlp)
        self.mlp = PatchTSMixerMLP(width, hidden, dropout)
        if gated:
            self.gating_block = PatchTSMixerGatedAttention(width)
        if attention:
            self.self_attn_layer = nn.MultiheadAttention(DIM, 2, batch_first=True)
            self.norm_attn = PatchTSMixerNormLayer(norm_mlp)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        out = self.mlp(normed.transpose(self.axis, -1))
        out = (self.gating_block(out) if self.gated_attn else out).transpose(self.axis, -1)
        if self.self_attn:
            rows = normed.flatten(0, 1)
            out = self.norm_attn(out + self.self_attn_layer(rows, rows, rows)[0].view_as(out))
        return out + x


class PatchTSMixerLayer(nn.Module):
    def __init__(
        self,
        dropout: float = 0.0,
        gated_attn: bool = False,
        norm_mlp: str = "LayerNorm",
        self_attn: bool = False,
        mode: str = "common_channel",
    ) -> None:
        super().__init__()
        shared = dropout, gated_attn, norm_mlp
        self.patch_mixer = PatchTSMixerHalf(2, SEQ, TOKEN_HIDDEN, *shared, self_attn)
        self.feature_mixer = PatchTSMixerHalf(3, DIM, CHANNEL_HIDDEN, *shared, False)
        self.mode = mode
        if mode == "mix_channel":
            self.channel_feature_mixer = PatchTSMixerHalf(1, 3, 6, *shared, False)

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "mix_channel":
            x = self.channel_feature_mixer(x)
        return self.feature_mixer(self.patch_mixer(x))


def real_patchtsmixer(dropout: float = 0.0, **settings) -> nn.Module:
    pytest.importorskip("transformers", reason="transformers is not installed")
    from transformers.models.patchtsmixer import PatchTSMixerConfig
    from transformers.models.patchtsmixer.modeling_patchtsmixer import PatchTSMixerLayer as Layer

    settings = {"gated_attn": False, **settings}
    config = PatchTSMixerConfig(
        context_length=SEQ * 4, patch_length=4, patch_stride=4, d_model=DIM, dropout=dropout, **settings
    )
    return Layer(config)


# ---- all of them -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A family's block, its parts by name, and the axes of its input before (S, C)."""

    make: Callable[..., nn.Module]
    fc1: str
    act: str | None  # None: a function
    norm: str
    batch: tuple[int, ...] = (3,)

    def block(self, **settings) -> nn.Module:
        """A block whose weights are all random."""
        block = self.make(**settings)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.3)
        return block

    def x(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*self.batch, SEQ, DIM, dtype=torch.float64).to(dtype)


_LUCIDRAINS = {"fc1": "0.fn.0", "act": "1.fn.1", "norm": "1.norm"}
_SEQUENTIAL = {"fc1": "token_mix.2.net.0", "act": "channel_mix.1.net.1", "norm": "token_mix.0"}
_PATCHTSMIXER = {
    "fc1": "patch_mixer.mlp.fc1",
    "act": None,
    "norm": "feature_mixer.norm.norm",
    "batch": (2, 3),
}

FAMILIES = {
    "lucidrains": Family(lucidrains, **_LUCIDRAINS),
    "mlp-mixer-pytorch": Family(real_lucidrains, **_LUCIDRAINS),
    "sequential": Family(SequentialBlock, **_SEQUENTIAL),
    "einops": Family(einops_block, **_SEQUENTIAL),
    "mmpretrain": Family(MmpretrainBlock, "token_mix.layers.0.0", "channel_mix.layers.0.1", "ln2"),
    "patchtsmixer": Family(PatchTSMixerLayer, **_PATCHTSMIXER),
    "transformers": Family(real_patchtsmixer, **_PATCHTSMIXER),
}


def parities(block: nn.Module, draws: list[Tensor], dtype: torch.dtype) -> dict[str, parity.Parity]:
    """Result and gradients of ``block`` fused, in ``dtype``, against eager and the float64 truth, by name.

    draws: inputs, whose results are pooled, as a relative error means little for a few numbers.
    """
    eager = copy.deepcopy(block).to(dtype)
    fused, truth = copy.deepcopy(eager), copy.deepcopy(eager).double()
    fastmixer.fuse(fused, strict=True)
    found = []
    for model in (fused, eager, truth):
        kind = torch.float64 if model is truth else dtype
        results: dict[str, list[Tensor]] = {}
        for seed, draw in enumerate(draws):
            x = draw.to(dtype).to(kind, copy=True).requires_grad_()
            weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            model.zero_grad()
            with fastmixer.backend("triton" if model is fused else "torch"):
                out = model(x)
                out.backward(weight.to(dtype).to(kind))
            results.setdefault("out", []).append(out.detach())
            results.setdefault("x", []).append(x.grad)
            for name, parameter in model.named_parameters():
                results.setdefault(name, []).append(parameter.grad.clone())
        found.append({name: torch.stack(values) for name, values in results.items()})
    accumulate = accumulate_dtype(dtype)
    return {name: parity.compare(*(each[name] for each in found), accumulate) for name in found[0]}

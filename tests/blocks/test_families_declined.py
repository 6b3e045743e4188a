"""What is no Mixer block, or not plainly one, is declined with the reason: relatives, and odd members."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from foreign_blocks import Plain
from foreign_families import (
    DIM,
    FAMILIES,
    SEQ,
    FeedForward,
    MmpretrainBlock,
    PatchTSMixerLayer,
    PreNormResidual,
    Rearrange,
    SequentialBlock,
    lucidrains,
    pretend_mmcv,
    real_patchtsmixer,
)
from torch import Tensor, nn
from torch.nn import functional as F

import fastmixer


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    pretend_mmcv(monkeypatch)
    with fastmixer.backend("torch"):
        yield


def declined(block: nn.Module) -> str:
    """The reason that fuse gives, having left the block alone."""
    attributes = dict(block.__dict__)
    (row,) = fastmixer.fuse(block)
    assert not row.fused and row.name == "(model)" and row.kind == type(block).__name__
    assert block.__dict__ == attributes
    return row.reason


# ---- relatives -------------------------------------------------------------------------------------------


class TemporalMixing(nn.Module):
    """neuralforecast's: BatchNorm over all features of all steps, one linear layer in time."""

    def __init__(self) -> None:
        super().__init__()
        self.temporal_norm = nn.BatchNorm1d(SEQ * DIM)
        self.temporal_lin = nn.Linear(SEQ, SEQ)
        self.temporal_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.temporal_norm(x.flatten(1)).view_as(x)
        return x + self.temporal_drop(F.relu(self.temporal_lin(normed.mT))).mT


class FeatureMixing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.feature_norm = nn.BatchNorm1d(SEQ * DIM)
        self.feature_lin_1, self.feature_lin_2 = nn.Linear(DIM, 40), nn.Linear(40, DIM)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.feature_norm(x.flatten(1)).view_as(x)
        return x + self.feature_lin_2(F.relu(self.feature_lin_1(normed)))


class NeuralforecastLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.temporal_mixer, self.feature_mixer = TemporalMixing(), FeatureMixing()

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_mixer(self.temporal_mixer(x))


class TimeMixing(nn.Module):
    """Google's TSMixer as its ports to PyTorch have it; with LayerNorm if asked."""

    def __init__(self, norm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.norm = norm(DIM)
        self.fc1 = nn.Linear(SEQ, SEQ)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + F.relu(self.fc1(x.mT)).mT)


class TSMixerLayer(nn.Module):
    def __init__(self, norm: Callable[..., nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.time_mixing = TimeMixing(norm)
        self.feature_mixing = FeedForward(DIM, 40, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.feature_mixing(self.time_mixing(x))


class SharedNorm(nn.Module):
    """As in Keras' example: one LayerNorm, used twice."""

    names = ("normalize", "mlp1", "mlp2")

    def __init__(self) -> None:
        super().__init__()
        for name, module in zip(self.names, (nn.LayerNorm(DIM), *self.mlps()), strict=True):
            self.add_module(name, module)

    def mlps(self) -> tuple[nn.Module, nn.Module]:
        return FeedForward(SEQ, 14, 0.0), FeedForward(DIM, 40, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        norm, tokens, channels = (getattr(self, name) for name in self.names)
        x = x + tokens(norm(x).mT).mT
        return x + channels(norm(x))


class SharedLn(SharedNorm):
    names = ("ln", "tokens_mlp_block", "channels_mlp_block")


class SharedLayerNorm(SharedNorm):
    names = ("layer_norm", "token_mixing", "channel_mixing")


class GMlpBlock(nn.Module):
    """lucidrains' gMLP block."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in, self.sgu, self.proj_out = nn.Linear(DIM, 40), nn.Linear(SEQ, SEQ), nn.Linear(20, DIM)

    def forward(self, x: Tensor) -> Tensor:
        kept, gate = F.gelu(self.proj_in(x)).chunk(2, -1)
        return self.proj_out(kept * self.sgu(gate.mT).mT)


class SameNormTwice(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm2 = self.norm1


@pytest.mark.parametrize(
    "make, reason",
    [
        (NeuralforecastLayer, "is a TSMixer: one linear layer mixes the time steps, not an MLP"),
        (NeuralforecastLayer, "feature_mixer.feature_norm is BatchNorm1d, not torch.nn.LayerNorm"),
        (TSMixerLayer, "is a TSMixer: one linear layer mixes the time steps, not an MLP"),
        (lambda: TSMixerLayer(nn.BatchNorm1d), "time_mixing.norm is BatchNorm1d"),
        (SharedNorm, "one LayerNorm (normalize) serves both halves"),
        (SharedLn, "one LayerNorm (ln) serves both halves"),
        (SharedLayerNorm, "one LayerNorm (layer_norm) serves both halves"),
        (SameNormTwice, "one LayerNorm serves both halves"),
        (GMlpBlock, "is a gMLP: a spatial gating unit mixes the tokens"),
    ],
)
def test_relatives_are_listed_with_the_reason(make: Callable[[], nn.Module], reason: str) -> None:
    assert reason in declined(make())


# ---- PatchTSMixer ----------------------------------------------------------------------------------------

PATCHTSMIXER = [
    ({"gated_attn": True}, "is gated (gated_attn=True)"),
    ({"mode": "mix_channel"}, 'mixes the series too (mode="mix_channel")'),
    ({"self_attn": True}, "has self-attention (self_attn=True)"),
    ({"norm_mlp": "BatchNorm"}, 'normalises over the batch (norm_mlp="BatchNorm")'),
]


@pytest.mark.parametrize("make", [PatchTSMixerLayer, real_patchtsmixer], ids=["miniature", "transformers"])
@pytest.mark.parametrize("settings, reason", PATCHTSMIXER)
def test_patchtsmixer_with_more_than_two_mlps(make: Callable, settings: dict, reason: str) -> None:
    assert declined(make(**settings)).startswith(reason)


# ---- members of the families that are not what they seem -------------------------------------------------


def changed(make: Callable[[], nn.Module], path: str, new: Callable[[], nn.Module]) -> nn.Module:
    block = make()
    block.set_submodule(path, new())
    return block


def quantised() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.quantized import dynamic

        return dynamic.Linear(DIM, 48)


class PostNormResidual(PreNormResidual):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.fn(x)) + x


def no_rearrange(pattern: str) -> nn.Module:
    """Of the right name, but what counts is what it does."""
    return type("Rearrange", (nn.Module,), {"forward": lambda self, x: x + 0})()


class Square(SequentialBlock):
    """As many tokens as channels, so that a missing transpose goes unnoticed by the shapes."""

    def __init__(self, rearrange: Callable = Rearrange) -> None:
        super().__init__(rearrange=rearrange)
        self.token_mix[0], self.channel_mix[0] = nn.LayerNorm(SEQ), nn.LayerNorm(SEQ)
        self.channel_mix[1] = FeedForward(SEQ, 40, 0.0)


class NoResidual(MmpretrainBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.channel_mix(self.norm2(x))  # without identity=: the residual is the normalised input


class TanhGelu(PatchTSMixerLayer):
    def forward(self, x: Tensor) -> Tensor:
        for half in (self.patch_mixer, self.feature_mixer):
            mlp, normed = half.mlp, half.norm(x).transpose(half.axis, -1)
            x = x + mlp.fc2(F.gelu(mlp.fc1(normed), approximate="tanh")).transpose(half.axis, -1)
        return x


class MixesSeries(PatchTSMixerLayer):
    """Of one series alone it makes nothing; nor, by default, of one sample."""

    axis = 1

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x - x.mean(self.axis, keepdim=True)


class MixesSamples(MixesSeries):
    axis = 0


class CentresBatch(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x - x.mean(0)


def post_norm() -> nn.Module:
    block = lucidrains()
    return nn.Sequential(PostNormResidual(block[0].fn), PostNormResidual(block[1].fn))


WRONG = "its forward does not compute a Mixer block: relative difference"


@pytest.mark.parametrize(
    "make, reason",
    [
        (post_norm, WRONG),
        (lambda: nn.Sequential(*reversed(lucidrains())), "0.norm normalises (24,) but 1.fn takes 10"),
        (
            lambda: changed(lucidrains, "0.fn.0", lambda: nn.Conv1d(SEQ, 14, 3, padding=1)),
            "0.fn (Sequential): 0 has kernel_size=(3,); 0.fn (Sequential): 0 has padding=(1,)",
        ),
        (lambda: changed(lucidrains, "0.fn.0", lambda: nn.Conv1d(SEQ, 14, 1, groups=2)), "0 has groups=2"),
        (lambda: changed(lucidrains, "0.fn.3", lambda: nn.Conv1d(14, SEQ, 1, stride=2)), "3 has stride=(2,)"),
        (lambda: changed(lucidrains, "1.fn.1", nn.SiLU), "1.fn (Sequential): 1 is SiLU, not torch.nn.GELU"),
        (lambda: changed(lucidrains, "1.norm", lambda: nn.LayerNorm(DIM + 1)), "1.norm normalises (25,) but"),
        (
            lambda: changed(lucidrains, "1.fn.3", lambda: nn.Linear(41, DIM)),
            "1.fn (Sequential): 0 gives 40 features and 3 takes 41",
        ),
        (
            lambda: changed(lucidrains, "1.fn.4", lambda: nn.Dropout1d(0.1)),
            "4 is Dropout1d, not torch.nn.Dropout",
        ),
        (lambda: Square(no_rearrange), WRONG),
        (lambda: changed(SequentialBlock, "token_mix.1", lambda: nn.Flatten(0, 0)), "Mixer block lacks: 1"),
        (
            lambda: changed(SequentialBlock, "token_mix.0", lambda: nn.BatchNorm1d(SEQ)),
            "token_mix is not one LayerNorm, two linear layers and one GELU but BatchNorm1d, Rearrange",
        ),
        (NoResidual, WRONG),
        (
            lambda: changed(MmpretrainBlock, "channel_mix.gamma2", lambda: nn.Hardtanh()),
            "channel_mix (FFN): gamma2 is Hardtanh, not torch.nn.Identity",
        ),
        (
            lambda: changed(MmpretrainBlock, "token_mix.layers.1", lambda: nn.Sequential(nn.Linear(14, 14))),
            "token_mix.layers (Sequential): 1 is Sequential, not torch.nn.Linear",
        ),
        (TanhGelu, WRONG),
        (MixesSeries, WRONG),
        (MixesSamples, WRONG),
        (CentresBatch, WRONG),
        (
            lambda: changed(Plain, "mlp_channels.fc1", quantised),
            "fc1 is torch.ao.nn.quantized.dynamic.modules.linear.Linear, not torch.nn.Linear",
        ),
        (
            lambda: changed(Plain, "mlp_tokens.norm", lambda: nn.LayerNorm(12)),
            "mlp_tokens (Mlp): norm is LayerNorm, not torch.nn.Identity",
        ),
    ],
)
def test_members_that_are_not_what_they_seem(make: Callable[[], nn.Module], reason: str) -> None:
    assert reason in declined(make())


def test_the_square_block_with_its_transposes_is_fused() -> None:
    assert fastmixer.fuse(Square(), strict=True).rows[0].fused


@pytest.mark.parametrize("name", ["lucidrains", "sequential", "mmpretrain", "patchtsmixer"])
def test_a_parametrised_layer_is_declined(name: str) -> None:
    block = FAMILIES[name].block()
    nn.utils.parametrizations.weight_norm(block.get_submodule(FAMILIES[name].fc1))
    assert " is Parametrized" in declined(block)


@pytest.mark.parametrize("name", ["lucidrains", "sequential", "mmpretrain", "patchtsmixer"])
def test_a_weight_of_a_class_of_its_own_is_declined(name: str) -> None:
    class Quantised(nn.Parameter):
        pass

    block = FAMILIES[name].block()
    layer = block.get_submodule(FAMILIES[name].fc1)
    layer.weight = Quantised(layer.weight.data)
    assert "has a weight that is not a plain floating-point Parameter" in declined(block)


def test_two_sequential_modules_that_are_no_mixer_are_not_listed() -> None:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        nn.Sequential(PreNormResidual(nn.Linear(DIM, DIM)), PreNormResidual(nn.Linear(DIM, DIM))),
        nn.TransformerEncoderLayer(8, 2),
    )
    assert len(fastmixer.fuse(model)) == 0

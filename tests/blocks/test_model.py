"""MlpMixer and create_model: the paper's models, interchangeable with timm's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import fastmixer
from fastmixer.blocks.model import ALIASES, MODELS, MlpMixer, create_model

TINY = {"img_size": 16, "patch_size": 4, "num_blocks": 2, "embed_dim": 24, "num_classes": 5}


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


def timm_mixer(**kwargs) -> nn.Module:
    import timm.models.mlp_mixer as timm_mixer

    return timm_mixer.MlpMixer(**kwargs)


@pytest.mark.parametrize(
    "name, millions",
    [
        ("mixer_s32_224", 19),
        ("mixer_s16_224", 18),
        ("mixer_b32_224", 60),
        ("mixer_b16_224", 59),
        ("mixer_l32_224", 206),
        ("mixer_l16_224", 207),
        ("mixer_h14_224", 431),
    ],
)
def test_parameter_counts_are_the_papers(name: str, millions: int) -> None:
    model = create_model(name, num_classes=0, device="meta")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


@pytest.mark.parametrize("name", [name for name in MODELS if name != "mixer_h14_224"])
def test_models_have_timms_parameters(name: str) -> None:
    import timm

    theirs = timm.create_model(name, device="meta").state_dict()
    ours = create_model(name, device="meta").state_dict()
    assert [(key, value.shape) for key, value in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


def test_aliases_are_the_papers_names() -> None:
    assert set(ALIASES) == {"S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14"}
    for alias, name in ALIASES.items():
        assert (
            create_model(alias, device="meta", num_blocks=1).stem.proj.kernel_size[0]
            == MODELS[name].patch_size
        )


@pytest.mark.parametrize("num_classes", [5, 0])
def test_same_seed_gives_timms_weights_and_logits(num_classes: int) -> None:
    settings = {**TINY, "num_classes": num_classes}
    torch.manual_seed(11)
    theirs = timm_mixer(**settings)
    torch.manual_seed(11)
    ours = MlpMixer(**settings)
    assert torch.rand(1).item() != 0.0
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    for model in (ours, theirs):
        for parameter in model.head.parameters():
            torch.manual_seed(1)
            nn.init.normal_(parameter)
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("num_classes", [5, 0])
def test_checkpoints_load_strictly_both_ways(num_classes: int) -> None:
    settings = {**TINY, "num_classes": num_classes}
    ours, theirs = MlpMixer(**settings), timm_mixer(**settings)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_timms_model_takes_our_block() -> None:
    settings = {**TINY, "drop_path_rate": 0.2}
    torch.manual_seed(2)
    theirs = timm_mixer(**settings)
    torch.manual_seed(2)
    mixed = timm_mixer(block_layer=fastmixer.MixerBlock, **settings)
    for name, value in theirs.state_dict().items():
        assert torch.equal(mixed.state_dict()[name], value), name
    assert all(
        isinstance(block, fastmixer.MixerBlock) and block.why_not_fused() is None for block in mixed.blocks
    )
    images = torch.randn(2, 3, 16, 16)
    for model in (mixed, theirs):
        nn.init.eye_(model.head.weight)
    results = []
    for model in (mixed, theirs):
        torch.manual_seed(4)
        results.append(model(images))
    assert torch.equal(*results)


def test_training_options_match_timm() -> None:
    settings = {**TINY, "drop_rate": 0.2, "proj_drop_rate": 0.1, "drop_path_rate": 0.3}
    ours, theirs = MlpMixer(**settings), timm_mixer(**settings)
    nn.init.eye_(theirs.head.weight)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(4, 3, 16, 16)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(6)
        results.append(model(images))
    assert torch.equal(*results)


def test_features_and_head() -> None:
    model = MlpMixer(**TINY).eval()
    images = torch.randn(2, 3, 16, 16)
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 16, 24)
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens.mean(dim=1))
    assert torch.equal(model.forward_head(tokens), model(images))


def test_settings_that_are_given_count_over_the_models_own() -> None:
    model = create_model("S/32", img_size=32, patch_size=16, num_blocks=1, embed_dim=24, device="meta")
    assert (model.stem.num_patches, len(model.blocks), model.norm.normalized_shape) == (4, 1, (24,))


def test_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'mixer_b61_224'; did you mean 'mixer_b16_224'\?"):
        create_model("mixer_b61_224")
    with pytest.raises(ValueError, match="known are mixer_s32_224"):
        create_model("???")
    with pytest.raises(TypeError, match="name must be a string"):
        create_model(16)


def test_bad_sizes_are_named() -> None:
    with pytest.raises(ValueError, match="img_size must be a multiple of patch_size, got 18 and 4"):
        MlpMixer(**{**TINY, "img_size": 18})
    with pytest.raises(ValueError, match="num_classes and num_blocks must not be negative"):
        MlpMixer(**{**TINY, "num_classes": -1})
    with pytest.raises(ValueError, match="in_chans must be at least 1, got 0"):
        MlpMixer(**TINY, in_chans=0)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 16, 16\), got \(2, 3, 20, 16\)"):
        MlpMixer(**TINY)(torch.zeros(2, 3, 20, 16))

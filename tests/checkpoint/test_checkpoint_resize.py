"""Token MLPs for larger images: in every part of a mosaic, the features of the picture that stands there."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import timm.models.mlp_mixer as timm_mixer
import torch
from flax_arrays import make_arrays, make_model, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastmixer
from fastmixer import parity
from fastmixer.blocks.model import MlpMixer
from fastmixer.checkpoint import resize

SMALL = {"img_size": 12, "patch_size": 4, "num_blocks": 2, "embed_dim": 8, "num_classes": 3}
RATIOS = (0.75, 2.5)  # 6 and 20 hidden units


def make(kind: type[nn.Module] = MlpMixer, scale: int = 1, seed: int = 0, **kwargs: object) -> nn.Module:
    """A model for images ``scale`` times as large as SMALL's, all of its parameters random."""
    ratios = (RATIOS[0] * scale**2, RATIOS[1])
    sizes = {**SMALL, "img_size": SMALL["img_size"] * scale, "mlp_ratio": ratios, **kwargs}
    torch.manual_seed(seed)
    model = kind(**sizes).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


def save(model: nn.Module, path: Path) -> Path:
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(model.state_dict(), path)
    else:
        torch.save(model.state_dict(), path)
    return path


def mosaic(pictures: Tensor, scale: int) -> Tensor:
    """pictures (scale * scale, 3, H, W) -> one image (1, 3, scale * H, scale * W), row by row."""
    rows = [torch.cat(list(row), dim=2) for row in pictures.split(scale)]
    return torch.cat(rows, dim=1).unsqueeze(0)


def parts(tokens: Tensor, grid: tuple[int, int], scale: int) -> Tensor:
    """tokens (1, scale^2 S, C) of a mosaic, row by row -> (scale^2, S, C), those of each picture."""
    image = tokens.view(grid[0] * scale, grid[1] * scale, -1)
    pieces = [
        piece.reshape(grid[0] * grid[1], -1)
        for row in image.split(grid[0], dim=0)
        for piece in row.split(grid[1], dim=1)
    ]
    return torch.stack(pieces)


def compare_on_mosaic(
    small: nn.Module, large: nn.Module, scale: int, backend: str = "torch"
) -> parity.Parity:
    """The large model's features of a mosaic against the small one's of each picture, in fp64 the truth."""
    height, width = small.stem.grid_size
    patch = small.stem.proj.kernel_size[0]
    pictures = torch.randn(scale**2, 3, height * patch, width * patch)
    with torch.no_grad(), fastmixer.backend(backend):
        found = parts(large.forward_features(mosaic(pictures, scale)), (height, width), scale)
        eager = small.forward_features(pictures)
        truth = small.double().forward_features(pictures.double())
    small.float()
    return parity.compare(found, eager, truth)


def assert_refused(model: nn.Module, path: Path, message: str, **kwargs: str) -> str:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message) as caught:
        fastmixer.load_checkpoint(model, path, **kwargs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


# ---- what comes out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [2, 3])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_each_part_of_a_mosaic_has_its_pictures_features(tmp_path: Path, suffix: str, scale: int) -> None:
    small, large = make(), make(scale=scale, seed=1)
    path = save(small, tmp_path / f"small.{suffix}")
    report = fastmixer.load_checkpoint(large, path, resize="block_diagonal")
    result = compare_on_mosaic(small, large, scale)
    assert result.ok, result
    assert report.scale == scale
    assert f"block-diagonal for images {scale} times as high and wide" in str(report)


def test_from_googles_npz(tmp_path: Path) -> None:
    arrays = make_arrays()
    np.savez(tmp_path / "mixer.npz", **arrays)
    _, channel_ratio = settings(arrays)["mlp_ratio"]
    small, large = make_model(arrays), make_model(arrays, img_size=24, mlp_ratio=(24 / 8, channel_ratio))
    fastmixer.load_npz(small, tmp_path / "mixer.npz")
    report = fastmixer.load_npz(large, tmp_path / "mixer.npz", resize="block_diagonal")
    assert (report.scale, report.gelus, report.tensors) == (2, 4, len(arrays))
    result = compare_on_mosaic(small, large, 2)
    assert result.ok, result


def test_timms_model_with_oblong_images_fused(tmp_path: Path) -> None:
    """A grid of 2 x 3 patches: heights and widths are not mistaken for each other."""
    small = make(timm_mixer.MlpMixer, img_size=(8, 12))
    large = make(timm_mixer.MlpMixer, scale=2, seed=1, img_size=(16, 24))
    fastmixer.fuse(large, strict=True)
    fastmixer.load_checkpoint(large, save(small, tmp_path / "small.pth"), resize="block_diagonal")
    result = compare_on_mosaic(small, large, 2, backend="triton")
    assert result.ok, result


def test_a_picture_repeated_has_its_own_logits(tmp_path: Path) -> None:
    """Pooling over a mosaic of one picture is pooling over the picture."""
    small, large = make(), make(scale=2, seed=1)
    fastmixer.load_checkpoint(large, save(small, tmp_path / "small.pth"), resize="block_diagonal")
    pictures = torch.randn(5, 3, 12, 12)
    with torch.no_grad(), fastmixer.backend("torch"):
        found, eager = large(pictures.repeat(1, 1, 2, 2)), small(pictures)
        truth = small.double()(pictures.double())
    result = parity.compare(found, eager, truth)
    assert result.ok, result


@given(
    height=st.integers(1, 4),
    width=st.integers(1, 4),
    scale=st.integers(2, 3),
    hidden=st.integers(1, 5),
    seed=st.integers(0, 2**31),
)
@hypothesis_settings(max_examples=40, deadline=None, derandomize=True)
def test_each_layer_exactly(height: int, width: int, scale: int, hidden: int, seed: int) -> None:
    """In integers: each layer of the large MLP does to a mosaic what the small one does to its pictures."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randint(-9, 10, shape, generator=generator).double()

    tokens, cells = height * width, scale**2
    mlp = {
        "fc1.weight": random(hidden, tokens),
        "fc1.bias": random(hidden),
        "fc2.weight": random(tokens, hidden),
        "fc2.bias": random(tokens),
    }
    weights = {f"blocks.0.mlp_tokens.{name}": value for name, value in mlp.items()}
    expected = {
        "blocks.0.mlp_tokens.fc1.weight": random(cells * hidden, cells * tokens),
        "blocks.0.mlp_tokens.fc2.weight": random(cells * tokens, cells * hidden),
    }
    grid = (height * scale, width * scale)
    large, found_scale = resize.resized(weights, expected, grid, Path("file"))
    w1, b1, w2, b2 = (large[f"blocks.0.mlp_tokens.{name}"] for name in mlp)
    x = random(cells, tokens, 1)  # of each picture
    tiles = x.view(scale, scale, height, width, 1)
    whole = torch.cat([torch.cat(list(row), dim=1) for row in tiles], dim=0).view(1, -1, 1)
    hidden_found = (w1 @ whole[0, :, 0] + b1).view(cells, hidden)
    assert torch.equal(hidden_found, x[..., 0] @ mlp["fc1.weight"].T + mlp["fc1.bias"])
    out_found = w2 @ hidden_found.flatten() + b2
    out = hidden_found @ mlp["fc2.weight"].T + mlp["fc2.bias"]
    assert torch.equal(parts(out_found.view(1, -1, 1), (height, width), scale)[..., 0], out)
    assert found_scale == scale


def test_other_parameters_stay_as_they_are(tmp_path: Path) -> None:
    small, large = make(), make(scale=2, seed=1)
    fastmixer.load_checkpoint(large, save(small, tmp_path / "small.pth"), resize="block_diagonal")
    for name, value in small.state_dict().items():
        assert ("mlp_tokens" in name) != torch.equal(value, large.state_dict()[name]), name


def test_an_extra_state_stays_as_it_is(tmp_path: Path) -> None:
    """It need not be a tensor."""
    small, large = make(), make(scale=2, seed=1)
    for model in (small, large):
        mlp = model.blocks[0].mlp_tokens
        mlp.__class__ = type("Stateful", (type(mlp),), {"get_extra_state": lambda self: {"state": 1}})
        mlp.__class__.set_extra_state = lambda self, state: setattr(self, "state", state)
    fastmixer.load_checkpoint(large, save(small, tmp_path / "small.pth"), resize="block_diagonal")
    assert large.blocks[0].mlp_tokens.state == {"state": 1}


def test_where_the_sizes_agree_nothing_is_resized(tmp_path: Path) -> None:
    small, twin = make(), make(seed=1)
    report = fastmixer.load_checkpoint(twin, save(small, tmp_path / "small.pth"), resize="block_diagonal")
    assert report.scale == 1
    for name, value in small.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name


# ---- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [MlpMixer, timm_mixer.MlpMixer], ids=["fastmixer", "timm"])
def test_the_refusal_says_what_to_do_and_that_works(tmp_path: Path, kind: type[nn.Module]) -> None:
    small = make()
    path = save(small, tmp_path / "small.pth")
    unprepared = make(kind, img_size=24)
    message = assert_refused(unprepared, path, "small.pth does not fit the MlpMixer, which is unchanged")
    advice = (
        r"The file's token MLPs are for 9 patches, the model has 6 x 6, 2 times as many each way: create the "
        r"model with 24 hidden units per token MLP, mlp_ratio=\((.*), (.*)\), and load with "
        r"resize='block_diagonal'\."
    )
    ratios = tuple(map(float, re.search(advice, message).groups()))
    assert_refused(unprepared, path, f"small.pth cannot be resized: {advice}", resize="block_diagonal")
    prepared = make(kind, seed=1, img_size=24, mlp_ratio=ratios)
    message = assert_refused(prepared, path, "2 times as many each way: load with resize='block_diagonal'")
    assert "of another shape (8):\n  blocks.0.mlp_tokens.fc1.weight: (6, 9) in the file, (24, 36)" in message
    fastmixer.load_checkpoint(prepared, path, resize="block_diagonal")
    assert compare_on_mosaic(small, prepared, 2).ok


@pytest.mark.parametrize("img_size", [8, 16, 20, (24, 12), (12, 48)], ids=str)
def test_sizes_that_are_no_multiple(tmp_path: Path, img_size: object) -> None:
    """Smaller, not a multiple, and longer on one side only, with twice the patches and with four times."""
    path = save(make(), tmp_path / "small.pth")
    model = make(timm_mixer.MlpMixer, img_size=img_size)
    advice = "resize='block_diagonal' can only make them fit images an integer K times as high and wide"
    assert_refused(model, path, advice)
    assert_refused(model, path, f"cannot be resized: .*{advice}, of 9 K\\^2 patches", resize="block_diagonal")


def test_gated_token_mlps(tmp_path: Path) -> None:
    """Blocks of their hidden units are halves of two kinds."""
    from timm.layers import GluMlp

    gated = {"mlp_layer": GluMlp, "act_layer": nn.Sigmoid, "mlp_ratio": (1.0, 4.0)}
    path = save(make(timm_mixer.MlpMixer, **gated), tmp_path / "gated.pth")
    model = make(timm_mixer.MlpMixer, **{**gated, "img_size": 24, "mlp_ratio": (4.0, 4.0)})
    assert_refused(model, path, "the file holds no plain token MLPs", resize="block_diagonal")


def test_a_model_without_a_grid(tmp_path: Path) -> None:
    path = save(make(), tmp_path / "small.pth")
    assert_refused(make().blocks, path, "the model has no stem.grid_size", resize="block_diagonal")


@pytest.mark.parametrize(
    "name", ["blocks.1.mlp_tokens.fc1.bias", "blocks.1.mlp_tokens.fc2.weight", "norm.bias"]
)
@pytest.mark.parametrize("fault", ["missing", "of another shape"])
def test_other_faults_are_still_found(tmp_path: Path, name: str, fault: str) -> None:
    weights = make().state_dict()
    odd = weights.pop(name)
    if fault == "of another shape":
        weights[name] = torch.cat([odd, odd])
    torch.save(weights, tmp_path / "small.pth")
    message = assert_refused(make(scale=2), tmp_path / "small.pth", "does not fit", resize="block_diagonal")
    assert f"{fault} (1):\n  {name}" in message


@given(channels=st.integers(1, 200), units=st.integers(1, 3000))
@hypothesis_settings(max_examples=200, deadline=None, derandomize=True)
def test_the_advised_ratio_gives_the_hidden_units(channels: int, units: int) -> None:
    """Whatever is lost where the model multiplies it out and rounds down."""
    fc1 = {"blocks.0.mlp_channels.fc1.weight": torch.empty(7, channels)}
    ratios = re.fullmatch(r", mlp_ratio=\((.*), (.*)\)", resize._mlp_ratio(fc1, units)).groups()
    assert [int(float(ratio) * channels) for ratio in ratios] == [units, 7]

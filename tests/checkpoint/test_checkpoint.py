"""load_checkpoint: everything in the file fits and is loaded, or nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from fastmixer.blocks.model import MlpMixer
from fastmixer.checkpoint.load import load_checkpoint


def make_model(**kwargs) -> MlpMixer:
    settings = {"img_size": 8, "patch_size": 4, "num_blocks": 1, "embed_dim": 8, "num_classes": 3, **kwargs}
    return MlpMixer(**settings)


def assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pth", ".pt"])
def test_loads_what_torch_saved(tmp_path: Path, suffix: str, wrapper: str | None) -> None:
    source, target = make_model(), make_model()
    path = tmp_path / f"weights{suffix}"
    weights = source.state_dict()
    torch.save(weights if wrapper is None else {wrapper: weights, "epoch": 3}, path)
    load_checkpoint(target, str(path))
    assert_equal_weights(target, source)


def test_loads_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, target = make_model(), make_model()
    path = tmp_path / "weights.safetensors"
    save_file(source.state_dict(), path)
    load_checkpoint(target, path)
    assert_equal_weights(target, source)


def test_loads_timms_checkpoint_into_ours(tmp_path: Path) -> None:
    import timm.models.mlp_mixer as timm_mixer

    source = timm_mixer.MlpMixer(img_size=8, patch_size=4, num_blocks=1, embed_dim=8, num_classes=3)
    torch.save(source.state_dict(), tmp_path / "timm.pth")
    target = make_model()
    load_checkpoint(target, tmp_path / "timm.pth")
    assert_equal_weights(target, source)


def test_parameters_keep_their_dtype(tmp_path: Path) -> None:
    source, target = make_model(), make_model(dtype=torch.bfloat16)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    load_checkpoint(target, tmp_path / "weights.pth")
    assert_equal_weights(target, source.bfloat16())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty"])
def test_corrupt_file_is_named(tmp_path: Path, suffix: str, damage: str) -> None:
    from safetensors.torch import save_file

    path = tmp_path / f"weights{suffix}"
    model = make_model()
    (torch.save if suffix == ".pth" else save_file)(model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(
        {"garbage": b"not a checkpoint", "truncated": whole[: len(whole) // 2], "empty": b""}[damage]
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = rf"weights{suffix} is not a checkpoint: .*\(\w+ while reading \d+ bytes\)"
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_code_in_a_checkpoint_is_not_executed(tmp_path: Path) -> None:
    trace = tmp_path / "executed"
    torch.save({"state_dict": Malicious(trace)}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="evil.pth is not a checkpoint"):
        load_checkpoint(make_model(), tmp_path / "evil.pth")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.zeros(3), "holds a Tensor, not a dictionary"),
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "'epoch' is a int"),
        ({3: torch.zeros(1)}, "entry 3 is a Tensor"),
    ],
    ids=["tensor", "list", "number", "key"],
)
def test_other_content_is_named(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(make_model(), tmp_path / "odd.pth")


def test_mismatches_are_all_listed_and_nothing_is_loaded(tmp_path: Path) -> None:
    model = make_model()
    weights = {name: value.clone() + 1 for name, value in model.state_dict().items()}
    del weights["stem.proj.bias"]
    weights["extra.weight"] = torch.zeros(2)
    weights["head.weight"] = torch.zeros(7, 8)
    torch.save(weights, tmp_path / "weights.pth")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(model, tmp_path / "weights.pth")
    message = str(caught.value)
    assert "weights.pth does not fit the MlpMixer, which is unchanged" in message
    assert "missing (1):\n  stem.proj.bias" in message
    assert "unexpected (1):\n  extra.weight" in message
    assert "of another shape (1):\n  head.weight: (7, 8) in the file, (3, 8) in the model" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    torch.save({f"key{i}": torch.zeros(1) for i in range(30)}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"unexpected \(30\):(\n  key\d+){20}\n  \.\.\. and 10 more"):
        load_checkpoint(make_model(), tmp_path / "weights.pth")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing\.pth"):
        load_checkpoint(make_model(), tmp_path / "nothing.pth")

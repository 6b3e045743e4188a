"""Files as timm, Lightning, torchvision, Hugging Face and PyTorch write them: loaded, or the true reason."""

from __future__ import annotations

import argparse
import collections
import json
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import assert_equal_weights, make_model
from torch import nn

from fastmixer import load_checkpoint


class Subclass(torch.Tensor):
    """As torchao's quantised tensors."""


class Callback:
    """Stands for the objects of a trainer; making one would fail the test."""

    def __init__(self, *args: object) -> None:
        self.args = args

    def __setstate__(self, state: object) -> None:
        raise AssertionError("made from a file")


def prefixed(prefix: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def saved(tmp_path: Path, content: object, name: str = "weights.pth", **kwargs: object) -> Path:
    torch.save(content, tmp_path / name, **kwargs)
    return tmp_path / name


def refusal(path: Path, model: nn.Module | None = None, **kwargs: object) -> str:
    """The message of the ValueError that leaves the model as it was."""
    model = make_model() if model is None else model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(model, path, **kwargs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


# ---- what stands beside the weights ------------------------------------------------------------------------

BESIDE = {
    "timm's train script": ({"args": argparse.Namespace(model="B/16"), "epoch": 3}, "argparse.Namespace"),
    "a NumPy scalar": ({"metric": np.float64(81.5)}, "numpy.dtype"),
    "a NumPy array": ({"history": np.arange(3.0)}, "numpy.ndarray"),
    "a folder": ({"output": pathlib.PurePosixPath("/runs")}, "pathlib"),
    "Lightning's callbacks": ({"callbacks": {"ModelCheckpoint": Callback(1)}}, f"{__name__}.Callback"),
}  # fmt: skip


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", BESIDE)
def test_objects_beside_the_weights_are_neither_made_nor_in_the_way(
    tmp_path: Path, name: str, zipped: bool
) -> None:
    beside, unread = BESIDE[name]
    source, target = make_model(), make_model()
    path = saved(
        tmp_path, {"state_dict": source.state_dict(), **beside}, _use_new_zipfile_serialization=zipped
    )
    report = load_checkpoint(target, path)
    assert_equal_weights(target, source)
    assert any(found.startswith(unread) for found in report.unread) and unread in str(report)


def test_what_the_user_allowed_torch_is_still_allowed_afterwards(tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": make_model().state_dict(), "args": argparse.Namespace(lr=1)})
    with torch.serialization.safe_globals([argparse.Namespace]):
        assert load_checkpoint(make_model(), path).unread == ()
        assert torch.load(path, weights_only=True)["args"].lr == 1
    load_checkpoint(make_model(), path)
    with pytest.raises(Exception, match="argparse.Namespace"):
        torch.load(path, weights_only=True)


@pytest.mark.parametrize("content", ["whole", "under a key", "numpy", "defaultdict", "subclass"])
def test_what_is_no_state_dict_is_named(tmp_path: Path, content: str) -> None:
    path = saved(
        tmp_path,
        {
            "whole": make_model(),
            "under a key": {"model": make_model(), "epoch": 3},
            "numpy": {"head.weight": np.zeros(3)},
            "subclass": {"head.weight": torch.zeros(3).as_subclass(Subclass)},
            "defaultdict": collections.defaultdict(list, weights=torch.zeros(1)),
        }[content],
    )
    expected = {
        "whole": r"holds a pickled fastmixer.blocks.model.MlpMixer, a whole object",
        "under a key": r"'model' is a pickled fastmixer.blocks.model.MlpMixer",
        "subclass": f"it names {__name__}.Subclass",
        "numpy": "entry 'head.weight' is a pickled numpy",
        "defaultdict": "names builtins.list, collections.defaultdict, which are never used",
    }[content]
    assert expected in refusal(path)


# ---- which weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema_key, key", [("state_dict_ema", "state_dict"), ("model_ema", "model")])
def test_averaged_weights_are_taken_unless_declined_and_the_report_says_so(
    tmp_path: Path, ema_key: str, key: str
) -> None:
    plain, averaged, target = make_model(), make_model(), make_model()
    path = saved(tmp_path, {key: plain.state_dict(), ema_key: averaged.state_dict()})
    report = load_checkpoint(target, path)
    assert_equal_weights(target, averaged)
    assert report.wrapper == ema_key and f"({ema_key})" in str(report)
    assert load_checkpoint(target, path, use_ema=False).wrapper == key
    assert_equal_weights(target, plain)


def test_averaged_weights_alone_and_declined(tmp_path: Path) -> None:
    path = saved(tmp_path, {"epoch": 1, "state_dict_ema": make_model().state_dict()})
    assert "use_ema=True loads 'state_dict_ema'" in refusal(path, use_ema=False)


def test_weights_under_another_key_are_pointed_at(tmp_path: Path) -> None:
    path = saved(tmp_path, {"epoch": 1, "net": make_model().state_dict()})
    assert "weights are under 'net': save that dictionary alone" in refusal(path)


def test_the_key_of_pytorchs_tutorial(tmp_path: Path) -> None:
    source, target = make_model(), make_model()
    optimizer = torch.optim.AdamW(source.parameters())
    content = {"model_state_dict": source.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    assert load_checkpoint(target, saved(tmp_path, content)).wrapper == "model_state_dict"
    assert_equal_weights(target, source)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "student.backbone."]
)
def test_a_prefix_is_named_with_its_remedy_and_no_advice_on_heads(tmp_path: Path, prefix: str) -> None:
    source, target = make_model(), make_model(num_classes=3)
    path = saved(tmp_path, prefixed(prefix, source.state_dict()))
    message = refusal(path, target)
    assert f"begin with {prefix!r}: load it with strip_prefix={prefix!r}" in message
    assert "num_classes" not in message
    load_checkpoint(target, path, strip_prefix=prefix)
    assert_equal_weights(target, source)


def test_what_does_not_stand_under_the_prefix_is_left_and_counted(tmp_path: Path) -> None:
    """As n_averaged of torch's AveragedModel, and the loss that a LightningModule holds."""
    source, target = make_model(), make_model()
    averaged = torch.optim.swa_utils.AveragedModel(source)
    report = load_checkpoint(target, saved(tmp_path, averaged.state_dict()), strip_prefix="module.")
    assert_equal_weights(target, source)
    assert report.left == 1 and "1 entries do not stand under the prefix" in str(report)


@pytest.mark.parametrize("prefix, named", [("module.", "they begin with 'model.'"), (".", "'model.'")])
def test_a_prefix_that_no_name_has(tmp_path: Path, prefix: str, named: str) -> None:
    path = saved(tmp_path, prefixed("model.", make_model().state_dict()))
    message = refusal(path, strip_prefix=prefix)
    assert f"strip_prefix={prefix!r}: no name" in message and named in message
    with pytest.raises(TypeError, match="strip_prefix must be a string or None, got int"):
        load_checkpoint(make_model(), path, strip_prefix=3)


@pytest.mark.parametrize(
    "wrap, inner",
    [(nn.DataParallel, "model.module"), (torch.compile, "model._orig_mod"), (nn.Sequential, "model.0")],
)
def test_a_wrapped_model_takes_its_own_file_and_is_named_for_others(tmp_path: Path, wrap, inner: str) -> None:
    source, target = make_model(), wrap(make_model())
    path = saved(tmp_path, source.state_dict())
    message = refusal(path, target)
    assert message.endswith(f"load into {inner}.") and "num_classes" not in message
    own = wrap(source).state_dict()
    load_checkpoint(target, saved(tmp_path, own, "own.pth"))
    assert all(torch.equal(value, own[name]) for name, value in target.state_dict().items())


def test_a_wrapped_model_and_googles_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "mixer.npz", **{"head/bias": np.zeros(3, np.float32)})
    assert "load into model.module" in refusal(tmp_path / "mixer.npz", nn.DataParallel(make_model()))
    assert "has Flax's names, which need none" in refusal(tmp_path / "mixer.npz", strip_prefix="module.")


def test_advice_on_the_head_only_where_the_rest_fits(tmp_path: Path) -> None:
    weights = make_model(num_classes=7).state_dict()
    assert "num_classes=7" in refusal(saved(tmp_path, weights))
    del weights["stem.proj.bias"]
    assert "num_classes" not in refusal(saved(tmp_path, weights))


# ---- other kinds of files ----------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_programs_are_named(tmp_path: Path) -> None:
    linear = nn.Linear(2, 2)
    torch.jit.save(torch.jit.trace(linear, torch.zeros(1, 2)), tmp_path / "jit.pt")
    torch.export.save(torch.export.export(linear, (torch.zeros(1, 2),)), tmp_path / "exported.pt2")
    assert "it is a TorchScript program, which torch.jit.save wrote" in refusal(tmp_path / "jit.pt", linear)
    assert "it is a program that torch.export.save wrote" in refusal(tmp_path / "exported.pt2", linear)


FOREIGN = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html></html>", "a web page: the download failed"),
    "keras": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz"])
@pytest.mark.parametrize("name", FOREIGN)
def test_files_that_are_often_taken_for_a_checkpoint(tmp_path: Path, name: str, suffix: str) -> None:
    content, named = FOREIGN[name]
    (tmp_path / f"weights{suffix}").write_bytes(content)
    assert named in refusal(tmp_path / f"weights{suffix}")


def test_an_index_and_a_shard_of_hugging_face(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    shards = {f"layer{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    message = refusal(index)
    assert "the index of a sharded checkpoint" in message and shards["layer1"] in message
    assert message.endswith("put the dictionaries of these files into one, and save that")
    weights = make_model().state_dict()
    del weights["head.weight"]
    save_file(weights, tmp_path / shards["layer1"])
    assert "is one of several files of a sharded checkpoint" in refusal(tmp_path / shards["layer1"])


def test_a_folder_of_distributed_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".metadata").touch()
    with pytest.raises(IsADirectoryError, match="written by torch.distributed.checkpoint"):
        load_checkpoint(make_model(), tmp_path)


@pytest.mark.parametrize("name", ["weights.bin", "weights.safetensors", "weights.npz"])
@pytest.mark.parametrize("writer", ["torch", "safetensors"])
def test_the_content_decides_and_not_the_name(tmp_path: Path, name: str, writer: str) -> None:
    """Under .safetensors a file of torch's is the well-known "HeaderTooLarge"."""
    from safetensors.torch import save_file

    source, target = make_model(), make_model()
    (torch.save if writer == "torch" else save_file)(source.state_dict(), tmp_path / name)
    load_checkpoint(target, tmp_path / name)
    assert_equal_weights(target, source)


@pytest.mark.parametrize("module", ["os", "builtins"])
def test_a_call_in_a_file_is_never_made(tmp_path: Path, module: str) -> None:
    trace = tmp_path / "executed"
    call = {"os": b"cposix\nsystem\n", "builtins": b"cbuiltins\nexec\n"}[module]
    code = {"os": f"touch {trace}", "builtins": f"open({str(trace)!r}, 'w')"}[module].encode()
    pickled = b"\x80\x02" + call + b"X" + len(code).to_bytes(4, "little") + code + b"\x85R."
    path = tmp_path / "evil.pth"
    writer = torch._C.PyTorchFileWriter(str(path))
    for member, data in {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}.items():
        if member != "version":
            writer.write_record(member, data, len(data))
    writer.write_end_of_file()
    assert call.decode().strip()[1:].replace("\n", ".") in refusal(path)
    assert not trace.exists()

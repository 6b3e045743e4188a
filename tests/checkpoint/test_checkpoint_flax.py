"""Google's .npz files: the loaded model computes Flax's function, and what is no such file is refused."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm.models.mlp_mixer as timm_mixer
import torch
from flax_arrays import (
    Arrays,
    against_flax,
    forward,
    logits,
    make_arrays,
    make_model,
    random_images,
    save,
    settings,
)
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import fastmixer
from fastmixer import parity


def state_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What a refused load must leave as it is: the weights and the GELUs."""
    gelus = [module.approximate for module in model.modules() if isinstance(module, nn.GELU)]
    return {name: value.clone() for name, value in model.state_dict().items()}, gelus


def assert_refused(model: nn.Module, path: Path, message: str, **kwargs: str) -> str:
    """Loading raises a ValueError with this message, a regular expression, and changes nothing."""
    weights, gelus = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        fastmixer.load_npz(model, path, **kwargs)
    weights_after, gelus_after = state_of(model)
    assert gelus_after == gelus
    assert all(torch.equal(value, weights[name]) for name, value in weights_after.items())
    return str(caught.value)


# ---- the function ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loaded_model_computes_flaxs_function(tmp_path: Path, backend: str) -> None:
    arrays = make_arrays()
    model, images = make_model(arrays), random_images(arrays)
    report = fastmixer.load_npz(model, save(tmp_path / "mixer.npz", arrays))
    result = against_flax(model, arrays, images, backend=backend)
    assert result.ok, result
    assert report.flax and report.tensors == len(arrays) and report.gelus == 4
    assert str(report) == (
        f"{len(arrays)} tensors from {tmp_path / 'mixer.npz'} (Flax's names); "
        "4 GELUs set to approximate='tanh'"
    )


@pytest.mark.parametrize("fused", ["no", "before", "after"])
def test_timms_model_computes_flaxs_function(tmp_path: Path, fused: str) -> None:
    arrays = make_arrays()
    model, images = timm_mixer.MlpMixer(**settings(arrays)).eval(), random_images(arrays)
    if fused == "before":
        fastmixer.fuse(model, strict=True)
        logits(model, images, "triton")  # with the weights and the GELU from before
    fastmixer.load_npz(model, save(tmp_path / "mixer.npz", arrays))
    if fused == "after":
        fastmixer.fuse(model, strict=True)
    result = against_flax(model, arrays, images, backend="torch" if fused == "no" else "triton")
    assert result.ok, result
    assert fastmixer.unfuse(model) == (0 if fused == "no" else 2)


def test_the_exact_gelu_is_another_function_and_can_be_kept(tmp_path: Path) -> None:
    """As timm has it with the same weights: outside the bounds, so the choice above is seen to matter."""
    arrays = make_arrays()
    model, images = make_model(arrays), random_images(arrays)
    path = save(tmp_path / "mixer.npz", arrays)
    assert fastmixer.load_npz(model, path, gelu="keep").gelus == 0
    assert not against_flax(model, arrays, images).ok
    torch.save(model.state_dict(), tmp_path / "mixer.pth")
    assert fastmixer.load_npz(model, tmp_path / "mixer.pth").gelus == 0
    assert not against_flax(model, arrays, images).ok
    assert fastmixer.load_checkpoint(model, tmp_path / "mixer.pth", gelu="tanh").gelus == 4
    assert against_flax(model, arrays, images).ok
    assert fastmixer.load_npz(model, path).gelus == 0  # nothing left to set


@given(
    seed=st.integers(0, 2**32 - 1),
    side=st.integers(1, 4),
    sizes=st.fixed_dictionaries(
        {
            "patch": st.integers(1, 5),
            "channels": st.integers(2, 9),
            "token_hidden": st.integers(1, 9),
            "channel_hidden": st.integers(1, 9),
            "blocks": st.integers(1, 3),
            "classes": st.integers(0, 4),
        }
    ),
)
@hypothesis_settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_models_of_every_shape(tmp_path: Path, seed: int, side: int, sizes: dict[str, int]) -> None:
    """In fp64, as LayerNorm of two channels magnifies rounding; the yardstick is fp32's precision."""
    arrays = make_arrays(seed, tokens=side**2, **sizes)
    model, images = make_model(arrays, dtype=torch.float64), random_images(arrays)
    fastmixer.load_npz(model, save(tmp_path / "mixer.npz", arrays))
    truth = torch.from_numpy(forward(arrays, images))
    result = parity.compare(logits(model, images).float(), truth.float(), truth)
    assert result.ok, result


# ---- the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load", [fastmixer.load_npz, fastmixer.load_checkpoint])
@pytest.mark.parametrize("name", ["mixer.npz", "mixer.ckpt", "mixer"])
def test_an_npz_is_known_by_its_content_too(tmp_path: Path, name: str, load: Callable) -> None:
    arrays = make_arrays()
    save(tmp_path / "any.npz", arrays).rename(tmp_path / name)
    model = make_model(arrays)
    assert load(model, str(tmp_path / name)).flax
    assert against_flax(model, arrays, random_images(arrays)).ok


@pytest.mark.parametrize("prefix", ["opt/target/", "params/"])
def test_a_training_states_weights_are_found(tmp_path: Path, prefix: str) -> None:
    arrays = make_arrays()
    stored = {f"{prefix}{name}": array for name, array in arrays.items()}
    stored |= {"opt/state/step": np.array(7), "opt/state/param_states/stem/kernel/grad_ema": np.zeros(3)}
    model = make_model(arrays)
    assert fastmixer.load_npz(model, save(tmp_path / "state.npz", stored)).tensors == len(arrays)
    assert against_flax(model, arrays, random_images(arrays)).ok


def as_bfloat16(array: np.ndarray) -> np.ndarray:
    """As NumPy stores what JAX gives it: two bytes of no known type."""
    return torch.from_numpy(array).bfloat16().view(torch.int16).numpy().view("V2")


@pytest.mark.parametrize(
    "convert",
    [
        lambda array: array.astype(np.float64),
        lambda array: array.astype(np.float16),
        lambda array: array.astype(">f4"),
        np.asfortranarray,
        as_bfloat16,
    ],
    ids=["float64", "float16", "big endian", "fortran", "bfloat16"],
)
def test_ways_to_store_numbers(tmp_path: Path, convert: Callable[[np.ndarray], np.ndarray]) -> None:
    """Numbers that every one of these types has, so nothing is rounded."""
    arrays = {
        name: torch.from_numpy(array).bfloat16().half().float().numpy()
        for name, array in make_arrays().items()
    }
    arrays = {name: np.where(abs(array) < 2.0**-14, 0, array) for name, array in arrays.items()}
    expected, model = make_model(arrays), make_model(arrays)
    fastmixer.load_npz(expected, save(tmp_path / "plain.npz", arrays))
    stored = {name: convert(array) for name, array in arrays.items()}
    fastmixer.load_npz(model, save(tmp_path / "stored.npz", stored))
    for name, value in expected.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert against_flax(model, arrays, random_images(arrays)).ok


def test_parameters_keep_their_dtype(tmp_path: Path) -> None:
    arrays = make_arrays()
    model = make_model(arrays, dtype=torch.bfloat16)
    fastmixer.load_npz(model, save(tmp_path / "mixer.npz", arrays))
    kernel = torch.from_numpy(arrays["head/kernel"])
    assert torch.equal(model.head.weight, kernel.T.bfloat16())


class Malicious:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_python_objects_are_never_unpickled(tmp_path: Path) -> None:
    arrays, trace = make_arrays(), tmp_path / "executed"
    arrays["extra"] = np.array([Malicious(trace)], dtype=object)
    message = "entry 'extra' is no array of numbers; pickled objects are never loaded"
    assert_refused(make_model(arrays), save(tmp_path / "evil.npz", arrays), message)
    assert not trace.exists()


@pytest.mark.parametrize("damage", ["garbage", "truncated", "empty", "npy", "flipped"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    arrays = make_arrays()
    path = save(tmp_path / "mixer.npz", arrays)
    whole = path.read_bytes()
    middle = whole.index(b"NUMPY") + 200
    np.save(tmp_path / "one.npy", arrays["head/bias"])
    path.write_bytes(
        {
            "garbage": b"not a checkpoint",
            "truncated": whole[: len(whole) // 2],
            "empty": b"",
            "npy": (tmp_path / "one.npy").read_bytes(),
            "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        }[damage]
    )
    message = r"mixer.npz is not a checkpoint: no \.npz archive of arrays \(\w+ while reading \d+ bytes\)"
    assert_refused(make_model(arrays), path, message)


@pytest.mark.parametrize("dtype", ["int32", "bool", "complex64", "U4", "V1", "V4"])
def test_numbers_of_another_kind_are_named(tmp_path: Path, dtype: str) -> None:
    arrays = make_arrays()
    arrays["head/bias"] = np.zeros(3, dtype)
    message = "entry 'head/bias' has the dtype .*, not one of floating-point weights"
    assert_refused(make_model(arrays), save(tmp_path / "mixer.npz", arrays), message)


def test_an_entry_that_is_no_array_is_named(tmp_path: Path) -> None:
    arrays = make_arrays()
    path = save(tmp_path / "mixer.npz", arrays)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("README.txt", "hello")
    assert_refused(make_model(arrays), path, "entry 'README.txt' is no array of numbers")


def raw_parameters(arrays: Arrays, first: int, second: int) -> Arrays:
    """As in an early version of Google's code: token MLPs of raw parameters, told apart by a number."""
    renamed = {}
    for name, array in arrays.items():
        for layer, number in (("Dense_0", first), ("Dense_1", second)):
            name = name.replace(f"/token_mixing/{layer}/kernel", f"/kernel{number}")
            name = name.replace(f"/token_mixing/{layer}/bias", f"/bias{number}")
        renamed[name] = array
    return renamed


@pytest.mark.parametrize("numbers", [(9, 6), (0, 1)])
def test_old_files_of_raw_parameters_are_refused(tmp_path: Path, numbers: tuple[int, int]) -> None:
    arrays = make_arrays()
    path = save(tmp_path / "old.npz", raw_parameters(arrays, *numbers), prefix="opt/target/")
    message = assert_refused(make_model(arrays), path, "not in the format of the published checkpoints")
    assert "its token MLPs are raw parameters of the block" in message
    assert f"entry 'MixerBlock_0/kernel{numbers[0]}'" in message
    assert "'MixerBlock_0/token_mixing/Dense_0/kernel'" in message


def test_names_from_before_flax_linen_are_refused(tmp_path: Path) -> None:
    arrays = {name.replace("LayerNorm_1", "LayerNorm_2"): array for name, array in make_arrays().items()}
    path = save(tmp_path / "old.npz", arrays)
    assert_refused(make_model(arrays), path, "its layers are counted as before flax.linen")


def test_arrays_without_names_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "list.npz", *make_arrays().values())
    assert_refused(make_model(make_arrays()), tmp_path / "list.npz", "its arrays are numbered, not named")


@pytest.mark.parametrize("names", [["Transformer/encoder_norm/scale", "embedding/kernel"], []])
def test_another_models_file_is_refused(tmp_path: Path, names: list[str]) -> None:
    path = save(tmp_path / "vit.npz", dict.fromkeys(names, np.zeros(3)))
    found = ", ".join(names) or "nothing"
    assert_refused(make_model(make_arrays()), path, f"by the names of Flax's Mixer, but {found}$")


def test_pytorchs_names_in_an_npz_are_not_taken_for_flaxs(tmp_path: Path) -> None:
    arrays = make_arrays()
    model = make_model(arrays)
    weight = arrays.pop("head/kernel").T
    message = assert_refused(
        model, save(tmp_path / "mixer.npz", arrays | {"head.weight": weight}), "does not fit"
    )
    assert "missing (1):\n  head.weight (head/kernel)\n" in message
    assert "unexpected (1):\n  head.weight (in the file)" in message


# ---- the model -------------------------------------------------------------------------------------------


def test_mismatches_are_all_listed_by_both_names(tmp_path: Path) -> None:
    arrays = make_arrays()
    model = make_model(arrays)
    del arrays["stem/bias"], arrays["MixerBlock_1/LayerNorm_1/scale"]
    arrays["MixerBlock_2/LayerNorm_0/scale"] = np.zeros(8, np.float32)
    arrays["MixerBlock_0/channel_mixing/Dense_1/kernel"] = np.zeros((21, 8), np.float32)
    message = assert_refused(model, save(tmp_path / "mixer.npz", arrays), "does not fit the MlpMixer")
    assert "missing (2):\n  stem.proj.bias (stem/bias)\n  blocks.1.norm2.weight (MixerBlock_1/" in message
    assert "unexpected (1):\n  MixerBlock_2/LayerNorm_0/scale (in the file)" in message
    assert (
        "of another shape (1):\n  blocks.0.mlp_channels.fc2.weight "
        "(MixerBlock_0/channel_mixing/Dense_1/kernel): (8, 21) in the file, (8, 20) in the model"
    ) in message


@pytest.mark.parametrize("classes, asked", [(5, 3), (5, 0), (0, 3)])
def test_another_head_is_refused_with_what_to_do(tmp_path: Path, classes: int, asked: int) -> None:
    arrays = make_arrays(classes=classes)
    path = save(tmp_path / "mixer.npz", arrays)
    message = assert_refused(make_model(arrays, num_classes=asked), path, "does not fit")
    assert "head.weight (head/kernel)" in message
    assert f"The head in the file has {classes} classes, the model's has {asked}" in message
    advised = int(re.search(r"create the model with num_classes=(\d+)", message)[1])
    model = make_model(arrays, num_classes=advised)
    fastmixer.load_npz(model, path)
    assert against_flax(model, arrays, random_images(arrays)).ok


def test_another_eps_is_refused_unless_kept(tmp_path: Path) -> None:
    arrays = make_arrays()
    path = save(tmp_path / "mixer.npz", arrays)
    model = make_model(arrays, norm_layer=nn.LayerNorm)
    assert_refused(model, path, r"LayerNorms with eps=1e-06, and 5 .* \(blocks.0.norm1 1e-05\).*gelu='keep'")
    fastmixer.load_npz(model, path, gelu="keep")
    assert torch.equal(model.head.bias, torch.from_numpy(arrays["head/bias"]))


@pytest.mark.parametrize("suffix, gelu", [("npz", "auto"), ("npz", "tanh"), ("pth", "tanh")])
def test_another_activation_is_refused_unless_kept(tmp_path: Path, suffix: str, gelu: str) -> None:
    arrays = make_arrays()
    model = make_model(arrays, act_layer=nn.ReLU)
    save(tmp_path / "mixer.npz", arrays)
    torch.save(make_model(arrays).state_dict(), tmp_path / "mixer.pth")
    path = tmp_path / f"mixer.{suffix}"
    assert_refused(model, path, "blocks.0.mlp_tokens.act is a ReLU, not a torch.nn.GELU", gelu=gelu)
    fastmixer.load_npz(model, path, gelu="keep")
    assert torch.equal(model.head.bias == 0, torch.full((3,), suffix == "pth"))


@pytest.mark.parametrize("argument", ["gelu", "resize"])
def test_unknown_settings_are_named(tmp_path: Path, argument: str) -> None:
    arrays = make_arrays()
    message = f"{argument} must be one of .*, got 'erf'"
    assert_refused(make_model(arrays), save(tmp_path / "a.npz", arrays), message, **{argument: "erf"})


def test_a_gelu_that_is_tanh_already_stays_so(tmp_path: Path) -> None:
    arrays = make_arrays()
    model = make_model(arrays, act_layer=partial(nn.GELU, approximate="tanh"))
    assert fastmixer.load_npz(model, save(tmp_path / "mixer.npz", arrays), gelu="keep").gelus == 0
    assert against_flax(model, arrays, random_images(arrays)).ok

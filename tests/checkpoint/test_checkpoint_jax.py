"""Against flax.linen itself: the files it would write, and its own forward. Needs the extra ``jax``.

``flax_arrays`` says in NumPy what Flax computes; here Flax says it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from flax_arrays import (
    Arrays,
    against_flax,
    exact_gelu,
    forward,
    logits,
    make_arrays,
    make_model,
    random_images,
    save,
)

import fastmixer
from benchmarks import flax_mixer
from benchmarks.levels import Case, Shape
from fastmixer import parity

jax = pytest.importorskip("jax", reason="needs jax and flax: the extra jax")
linen = pytest.importorskip("flax.linen", reason="needs flax: the extra jax")
traverse_util = pytest.importorskip("flax.traverse_util", reason="needs flax: the extra jax")

flax_mixer.platform()  # before JAX looks for a GPU and takes most of its memory

# Names in benchmarks/flax_mixer.py, where Flax numbers the layers, and in Google's files.
RENAMED_AROUND = {"Conv_0/": "stem/", "LayerNorm_0/": "pre_head_layer_norm/", "Dense_0/": "head/"}
RENAMED_IN_BLOCKS = {"Block_": "MixerBlock_", "Mlp_0/": "token_mixing/", "Mlp_1/": "channel_mixing/"}


class Mlp(linen.Module):
    """Google's: a Dense, GELU and a Dense, with Flax's defaults throughout."""

    hidden: int
    param_dtype: object

    @linen.compact
    def __call__(self, x):
        hidden = linen.gelu(linen.Dense(self.hidden, param_dtype=self.param_dtype)(x))
        return linen.Dense(x.shape[-1], param_dtype=self.param_dtype)(hidden)


class MixerBlock(linen.Module):
    token_hidden: int
    channel_hidden: int
    param_dtype: object

    @linen.compact
    def __call__(self, x):
        tokens_last = linen.LayerNorm(param_dtype=self.param_dtype)(x).swapaxes(1, 2)
        x += Mlp(self.token_hidden, self.param_dtype, name="token_mixing")(tokens_last).swapaxes(1, 2)
        normed = linen.LayerNorm(param_dtype=self.param_dtype)(x)
        return x + Mlp(self.channel_hidden, self.param_dtype, name="channel_mixing")(normed)


class Mixer(linen.Module):
    """The published architecture, with the names that its checkpoints have."""

    patch: int
    channels: int
    blocks: int
    token_hidden: int
    channel_hidden: int
    classes: int
    param_dtype: object = np.float32

    @linen.compact
    def __call__(self, images):
        window = (self.patch, self.patch)
        stem = linen.Conv(self.channels, window, window, param_dtype=self.param_dtype, name="stem")
        x = stem(images)
        x = x.reshape(len(x), -1, self.channels)
        for _ in range(self.blocks):
            x = MixerBlock(self.token_hidden, self.channel_hidden, self.param_dtype)(x)
        x = linen.LayerNorm(param_dtype=self.param_dtype, name="pre_head_layer_norm")(x).mean(axis=1)
        return linen.Dense(self.classes, param_dtype=self.param_dtype, name="head")(x)


MIXER = Mixer(patch=4, channels=8, blocks=2, token_hidden=6, channel_hidden=20, classes=3)


def fresh(module: linen.Module, images: np.ndarray) -> Arrays:
    """Random parameters by the names, and of the shapes and dtypes, that Flax gives a module's."""
    generator = np.random.default_rng(0)
    tree = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    return {
        name: (name.endswith("scale") + 0.3 * generator.normal(size=kind.shape)).astype(kind.dtype)
        for name, kind in traverse_util.flatten_dict(tree, sep="/").items()
    }


def run(module: linen.Module, arrays: Arrays, images: np.ndarray) -> np.ndarray:
    """Flax's own forward, products in full float32 on every device."""
    with jax.default_matmul_precision("highest"):
        tree = traverse_util.unflatten_dict(arrays, sep="/")
        return np.array(jax.jit(module.apply)({"params": tree}, images))


def googles_name(name: str) -> str:
    """The published name of a parameter of benchmarks/flax_mixer.py."""
    for prefix, published in RENAMED_AROUND.items():
        if name.startswith(prefix):
            return name.replace(prefix, published, 1)
    for part, published in RENAMED_IN_BLOCKS.items():
        name = name.replace(part, published)
    return name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_loaded_model_is_as_close_to_the_truth_as_flax(tmp_path: Path, backend: str) -> None:
    arrays = make_arrays()
    images, model = random_images(arrays), make_model(arrays)
    fastmixer.load_npz(model, save(tmp_path / "mixer.npz", arrays))
    result = against_flax(model, arrays, images, run(MIXER, arrays, images), backend=backend)
    assert result.ok, result


def test_flax_computes_what_numpy_says(tmp_path: Path) -> None:
    """So the NumPy forward of the other tests is Flax's."""
    arrays = make_arrays()
    images = random_images(arrays)
    found, single = run(MIXER, arrays, images), forward(arrays, images, np.float32)
    truth = forward(arrays, images)
    result = parity.compare(*(torch.from_numpy(logits) for logits in (found, single, truth)))
    assert result.ok, result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_files_that_flax_writes(tmp_path: Path, dtype: str) -> None:
    """Names, shapes and types from Flax; NumPy has no bfloat16."""
    example = random_images(make_arrays())
    module = MIXER.clone(param_dtype=jax.numpy.dtype(dtype))
    arrays = fresh(module, example)
    path = save(tmp_path / "mixer.npz", arrays)
    assert {array.dtype.str for array in np.load(path).values()} == {"<f4" if dtype == "float32" else "|V2"}
    exact = {name: array.astype(np.float32) for name, array in arrays.items()}
    model = make_model(exact)
    assert fastmixer.load_npz(model, path).tensors == len(arrays)
    result = against_flax(model, exact, example, run(MIXER, exact, example))
    assert result.ok, result


def test_the_benchmarks_flax_mixer(tmp_path: Path) -> None:
    """It has the exact GELU, as timm's has, and other names."""
    shape = Shape(tokens=9, channels=8, token_hidden=6, channel_hidden=20, blocks=2, patch=4)
    module = flax_mixer.make_module(Case("model", "small", 2, "float32", "forward", shape))
    images = random_images(make_arrays())
    arrays = fresh(module, images)
    published = {googles_name(name): array for name, array in arrays.items()}
    model = make_model(published)
    fastmixer.load_npz(model, save(tmp_path / "mixer.npz", published), gelu="keep")
    truth = forward(published, images, gelu=exact_gelu)
    found = run(module, arrays, images)
    result = parity.compare(logits(model, images), torch.from_numpy(found), torch.from_numpy(truth))
    assert result.ok, result

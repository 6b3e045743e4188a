"""MLP-Mixer in flax.linen, as an opponent: the paper's block and model, jitted, forward only.

JAX's work is not on PyTorch's stream, so a call waits until its result is ready and is timed by the clock on
the wall: at small batches that includes what it costs the host to launch it.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from . import measure
from .levels import CLASSES, Case


def platform() -> str:
    """Where jax runs things: "cpu", "gpu" ..."""
    # Before jax looks for devices: it would take most of the GPU's memory at once.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax

    return jax.default_backend()


def make_call(case: Case, example: Any) -> measure.Call:
    """A function that runs the case's block or model on its own copy of ``example``, and waits for the end.

    example: (B, S, C), or images (B, 3, H, W) for a model. Whatever a call is given, it computes on this.
    """
    platform()
    import jax
    import jax.numpy as jnp

    module = make_module(case)
    x = jnp.asarray(example.float().cpu().numpy())
    if case.level == "model":
        x = x.transpose(0, 2, 3, 1)  # flax has channels last
    x = x.astype(_name(case.x_dtype))
    parameters = jax.jit(module.init)(jax.random.PRNGKey(0), x)
    forward = jax.jit(module.apply)

    def call(_: measure.Item) -> Any:
        return jax.block_until_ready(forward(parameters, x))

    return call


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_module(case: Case) -> Any:
    """flax's module of one block, or at level model of a whole model, for images with channels last."""
    from flax import linen as nn

    shape, window = case.shape, (case.shape.patch, case.shape.patch)
    dtypes = {"dtype": _name(case.product_dtype), "param_dtype": _name(case.x_dtype)}

    class Mlp(nn.Module):
        hidden: int

        @nn.compact
        def __call__(self, x):
            width = x.shape[-1]
            x = nn.Dense(self.hidden, **dtypes)(x)
            return nn.Dense(width, **dtypes)(nn.gelu(x, approximate=False))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.LayerNorm(**dtypes)(x).swapaxes(1, 2)
            x = x + Mlp(shape.token_hidden)(y).swapaxes(1, 2)
            return x + Mlp(shape.channel_hidden)(nn.LayerNorm(**dtypes)(x))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(shape.channels, window, strides=window, **dtypes)(images)
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            for _ in range(shape.blocks):
                x = Block()(x)
            return nn.Dense(CLASSES, **dtypes)(nn.LayerNorm(**dtypes)(x).mean(axis=1))

    return Model() if case.level == "model" else Block()

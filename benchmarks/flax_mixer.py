"""MLP-Mixer in flax.linen, as an opponent: the paper's block and model, jitted, forward only.

JAX's work is not on PyTorch's stream, so a call waits until its result is ready and is timed by the clock on
the wall: at small batches that includes what it costs the host to launch it.
"""

from __future__ import annotations

import os
from typing import Any

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

    module = _model(case) if case.level == "model" else _block(case)
    x = jnp.asarray(example.float().cpu().numpy())
    if case.level == "model":
        x = x.transpose(0, 2, 3, 1)  # flax has channels last
    x = x.astype(case.x_dtype.__str__().removeprefix("torch."))
    parameters = jax.jit(module.init)(jax.random.PRNGKey(0), x)
    forward = jax.jit(module.apply)

    def call(_: measure.Item) -> Any:
        return jax.block_until_ready(forward(parameters, x))

    return call


def _dtypes(case: Case) -> dict[str, str]:
    """flax's dtypes, of the products and of the parameters."""
    of_products, of_parameters = (
        str(dtype).removeprefix("torch.") for dtype in (case.product_dtype, case.x_dtype)
    )
    return {"dtype": of_products, "param_dtype": of_parameters}


def _block(case: Case) -> Any:
    """flax's module of one block."""
    from flax import linen as nn

    dtypes, shape = _dtypes(case), case.shape

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

    return Block()


def _model(case: Case) -> Any:
    """flax's module of a whole model, for images with channels last."""
    from flax import linen as nn

    dtypes, shape = _dtypes(case), case.shape
    window = (shape.patch, shape.patch)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, images):
            x = nn.Conv(shape.channels, window, strides=window, **dtypes)(images)
            x = x.reshape(x.shape[0], -1, x.shape[-1])
            for _ in range(shape.blocks):
                x = _block(case)(x)
            return nn.Dense(CLASSES, **dtypes)(nn.LayerNorm(**dtypes)(x).mean(axis=1))

    return Model()

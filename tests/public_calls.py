"""The public functions by name, and small inputs for them."""

from __future__ import annotations

import torch
from support import Case, block_inputs
from torch import Tensor

from fastmixer import functional
from fastmixer.params import MixingParams

SMALL = Case(B=2, S=5, C=6, D=3, E=7, dtype=torch.float32)
CALLS = ("token_mixing", "channel_mixing", "mixer_block: token", "mixer_block: channel")


def inputs(case: Case) -> tuple[Tensor, MixingParams, MixingParams]:
    """x and both halves, on the CPU."""
    x, halves, _ = block_inputs(case)
    return x, halves["token"], halves["channel"]


def call(
    name: str, x: Tensor, token: MixingParams, channel: MixingParams, module: object = functional
) -> Tensor:
    """One of the public functions by name, or its reference."""
    if name == "token_mixing":
        return module.token_mixing(x, **token._asdict())
    if name == "channel_mixing":
        return module.channel_mixing(x, **channel._asdict())
    return module.mixer_block(x, token, channel)

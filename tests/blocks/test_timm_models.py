"""timm's own models, fused at full size: the first and the last block against fp64 truth."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

import fastmixer
from fastmixer import parity
from fastmixer.verify.run import randomise

LARGE = [pytest.param(size, marks=pytest.mark.slow) for size in ("l32", "l16")]


@pytest.mark.parametrize("size", ["s32", "s16", "b32", "b16", *LARGE])
def test_first_and_last_block_match_eager(size: str) -> None:
    model = timm.create_model(f"mixer_{size}_224").eval()
    randomise(model)
    report = fastmixer.fuse(model, strict=True)
    assert len(report.fused) == len(model.blocks)
    for block in (model.blocks[0], model.blocks[-1]):
        S, C = block.mlp_tokens.fc1.in_features, block.norm1.normalized_shape[0]
        block = copy.deepcopy(block).bfloat16()
        x = torch.randn(1, S, C).bfloat16()
        with torch.no_grad():
            with fastmixer.backend("triton"):
                fused = block(x)
            fastmixer.unfuse(block)
            eager = block(x)
            truth = block.double()(x.double())
        result = parity.compare(fused, eager, truth)
        assert result.ok, result

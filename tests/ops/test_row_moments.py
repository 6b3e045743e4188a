"""Row moments: of an input, in the blocks that the token half leaves, and joined into one for a trace."""

from __future__ import annotations

import math

import pytest
import torch
from support import Case, context_of

from fastmixer.configs import cdiv
from fastmixer.ops.row_moments import joined, moments_constants, row_moments

FP32, FP64 = torch.float32, torch.float64


def in_blocks(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Moments (NUM_BLOCKS, 2, T) in fp64 of rows (T, C), each block ``width`` channels wide."""
    blocks = [
        (b.mean(1), (b - b.mean(1, keepdim=True)).square().sum(1)) for b in rows.double().split(width, 1)
    ]
    return torch.stack([torch.stack(block) for block in blocks])


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (1000.0, 0.1), (-3.0, 0.5)])
@pytest.mark.parametrize("channels", [1, 70, 700])
def test_of_an_input(channels: int, mean: float, std: float, device: torch.device) -> None:
    x = (mean + std * torch.randn(2, 9, channels, generator=torch.Generator().manual_seed(0))).to(device)
    found = row_moments(x, context_of(Case(2, 9, channels, 8, 8, FP32), device))
    expected = in_blocks(x.flatten(0, 1), channels)
    assert found.shape == expected.shape == (1, 2, 18) and found.dtype == FP32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor) -> None:
    """Every number is the nearest one of its dtype, or nearly so: half a unit in the last place away."""
    unit = torch.nextafter(found.abs(), torch.full_like(found, math.inf)).double() - found.abs().double()
    assert ((found.double() - exact).abs() <= 0.51 * unit).all()


@pytest.mark.parametrize("channels", [70, 250])
def test_a_mean_far_from_zero_has_all_its_digits(channels: int, device: torch.device) -> None:
    """Its error is one of every LN(x) of the row: the mean of fp32 numbers is rounded once."""
    g = torch.Generator().manual_seed(0)
    x = (1e4 + torch.randn(4, 64, channels, generator=g, dtype=FP64)).to(FP32).to(device)
    found = row_moments(x, context_of(Case(4, 64, channels, 8, 8, FP32), device))
    assert_rounded_once(found[0, 0], in_blocks(x.flatten(0, 1), channels)[0, 0])


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("channels, width", [(70, 32), (768, 128), (129, 128), (99, 64)])
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_joined_they_are_those_of_whole_rows(
    channels: int, width: int, mean: float, dtype: torch.dtype, device: torch.device
) -> None:
    """Also where the last block is ragged, and where the mean is far from zero: sums alone would lose it."""
    if dtype == FP64 and device.type == "cuda":
        pytest.skip("float64 has no GPU tiles")
    rows = mean + torch.randn(50, channels, dtype=FP64, generator=torch.Generator().manual_seed(1)).to(device)
    moments = in_blocks(rows, width).to(dtype).contiguous()
    found = joined(moments, channels, context_of(Case(1, 50, channels, 8, 8, FP32), device))
    assert found.shape == (1, 2, 50) and found.dtype == dtype
    # Of the blocks as they were given, whose means are rounded.
    counts = torch.tensor([len(block) for block in torch.arange(channels).split(width)], dtype=FP64)[:, None]
    means, sums_sq = moments.double().cpu().unbind(1)
    exact = (counts * (means - means[0])).sum(0) / channels + means[0]
    if mean and dtype == FP32:
        assert_rounded_once(found[0, 0].cpu(), exact)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found[0, 0].double().cpu(), exact, rtol=4 * eps, atol=4 * eps)
    shift = means - exact
    torch.testing.assert_close(
        found[0, 1].double().cpu(), (sums_sq + counts * shift.square()).sum(0), rtol=1e-5, atol=0
    )


def test_one_block_is_not_joined_again(device: torch.device) -> None:
    moments = torch.zeros(1, 2, 3, device=device)
    assert joined(moments, 70, context_of(Case(1, 3, 70, 8, 8, FP32), device)) is moments


def test_the_width_of_a_block_follows_from_their_number() -> None:
    """Blocks are powers of two wide: any width that a tile may have, for any number of channels."""
    for channels in range(1, 1100):
        for width in (16, 32, 64, 128, 256):
            blocks = cdiv(channels, width)
            constants = moments_constants(torch.empty(blocks, 2, 1), channels)
            assert constants["NUM_BLOCKS"] == blocks
            assert constants["COUNT"] == (channels if blocks == 1 else width)

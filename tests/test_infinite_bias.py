"""A bias that is infinite behaves as in eager PyTorch: in its own hidden unit, token or channel only."""

from __future__ import annotations

import pytest
import torch
from support import Case, context_of, fused_run, gradients, make_half, make_x, moved, run_eager
from torch import Tensor

from fastmixer.configs import TileConfig
from fastmixer.params import MixingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
TILES = TileConfig(32, 32, 32)
CASES = {
    "bias in the padding": Case(2, 21, 20, 24, 40, BF16, tiles=TILES),  # of the token axis: 32
    "bias in the padding, fp16": Case(2, 21, 20, 24, 40, FP16, tiles=TILES),
    "fp32": Case(2, 21, 20, 24, 40, FP32, tiles=TILES),
    "two passes": Case(2, 21, 20, 24, 40, BF16, tiles=TILES, one_pass=False),
}

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def parts(case: Case, part: str, bias: str, value: float) -> tuple[Tensor, dict[str, MixingParams], Tensor]:
    """x, one half with the value in the middle of a bias, and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    x, params = make_x(case, generator), make_half(case, part + "s", generator)
    vector = getattr(params, bias)
    vector[len(vector) // 2] = value
    return x, {part: params}, torch.randn(x.shape, generator=generator).to(x.dtype)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("bias", ["norm_bias", "fc1_bias", "fc2_bias"])
@pytest.mark.parametrize("part", ["token", "channel"])
@pytest.mark.parametrize("name", CASES)
def test_an_infinite_bias_is_eagers(name: str, part: str, bias: str, value: float) -> None:
    case = CASES[name]
    x, halves, g = parts(case, part, bias, value)
    # The truth's: in fp32, GELU of some CPUs is NaN at inf.
    exact = {of: moved(params, torch.float64) for of, params in halves.items()}
    expected = run_eager(x.double(), exact)
    found = fused_run(case, context_of(case, CPU))(x, halves)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(found), kind(expected)), kind.__name__
    wanted = gradients(run_eager, x.double(), exact, g.double())
    for of, gradient in gradients(fused_run(case, context_of(case, CPU)), x, halves, g).items():
        assert torch.equal(gradient.isfinite(), wanted[of].isfinite()), of

"""Finite stays finite: NaN and inf come out only where eager PyTorch has them, for x of every size.

What is huge overflows where sums and squares of it are taken. The answer is eager's: a row whose variance
overflows has rstd = 0, and its LayerNorm is beta.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
from draws import PARTS, generated
from support import (
    Case,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    make_half,
    make_x,
    moved,
    poisoned,
    run_case,
    run_eager,
    with_library,
)
from torch import Tensor

import fastmixer
from fastmixer import parity
from fastmixer.configs import Library, TileConfig
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import launch, token_mixing
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import MixingParams

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CPU = torch.device("cpu")
HUGE = {BF16: 3e38, FP16: 6e4, FP32: 3e38, FP64: 1.7e308}

# Overflow is what these tests are about: NumPy, which interprets the kernels, remarks on it.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def both_signs(row: Tensor, huge: float) -> None:
    row[::2], row[1::2] = huge, -huge


ROWS: dict[str, Callable[[Tensor, float], object]] = {
    "one element of 1e25": lambda row, huge: row[7].fill_(min(1e25, huge)),
    "the first element": lambda row, huge: row[0].fill_(huge),
    "the last element": lambda row, huge: row[-1].fill_(-huge),
    "two neighbours": lambda row, huge: row[2:4].fill_(huge),
    "two far apart": lambda row, huge: row[:: len(row) - 1].fill_(huge),
    "all": lambda row, huge: row.fill_(huge),
    "all but one": lambda row, huge: row[1:].fill_(-huge),
    "all of a channel block": lambda row, huge: row[:64].fill_(huge),
    "both signs": both_signs,
    "a variance that just overflows": lambda row, huge: row.mul_(huge**0.5),
    "a variance that just does not": lambda row, huge: row.mul_(huge**0.5 / 20),
    "a constant whose sum does not overflow": lambda row, huge: row.fill_(huge * 1e-3),
    "a constant whose mean is exact": lambda row, huge: row.fill_(2.0 ** (math.frexp(huge)[1] - 2)),
    "all of one sign": lambda row, huge: row.abs_().clamp_(0.5, 1).mul_(huge),
    "next to nothing": lambda row, huge: row.mul_(1e-40),
    "nothing": lambda row, huge: row.zero_(),
}

SIZES = len(ROWS), 9, 70, 24, 40
SHORT = {"tiles": TileConfig(64, 32, 32), "eps": 1e-2}  # two blocks of channels, whose moments are merged
LEAN = {**SHORT, "one_pass": False, "lean": True, "approximate": "tanh"}
CASES = {
    "bf16": Case(*SIZES, BF16, **SHORT),
    "fp16": Case(*SIZES, FP16, **SHORT),
    "fp32": Case(*SIZES, FP32, **SHORT),
    "fp64": Case(*SIZES, FP64, **SHORT),
    "fp32 by bf16": Case(*SIZES, BF16, x_dtype=FP32, **SHORT),
    "fp32 by fp16": Case(*SIZES, FP16, x_dtype=FP32, **SHORT),
    "bf16, two passes": Case(*SIZES, BF16, **LEAN),
    "fp32, two passes": Case(*SIZES, FP32, **LEAN),
    "bf16, library": Case(*SIZES, BF16, **SHORT),
    "fp32, library": Case(*SIZES, FP32, **SHORT),
}


def context_for(name: str, case: Case) -> launch.Context:
    context = context_of(case, CPU)
    if name.endswith("library"):
        return with_library(context, {"channel_fc1": Library.ATEN, "channel_fc2": Library.ATEN})
    return context


def output_and_gradients(
    run: Callable, x: Tensor, halves: dict[str, MixingParams], g: Tensor
) -> dict[str, Tensor]:
    x, halves = x.detach().clone(), {of: moved(params, CPU) for of, params in halves.items()}
    found = {}

    def keeping_y(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
        found["y"] = run(x, halves)
        return found["y"]

    return gradients(keeping_y, x, halves, g) | {"y": found["y"].detach()}


@pytest.mark.parametrize("name", CASES)
def test_a_huge_row_leaves_everything_finite(name: str) -> None:
    """Each in a sample of its own. Eager on the CPU has NaN for some of them; on a GPU it has not."""
    case = CASES[name]
    x, halves, g = block_inputs(case)
    for sample, fill in zip(x, ROWS.values(), strict=True):
        fill(sample[4], HUGE[x.dtype])
    assert x.isfinite().all()
    with poisoned():
        found = output_and_gradients(fused_run(case, context_for(name, case)), x, halves, g)
    bad = {
        name: sorted({row for row, ok in zip(ROWS, tensor.isfinite(), strict=True) if not ok.all()})
        for name in ("y", "x")
        if not (tensor := found.pop(name)).isfinite().all()
    }
    assert not bad, bad
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_one_huge_element_of_a_bf16_block() -> None:
    """As it was reported: the whole sample was NaN."""
    torch.manual_seed(0)
    block = fastmixer.MixerBlock(40, 9).bfloat16().eval()
    x = torch.randn(2, 9, 40).bfloat16()
    x[1, 4, 7] = 1e25
    for name in ("triton", "torch"):
        with torch.no_grad(), fastmixer.backend(name):
            y = block(x)
        assert y.isfinite().all() and y[1, 4, 7] == x[1, 4, 7], name


# ---- what comes out instead ------------------------------------------------------------------------------

OVERFLOWS = (
    "one element of 1e25",
    "two far apart",
    "all of a channel block",
    "both signs",
    "all of one sign",
)


@pytest.mark.parametrize("part", ["token", "channel"])
@pytest.mark.parametrize("name", ["bf16", "fp32", "fp32 by bf16"])
def test_layer_norm_of_a_row_whose_variance_overflows_is_beta(name: str, part: str) -> None:
    """The truth has a row of zeros, whose LayerNorm is beta. The huge row's gradient is the residual's."""
    case = dataclasses.replace(CASES[name], B=len(OVERFLOWS))
    x, halves, g = block_inputs(case)
    halves = {part: halves[part]}
    zero = x.clone()
    for sample, row, name_of_row in zip(x, zero, OVERFLOWS, strict=True):
        ROWS[name_of_row](sample[4], HUGE[x.dtype])
        row[4] = 0
    found = output_and_gradients(fused_run(case, context_for(name, case)), x, halves, g)
    eager = output_and_gradients(run_eager, zero, halves, g)
    exact = {of: moved(params, FP64) for of, params in halves.items()}
    truth = output_and_gradients(run_eager, zero.double(), exact, g.double())
    assert torch.equal(found["x"][:, 4], g[:, 4])
    # Of the other rows: y of a huge one is x, whose digits say nothing of the branch.
    ordinary = [row for row in range(case.S) if row != 4]
    for of in ("y", "x"):
        compared = (tensors[of][:, ordinary] for tensors in (found, eager, truth))
        result = parity.compare(*compared, accumulate_dtype(case.dtype))
        assert result.ok, (of, str(result))


@pytest.mark.parametrize("one_block", [True, False])
@pytest.mark.parametrize(("dtype", "value"), [(BF16, 1003.0), (BF16, 3e38), (FP16, 1003.0), (FP16, 6e4)])
def test_layer_norm_of_a_constant_row_is_beta(dtype: torch.dtype, value: float, one_block: bool) -> None:
    """As of a row of zeros: what a product of the raw row loses must not be multiplied by 1 / sqrt(eps)."""
    case = Case(2, 9, 64, 24, 40, dtype, tiles=TileConfig(32, 32, 32))
    x, halves, g = block_inputs(case)
    of = ("channel",) if one_block else ("token", "channel")  # which leaves moments in two blocks
    halves = {half: halves[half]._replace(residual_scale=0.0 if half == "token" else None) for half in of}
    zero = x.clone()
    x[:, 4], zero[:, 4] = value, 0
    found = output_and_gradients(fused_run(case, context_of(case, CPU)), x, halves, g)
    eager = output_and_gradients(run_eager, zero, halves, g)
    exact = {half: moved(params, FP64) for half, params in halves.items()}
    truth = output_and_gradients(run_eager, zero.double(), exact, g.double())
    for name in ("fc1_weight", "fc1_bias", "fc2_weight"):
        name = f"channel.{name}"
        result = parity.compare(found[name], eager[name], truth[name])
        assert result.ok, (name, str(result))


@pytest.mark.parametrize(("dtype", "value"), [(BF16, 1003.0), (BF16, 3e38), (FP16, 1003.0), (FP16, 6e4)])
def test_a_constant_token_whose_mean_is_inexact_counts_as_zeros(dtype: torch.dtype, value: float) -> None:
    """As a GPU may leave it, whose division rounds. What other tokens get of it is compared."""
    case = Case(2, 9, 64, 24, 40, dtype, tiles=TileConfig(32, 32, 32))
    x, halves, _ = block_inputs(case)
    zero = x.clone()
    x[:, 4], zero[:, 4] = value, 0
    context = context_of(case, CPU)
    moments = row_moments(x, context)
    mean, sum_sq = moments[0].view(2, case.B, case.S)[..., 4]
    sum_sq.add_(case.C * (mean * 2.0**-23).square())
    mean.mul_(1 + 2.0**-23)
    found, _ = token_mixing.forward(x, halves["token"], dtype, context, moments)
    exact = {"token": moved(halves["token"], FP64)}
    eager, truth = run_eager(zero, {"token": halves["token"]}), run_eager(zero.double(), exact)
    others = torch.arange(case.S) != 4
    result = parity.compare(found[:, others], eager[:, others], truth[:, others])
    assert result.ok, result


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_a_residual_scale_above_1_leaves_a_large_hidden_finite(dtype: torch.dtype) -> None:
    """As drop path has it. A hidden of 40,000 is in float16's range, four times as much is not."""
    case = Case(2, 9, 64, 24, 40, dtype, tiles=TileConfig(32, 32, 32), biases=(False,) * 4)
    x, halves, _ = block_inputs(case)
    params = halves["token"]
    n = torch.nn.functional.layer_norm(x.double(), (case.C,)).mT
    hidden = torch.nn.functional.linear(n, params.fc1_weight.double()).max()
    half = params._replace(
        norm_weight=None, norm_bias=None, residual_scale=4.0,
        fc1_weight=(params.fc1_weight.double() * (40000 / hidden)).to(dtype),
        fc2_weight=(params.fc2_weight * 2.0**-10).to(dtype),
    )  # fmt: skip
    found = fused_run(case, context_of(case, CPU))(x, {"token": half})
    eager = run_eager(x, {"token": half})
    exact = run_eager(x.double(), {"token": moved(half, FP64)})
    assert eager.isfinite().all() and (exact - x).abs().max() > 8
    result = parity.compare(found, eager, exact)
    assert result.ok, result


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", ["token", "channel"])
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_what_is_not_finite_stays_so(dtype: torch.dtype, part: str, value: float) -> None:
    result = run_case(part, Case(3, 9, 70, 24, 40, dtype, tiles=SHORT["tiles"]), CPU, bad_element=value)
    assert result.misplaced == 0, result


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_eager_puts_it(part: str, value: float, device: torch.device) -> None:
    """One bad element spoils its sample in the token half, its row in the channel half, and nothing else."""
    result = run_case(part, Case(3, 20, 24, 33, 40, FP16), device, bad_element=value)
    assert result.ok, result


@pytest.mark.parametrize("one_pass", [None, False])
@pytest.mark.parametrize("part", ["token", "channel"])
@pytest.mark.parametrize("where", ["x", "g"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_eager_has_it(
    value: float, where: str, part: str, one_pass: bool | None
) -> None:
    """In the last element, which tiles beyond the end must not repeat into anybody else's sums."""
    case = Case(3, 21, 20, 33, 40, FP32, tiles=TileConfig(32, 32, 16), one_pass=one_pass)
    x, halves, g = block_inputs(case)
    halves = {part: halves[part]}
    (x if where == "x" else g)[1, -1, -1] = value
    expected = gradients(run_eager, x, halves, g)
    for name, gradient in gradients(fused_run(case, context_of(case, CPU)), x, halves, g).items():
        assert torch.equal(gradient.isfinite(), expected[name].isfinite()), name


# ---- a bias that is infinite: inf and NaN in its own hidden unit, token or channel only ------------------

TILES = TileConfig(32, 32, 32)
WITH_BIASES = {
    "bias in the padding": Case(2, 21, 20, 24, 40, BF16, tiles=TILES),  # of the token axis: 32
    "bias in the padding, fp16": Case(2, 21, 20, 24, 40, FP16, tiles=TILES),
    "fp32": Case(2, 21, 20, 24, 40, FP32, tiles=TILES),
    "two passes": Case(2, 21, 20, 24, 40, BF16, tiles=TILES, one_pass=False),
}


def inputs_with(
    case: Case, part: str, bias: str, value: float
) -> tuple[Tensor, dict[str, MixingParams], Tensor]:
    """x, one half with the value in the middle of a bias, and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    x, params = make_x(case, generator), make_half(case, part + "s", generator)
    vector = getattr(params, bias)
    vector[len(vector) // 2] = value
    return x, {part: params}, torch.randn(x.shape, generator=generator).to(x.dtype)


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
@pytest.mark.parametrize("bias", ["norm_bias", "fc1_bias", "fc2_bias"])
@pytest.mark.parametrize("part", ["token", "channel"])
@pytest.mark.parametrize("name", WITH_BIASES)
def test_an_infinite_bias_is_eagers(name: str, part: str, bias: str, value: float) -> None:
    case = WITH_BIASES[name]
    x, halves, g = inputs_with(case, part, bias, value)
    # The truth's: in fp32, GELU of some CPUs is NaN at inf.
    exact = {of: moved(params, torch.float64) for of, params in halves.items()}
    expected = run_eager(x.double(), exact)
    found = fused_run(case, context_of(case, CPU))(x, halves)
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(found), kind(expected)), kind.__name__
    wanted = gradients(run_eager, x.double(), exact, g.double())
    for of, gradient in gradients(fused_run(case, context_of(case, CPU)), x, halves, g).items():
        assert torch.equal(gradient.isfinite(), wanted[of].isfinite()), of


# ---- any magnitude ---------------------------------------------------------------------------------------

DTYPES = [(BF16, None), (FP16, None), (FP32, None), (FP64, None), (BF16, FP32), (FP16, FP32)]


def magnitudes(rng: random.Random, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Values for x (B, S, C), for products in dtype: of the size of anything that x's dtype holds.

    Rows of a size each, or elements, or few elements, or rows that are constant; the others are ordinary.
    LayerNorm multiplies the gradient of a constant row by a thousand, eager's less the more it errs: in
    float16 that decides about inf.
    """
    B, S, C = like.shape
    huge = HUGE[like.dtype]
    shape, share = rng.choice([((B, S, 1), 1), ((B, S, 1), 0.3), ((B, S, C), 1), ((B, S, C), 0.03)])
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    uniform = torch.rand(2, *shape, generator=generator, dtype=FP64)
    size = 10 ** (uniform[0] * (math.log10(huge) + 40) - 40)
    values = like.double()
    direction = values[..., :1].sign() if shape[-1] == 1 and dtype != FP16 and rng.random() < 0.3 else values
    values = torch.where(uniform[1] < share, direction * size, values)
    return values.clamp(-huge, huge).to(like.dtype)


@generated(4, 24, 400)
def test_no_less_finite_than_eager(draw: str) -> None:
    rng = random.Random(f"magnitudes {draw}")
    dtype, x_dtype = rng.choice(DTYPES)
    case = Case(
        *(2, 5, rng.choice([20, 37]), 6, 10, dtype, x_dtype),
        approximate=rng.choice(["none", "tanh"]),
        scale=rng.choice(["none", "vector"]),
        tiles=rng.choice([None, TileConfig(16, 16, 16)]),
        one_pass=rng.choice([None, False]),
        lean=rng.random() < 0.5,
        seed=rng.getrandbits(32),
    )
    like, halves, g = block_inputs(case)
    x = magnitudes(rng, like, dtype)
    eager = output_and_gradients(run_eager, x, halves, g)
    # Gradients are linear in g: what is finite for 4 g is not at the edge, where rounding decides.
    further = output_and_gradients(run_eager, x, halves, 4 * g)
    found = output_and_gradients(fused_run(case, context_of(case, CPU)), x, halves, g)
    for of in eager:
        assert found[of].isfinite()[eager[of].isfinite() & further[of].isfinite()].all(), of

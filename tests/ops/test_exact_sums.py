"""Sums are kept in the accumulation dtype: problems of which every other step is exact.

x is 1 or 2 above or below a whole number, so LN(x) is 1 or -1 (times gamma); weights are small whole numbers.
Pre-activations are whole and beyond 16 or -16, where GELU is the identity or 0 and its derivative 1 or 0. p,
hidden, dp and dn have at most 8 bits, so nothing but results is rounded, by their dtype. The sums on the way
have more than 8 bits, many more than 11: weights come in pairs that all but cancel half a reduction later. So
a sum that is rounded on its way, or that misses a term, shows.

In parity that would hide behind the rounding of y and of the operands. Here the yardstick is the truth,
rounded once: a result in fp32 has to be right to a few eps of the largest, one in 16 bits as rounding
leaves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from support import A100, Case, context_of, fused_run, leaves, poisoned, run_eager, with_sms
from torch import Tensor

from fastmixer import parity
from fastmixer.configs import Target, TileConfig
from fastmixer.params import MixingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMALL = TileConfig(32, 32, 32)
WIDE = {"x_dtype": FP32, "weight_dtype": FP32}  # results in fp32: the sums themselves are seen


class Draw:
    """Whole numbers in fp64 from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def up_to(self, largest: int, *shape: int) -> Tensor:
        """Uniform in [-largest, largest]."""
        return torch.randint(-largest, largest + 1, shape, generator=self.generator).double()

    def signs(self, *shape: int) -> Tensor:
        return 2.0 * torch.randint(0, 2, shape, generator=self.generator).double() - 1

    def sparse(self, expected: float, *shape: int) -> Tensor:
        """-1, 0 and 1; so many that are not 0 are expected along the last axis."""
        return self.signs(*shape) * (torch.rand(shape, generator=self.generator) * shape[-1] < expected)


def cancelling(tensor: Tensor, dim: int) -> Tensor:
    """The first half of the axis again in the second with its sign turned; an odd one in the end stays."""
    half = tensor.shape[dim] // 2
    tensor = tensor.clone()
    tensor.narrow(dim, half, half).copy_(-tensor.narrow(dim, 0, half))
    return tensor


def paired(draw: Draw, largest: int, rest: float, rows: int, columns: int, sign: int) -> Tensor:
    """Whole numbers (rows, columns): the right half is the left, the lower one ``sign`` times the upper.

    But for a sparse rest, which is all that the last of an odd number has.
    """
    upper, left = rows // 2, columns // 2
    large = torch.zeros(rows, columns, dtype=torch.float64)
    block = draw.up_to(largest, upper, left)
    large[: 2 * upper, : 2 * left] = torch.cat([block, sign * block]).repeat(1, 2)
    return large + draw.sparse(rest, rows, columns)


def exact_problem(case: Case, half: str) -> tuple[Tensor, MixingParams, Tensor]:
    """x, the half and the output's gradient in fp64."""
    B, S, C = case.B, case.S, case.C
    width, hidden, along = (S, case.D, 1) if half == "token" else (C, case.E, 2)
    draw = Draw(case.seed)
    signs = cancelling(cancelling(draw.signs(B, S, C), 2), along)
    x = draw.up_to(2, B, S, 1) + (1.5 + 0.5 * draw.signs(B, S, 1)) * signs
    g = cancelling(draw.up_to(7, B, S, C), along)
    gamma = torch.ones(C, dtype=torch.float64)
    gamma[: C // 2 * 2] = (1.5 + 0.5 * draw.signs(C // 2)).repeat(2)
    w2 = paired(draw, 3 if case.dtype == FP16 else 15, 0, width, hidden, 1)  # y has to fit
    # What is left of dhidden is the same for both units of a pair, as is the sign of p: so their dp cancel.
    w2[:, : hidden // 2 * 2] += draw.sparse(6, hidden // 2, width).t().repeat(1, 2)
    b1 = 96 * draw.signs(hidden)
    b1[hidden // 2 : hidden // 2 * 2] = b1[: hidden // 2]
    scale = torch.tensor([1.0, 0.5], dtype=torch.float64).repeat(B)[:B] if case.scale == "vector" else None
    w1 = paired(draw, 31, min(6, 8 * width / hidden), hidden, width, -1)  # few in each column, too: dn
    zeros = torch.zeros(C, dtype=torch.float64)
    return x, MixingParams(gamma, zeros, w1, b1, w2, draw.up_to(9, width), case.eps, "none", scale), g


EPS = {"eps": 1e-20}  # nothing beside a variance of 1
BASE = EPS | {"scale": "vector", "tiles": SMALL}
# The case and its target: many steps along every reduction, in few programs.
TOKEN = {
    "one pass": (Case(3, 49, 64, 512, 8, BF16, **BASE, **WIDE), with_sms(1)),
    "one pass, two launches for the weights": (Case(3, 101, 96, 64, 8, BF16, **BASE, **WIDE), A100),
    "one pass, three pieces": (Case(1, 196, 64, 128, 8, BF16, **BASE, **WIDE), with_sms(2)),
    "one pass, 16 bits": (Case(3, 49, 64, 512, 8, BF16, **BASE), with_sms(1)),
    "one pass, fp16": (Case(3, 49, 64, 512, 8, FP16, **BASE), with_sms(1)),
    "one pass, fp32": (Case(3, 49, 64, 512, 8, FP32, **BASE), with_sms(1)),
    "two passes": (Case(2, 300, 64, 128, 8, BF16, **BASE, **WIDE, one_pass=False), with_sms(2)),
    "two passes, many units": (Case(2, 64, 64, 512, 8, FP16, **BASE, one_pass=False), with_sms(1)),
}
CHANNEL = {
    "many units": (Case(2, 9, 64, 8, 3072, BF16, **BASE, **WIDE), with_sms(1)),
    "many units, folded": (Case(2, 9, 64, 8, 3072, BF16, **BASE), with_sms(1)),
    "many units, folded, fp16": (Case(2, 9, 64, 8, 2048, FP16, **BASE), with_sms(1)),
    "many units, fp32, lean": (Case(2, 9, 64, 8, 2048, FP32, **BASE, lean=True), with_sms(1)),
    "many channels": (Case(2, 17, 512, 8, 64, BF16, **BASE, **WIDE, lean=True), with_sms(2)),
    "many channels, folded": (Case(2, 17, 512, 8, 64, BF16, **BASE), with_sms(2)),
    "many rows": (Case(5, 128, 64, 8, 256, BF16, **EPS, **WIDE, tiles=TileConfig(64, 128, 32)), with_sms(1)),
}
EXTREMES = {
    "one token": Case(4, 1, 96, 5, 70, BF16, **EPS, **WIDE),
    "one channel": Case(4, 50, 1, 30, 3, FP16, **EPS),
    "two channels, one token": Case(3, 1, 2, 70, 40, BF16, **EPS),
    "one of everything": Case(8, 1, 1, 1, 1, BF16, **EPS),
}


def given(params: MixingParams, case: Case, device: torch.device) -> MixingParams:
    """The half as the case gives it, on the device."""
    norm = {"norm_weight", "norm_bias"}
    x_dtype = case.x_dtype or case.dtype
    dtypes = {name: x_dtype if name in norm else case.weight_dtype or case.dtype for name in params._fields}
    cast = {
        name: t.detach().to(device, dtypes[name]) if isinstance(t, Tensor) else t
        for name, t in params._asdict().items()
    }
    return MixingParams(**cast)


def results(run: Callable, x: Tensor, halves: dict[str, MixingParams], g: Tensor) -> dict[str, Tensor]:
    """The output and every gradient by name."""
    asked = leaves(x, halves)
    for tensor in asked.values():
        tensor.requires_grad_()
    y = run(x, halves)
    return {"y": y.detach()} | dict(zip(asked, torch.autograd.grad(y, list(asked.values()), g), strict=True))


@pytest.mark.parametrize("name", TOKEN)
def test_every_sum_of_the_token_half(name: str, device: torch.device) -> None:
    assert_exact("token", *TOKEN[name], device)


@pytest.mark.parametrize("name", CHANNEL)
def test_every_sum_of_the_channel_half(name: str, device: torch.device) -> None:
    assert_exact("channel", *CHANNEL[name], device)


@pytest.mark.parametrize("half", ["token", "channel"])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_shapes_are_exact(name: str, half: str, device: torch.device) -> None:
    assert_exact(half, EXTREMES[name], with_sms(2), device)


@pytest.fixture(autouse=True)
def _exact_products_of_pytorch() -> Iterator[None]:
    """cuBLAS may add the parts of a long sum in 16 bits, unless it is told not to."""
    switches = torch.backends.cuda.matmul
    names = [f"allow_{dtype}_reduced_precision_reduction" for dtype in ("bf16", "fp16")]
    before = [getattr(switches, name) for name in names]
    for name in names:
        setattr(switches, name, False)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(switches, name, value)


def assert_exact(half: str, case: Case, target: Target, device: torch.device) -> None:
    """The output and every gradient are the truth, rounded to their dtype."""
    x, params, g = exact_problem(case, half)
    truth = results(run_eager, x, {half: params}, g)
    context = context_of(case, device)
    if device.type == "cpu":
        context = dataclasses.replace(context, target=target)
    x, g = (t.detach().to(device, case.x_dtype or case.dtype) for t in (x, g))
    with poisoned():
        found = results(fused_run(case, context), x, {half: given(params, case, device)}, g)
    two_passes = half == "channel" or case.one_pass is False
    for name, exact in truth.items():
        # Products of PyTorch's are rounded to the products' dtype, whatever the gradient's is.
        of_pytorch = two_passes and name.endswith(("fc1_weight", "fc2_weight"))
        once = exact.to(case.dtype if of_pytorch else found[name].dtype)
        result = parity.compare(found[name].cpu(), once, exact)
        assert result.ok, (name, str(result))


@pytest.mark.parametrize("name", [*TOKEN, *CHANNEL])
def test_nothing_but_sums_is_rounded(name: str) -> None:
    """What the tests above take for granted."""
    half, (case, _) = ("token", TOKEN[name]) if name in TOKEN else ("channel", CHANNEL[name])
    x, params, g = exact_problem(case, half)
    n = torch.nn.functional.layer_norm(x, (case.C,), params.norm_weight, None, case.eps)
    do = g if params.residual_scale is None else g * params.residual_scale.view(-1, 1, 1)
    n, do = (t.transpose(1, 2) if half == "token" else t for t in (n, do))
    p = n @ params.fc1_weight.T + params.fc1_bias
    assert p.abs().min() >= 16
    dp = torch.where(p > 0, do @ params.fc2_weight, 0)
    dn = dp @ params.fc1_weight
    for operand in (n, do, p, dp, dn, params.fc1_weight, params.fc2_weight):
        halves = (2 * operand).round() / 2  # without the truth's own rounding
        torch.testing.assert_close(operand, halves, rtol=0, atol=1e-9)
        assert torch.equal(halves.to(BF16).double(), halves), "8 bits hold it"
    # Sums on the way that 8 bits do not hold.
    middle = n.shape[-1] // 2
    assert (n[..., :middle] @ params.fc1_weight[:, :middle].T).abs().max() > 256
    unit = params.fc1_weight.shape[0] // 2
    assert (torch.relu(p)[..., :unit] @ params.fc2_weight[:, :unit].T).abs().max() > 256
    assert (dp[..., :unit] @ params.fc1_weight[:unit]).abs().max() > 256
    if params.fc2_weight.abs().max() > 4:
        assert (do[..., :middle] @ params.fc2_weight[:middle]).abs().max() > 256

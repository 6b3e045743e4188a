"""The parity criterion itself: what it lets through and what it must stop."""

import math

import pytest
import torch

from fastmixer.dtypes import accumulate_dtype
from fastmixer.parity import Parity, compare

EPS32 = torch.finfo(torch.float32).eps


def rounded_case(dtype=torch.bfloat16, shape=(4, 49, 64)):
    """A truth and its rounding to ``dtype``: the best an eager result can do."""
    truth = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return truth, truth.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_fused_result_equal_to_eager_passes_with_ratio_one(dtype):
    truth, eager = rounded_case(dtype)
    parity = compare(eager.clone(), eager, truth)
    assert parity.ok
    assert parity.ratio == 1.0
    assert parity.error_fused == parity.error_eager > 0


def test_bounds_are_the_documented_formula():
    truth, eager = rounded_case()
    parity = compare(eager, eager, truth)
    error = float((eager.double() - truth).norm() / truth.norm())
    largest = float((eager.double() - truth).abs().max())
    assert parity.error_eager == pytest.approx(error, rel=1e-12)
    assert parity.max_eager == largest
    assert parity.error_bound == pytest.approx(1.25 * error + 8 * EPS32, rel=1e-12)
    assert parity.max_bound == pytest.approx(2 * largest + 16 * EPS32 * float(truth.abs().max()), rel=1e-12)


@pytest.mark.parametrize(("factor", "ok"), [(0.5, True), (1.2, True), (1.3, False), (10.0, False)])
def test_relative_error_may_exceed_eagers_by_a_quarter(factor, ok):
    truth, eager = rounded_case()
    fused = truth + factor * (eager.double() - truth)
    parity = compare(fused, eager, truth)
    assert parity.ratio == pytest.approx(factor)
    assert parity.ok is ok


def test_one_wrong_element_fails_by_its_size_though_the_norm_hides_it():
    truth, eager = rounded_case(shape=(64, 49, 64))
    fused = eager.double()
    worst = int((eager.double() - truth).abs().argmax())
    fused.view(-1)[worst] = truth.view(-1)[worst] + 2.5 * float((eager.double() - truth).abs().max())
    parity = compare(fused, eager, truth)
    assert parity.error_fused <= parity.error_bound
    assert not parity.ok


def test_exact_eager_leaves_rounding_of_the_accumulator():
    truth = torch.full((100,), 3.0, dtype=torch.float64)
    eager = truth.float()
    assert compare(truth * (1 + 7 * EPS32), eager, truth).ok
    assert not compare(truth * (1 + 9 * EPS32), eager, truth).ok
    assert compare(truth * (1 + 7 * EPS32), eager, truth).ratio == math.inf


def test_float64_gets_the_eps_of_float64():
    truth = torch.full((100,), 3.0, dtype=torch.float64)
    fused = truth * (1 + 1e-12)
    assert compare(fused, truth, truth).ok
    assert not compare(fused, truth, truth, accumulate_dtype=torch.float64).ok
    assert accumulate_dtype(torch.float64) == torch.float64
    assert all(accumulate_dtype(d) == torch.float32 for d in (torch.float32, torch.float16, torch.bfloat16))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_fused_fails_where_the_truth_is_finite(bad):
    truth, eager = rounded_case()
    fused = eager.clone()
    fused[1, 2, 3] = bad
    parity = compare(fused, eager, truth)
    assert not parity.ok
    assert parity.misplaced == 1
    assert "NaN or inf" in str(parity)


def test_an_overflow_of_eager_excuses_nothing():
    truth, eager = rounded_case()
    fused = eager.clone()
    eager[0] = math.inf
    assert compare(fused, eager, truth).ok
    assert not compare(fused * 1.5, eager, truth).ok


def test_nan_must_stand_where_the_truth_has_it():
    truth, eager = rounded_case()
    truth[0, 0], eager[0, 0] = math.nan, math.nan
    assert compare(eager.clone(), eager, truth).ok
    covered = eager.clone()
    covered[0, 0] = 0
    assert compare(covered, eager, truth).misplaced == 64
    infinite = eager.clone()
    infinite[0, 0] = math.inf
    assert not compare(infinite, eager, truth).ok


def test_infinities_must_have_the_truths_sign():
    truth, eager = rounded_case()
    truth[0, 0, 0], eager[0, 0, 0] = math.inf, math.inf
    assert compare(eager.clone(), eager, truth).ok
    flipped = eager.clone()
    flipped[0, 0, 0] = -math.inf
    assert not compare(flipped, eager, truth).ok


def test_a_truth_of_zeros_makes_the_errors_absolute():
    truth = torch.zeros(8, dtype=torch.float64)
    eager = truth.float()
    assert compare(eager.clone(), eager, truth).ok
    parity = compare(eager + 1e-3, eager, truth)
    assert not parity.ok
    assert math.isfinite(parity.error_fused)


@pytest.mark.parametrize("shape", [(0,), (0, 49, 64), (3, 0, 64)])
def test_zero_sized_tensors_pass(shape):
    empty = torch.empty(shape)
    parity = compare(empty, empty, empty.double())
    assert parity.ok
    assert parity.ratio == 1.0


def test_everything_nan_where_the_truth_is_all_nan():
    truth = torch.full((4,), math.nan, dtype=torch.float64)
    assert compare(truth.float(), truth.float(), truth).ok
    assert not compare(torch.zeros(4), truth.float(), truth).ok


def test_bad_arguments_are_named():
    x = torch.zeros(2, 3)
    with pytest.raises(TypeError, match=r"truth must be float64, got torch\.float32"):
        compare(x, x, x)
    with pytest.raises(ValueError, match=r"fused \(3, 2\), eager \(2, 3\)"):
        compare(x.T, x, x.double())
    with pytest.raises(TypeError, match="accumulate_dtype"):
        compare(x, x, x.double(), accumulate_dtype=torch.int32)


def test_inputs_are_left_alone_and_need_no_gradient():
    truth, eager = rounded_case(torch.float32)
    fused = eager.clone().requires_grad_()
    before = fused.detach().clone()
    assert compare(fused, eager, truth).ok
    assert torch.equal(fused.detach(), before)


def test_verdict_is_readable():
    parity = Parity(2.0, 1.0, 0.5, 0.5, 1.25, 1.0)
    assert not parity.ok
    assert parity.ratio == 2.0
    assert str(parity).startswith("FAILED: error 2.000e+00, eager 1.000e+00")

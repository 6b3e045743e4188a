"""The fit of GELU: what is shipped is as good as a new one, and what the command prints."""

import functools

import numpy as np
import pytest
from gelu_polynomials import APPROXIMATE, F32, SHIPPED, TERMS, coefficient_error, evaluation_error

from benchmarks import fit_gelu


@functools.cache
def fitted(approximate, terms):
    return fit_gelu.fit(approximate, terms)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_shipped_coefficients_are_as_good_as_a_new_fit(approximate, terms):
    """The errors agree, not the digits: those are the solver's business."""
    new = fitted(approximate, terms)
    shipped = np.float32(SHIPPED[approximate, terms])
    assert shipped.dtype == np.float32
    assert len(shipped) == terms
    x = np.linspace(-12, 12, 100_001)
    truth = fit_gelu.normal_cdf(x, approximate)
    phi = np.clip(x * np.polynomial.Polynomial(shipped.astype(np.float64))(x * x) + 0.5, 0, 1)
    assert np.abs(phi - truth).max() <= new.phi_error + coefficient_error(shipped, new.saturation)


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_error_in_fp32_is_the_fits_plus_rounding(approximate, terms):
    """|x| * (error of Phi), largest where the polynomial saturates; half an ulp for the last product."""
    new = fitted(approximate, terms)
    shipped = np.float32(SHIPPED[approximate, terms])
    error, where, last_unsaturated = fit_gelu.max_error(shipped, approximate, points=160_001)
    rounding = evaluation_error(shipped, last_unsaturated) + F32.eps / 2
    assert error <= abs(where) * (new.phi_error + rounding)
    assert last_unsaturated < fit_gelu.FIT_END


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_shipped_polynomial_only_overshoots_once_saturated(approximate, terms):
    """Beyond the largest real root x P(x x) stays above 1/2, since the leading coefficient is positive."""
    shipped = SHIPPED[approximate, terms]
    assert shipped[-1] > 0
    in_x = np.zeros(2 * terms)
    in_x[0], in_x[1::2] = -0.5, shipped
    roots = np.polynomial.Polynomial(in_x).roots()
    largest = roots[roots.imag == 0].real.max()
    allowed = fitted(approximate, terms).phi_error + coefficient_error(shipped, largest)
    assert 1 - fit_gelu.normal_cdf(largest, approximate) <= allowed


@pytest.mark.parametrize("terms", TERMS)
def test_each_approximation_needs_its_own_fit(terms):
    """erf and tanh GELU differ by more than either fit's error, so the sets must not be swapped."""
    own = fit_gelu.max_error(np.float32(SHIPPED["none", terms]), "none", points=160_001)[0]
    other = fit_gelu.max_error(np.float32(SHIPPED["tanh", terms]), "none", points=160_001)[0]
    assert other > own


@pytest.mark.parametrize(("approximate", "terms"), [("erf", 7), ("none", 8), ("tanh", 1)])
def test_fit_refuses_what_it_cannot_fit(approximate, terms):
    with pytest.raises(ValueError, match="approximate" if approximate == "erf" else "terms"):
        fit_gelu.fit(approximate, terms)


def test_fit_command_prints_coefficients_and_parity(capsys):
    fit_gelu.main(["--approximate", "tanh", "--terms", "5", "--parity"])
    printed = capsys.readouterr().out
    assert "approximate='tanh', 5 terms" in printed
    assert "max |gelu error|" in printed
    assert "bfloat16" in printed and "float16" in printed

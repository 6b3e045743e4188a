"""Fit the saturating polynomials that kernels/activations.py evaluates instead of erf or tanh.

    python -m benchmarks.fit_gelu [--approximate none|tanh] [--terms 7] [--parity]

GELU is x * Phi(x), and Phi - 1/2 is odd, so the kernels compute

    Phi(x) ~= clamp(x * P(x*x) + 1/2, 0, 1)

A linear programme finds the P that minimises max |error of Phi|. That measure, and not the error of GELU,
is what parity with eager 16-bit arithmetic asks for: eager's rounding of x and of the result is relative,
about |x| times half an ulp, so GELU's error x * dPhi has to be small relative to |x| too. (Minimising
|x * dPhi| reaches a smaller maximum, 1.6e-4 against 2.6e-4 with 7 terms, but more error at small |x|: in fp16
it is at 1.25 times the bound for a standard deviation of 0.3, this fit at 0.58.)

From the boundary on, where 1 - Phi(x) itself is below the error, the upper constraint is dropped: the clamp
hides any overshoot. With a positive leading coefficient x*P(x*x) then only grows, so Phi comes out as exactly
0 or 1, no clamp on x is needed and x = +-inf is safe. An even number of terms cannot do that: its best
polynomial has a negative leading coefficient.

Needs numpy and scipy (the ``demo`` extra brings it with scikit-learn); ``--parity`` needs torch.
"""

import argparse
import math
from typing import NamedTuple

import numpy as np
from scipy.optimize import linprog
from scipy.special import expit, ndtr

FIT_END = 6.0  # every fit has saturated before; both Phi are 1 there to 1e-9
LP_SCALE = 1e4  # brings the error, the programme's objective, to order 1: HiGHS' tolerances are absolute
BISECTIONS = 14  # of [2, 5]: the boundary to 2e-4


class Fit(NamedTuple):
    """A fitted P and what is known about it."""

    coefficients: np.ndarray  # (terms,) of t = x*x, lowest first, rounded to fp32
    phi_error: float  # max |clamp(x P(x x) + 1/2) - Phi|, the programme's optimum
    boundary: float  # from this |x| on, P may overshoot
    saturation: float  # from this |x| on, P does overshoot (exact arithmetic)


def normal_cdf(x, approximate):
    """Phi(x) in fp64 such that gelu(x) = x * Phi(x); ``approximate`` as in torch: "none" or "tanh"."""
    x = np.asarray(x, np.float64)
    if approximate == "none":
        return ndtr(x)
    return expit(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))  # 0.5 * (1 + tanh(u)) = sigmoid(2u)


def solve(approximate, terms, boundary, points=800):
    """The P of ``terms`` terms with the smallest error, two-sided up to ``boundary``, then from below only.

    Returns (coefficients in fp64, error). Raises RuntimeError when the programme has no solution.
    """
    chebyshev_nodes = boundary / 2 * (1 - np.cos(np.pi * (np.arange(points) + 0.5) / points))
    x = np.concatenate([chebyshev_nodes, np.linspace(boundary, FIT_END, points // 4)])
    basis = np.polynomial.chebyshev.chebvander(2 * (x / FIT_END) ** 2 - 1, terms - 1) * x[:, None]
    target = normal_cdf(x, approximate) - 0.5
    error = np.full((len(x), 1), -1 / LP_SCALE)
    two_sided = x <= boundary
    result = linprog(
        np.eye(terms + 1)[terms],
        A_ub=np.concatenate([np.hstack([-basis, error]), np.hstack([basis, error])[two_sided]]),
        b_ub=np.concatenate([-target, target[two_sided]]),
        bounds=[(None, None)] * terms + [(0, None)],
        method="highs",
    )
    if result.status != 0:
        raise RuntimeError(f"no {terms}-term fit of approximate={approximate!r}: {result.message}")
    polynomial = np.polynomial.Chebyshev(result.x[:terms], domain=[0, FIT_END**2])
    return polynomial.convert(kind=np.polynomial.Polynomial).coef, result.x[terms] / LP_SCALE


def fit(approximate="none", terms=7):
    """Fit P for erf GELU (``approximate="none"``) or tanh GELU ("tanh") with ``terms`` coefficients.

    Raises ValueError for an unknown ``approximate`` or a number of terms that cannot saturate.
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; expected 'none' or 'tanh'")
    if terms < 3 or terms % 2 == 0:
        raise ValueError(f"terms is {terms}; expected an odd number >= 3 (even ones do not saturate)")
    low, boundary = 2.0, 5.0
    for _ in range(BISECTIONS):  # the earliest boundary beyond which overshooting is free
        middle = (low + boundary) / 2
        if 1 - normal_cdf(middle, approximate) > solve(approximate, terms, middle)[1]:
            low = middle
        else:
            boundary = middle
    solution, phi_error = solve(approximate, terms, boundary)
    coefficients = solution.astype(np.float32)
    in_x = np.zeros(2 * terms)  # x P(x x) - 1/2, lowest power first
    in_x[0], in_x[1::2] = -0.5, coefficients
    roots = np.polynomial.Polynomial(in_x).roots()
    saturation = float(roots[np.abs(roots.imag) < 1e-9].real.max())
    if coefficients[-1] <= 0 or saturation > FIT_END:
        raise RuntimeError(f"x P(x x) falls below 1/2 beyond {boundary:.3f}: the fit does not saturate")
    return Fit(coefficients, phi_error, boundary, saturation)


def evaluate(coefficients, x):
    """The kernels' arithmetic in numpy: GELU of ``x`` in fp32, without fused multiply-adds."""
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        t, p = x * x, np.zeros_like(x)
        for c in coefficients[::-1]:
            p = p * t + np.float32(c)
        return x * np.clip(x * p + np.float32(0.5), np.float32(0), np.float32(1))


def max_error(coefficients, approximate, limit=40.0, points=1_600_001):
    """(max |gelu error| in fp32 over [-limit, limit], the x where it is, the last |x| not yet saturated)."""
    x = np.linspace(-limit, limit, points, dtype=np.float32)
    y = evaluate(coefficients, x)
    error = np.abs(y - x * normal_cdf(x, approximate))
    worst = int(error.argmax())
    return float(error[worst]), float(x[worst]), float(np.abs(x[(y != x) & (y != 0)]).max())


def relative_error(coefficients, approximate, limit):
    """max |gelu error| / |gelu| in fp32 over 0 < |x| <= limit: to compare with half an ulp, 2^-9 or 2^-12."""
    x = np.geomspace(1e-6, limit, 100_000).astype(np.float32)
    x = np.concatenate([-x, x])
    return float(np.abs(evaluate(coefficients, x) / (x * normal_cdf(x, approximate)) - 1).max())


def parity(coefficients, approximate, dtype, mean, std, samples=1 << 18, seed=0):
    """Error over allowed error for pre-activations ~ N(mean, std): (relative L2, elementwise); <= 1 passes.

    Truth is GELU in fp64. Eager rounds the pre-activation to ``dtype`` (a 16-bit torch dtype), applies
    torch's GELU and rounds again; the kernel applies P to the fp32 pre-activation and rounds once.
    """
    import torch

    from fastmixer.parity import compare

    h = torch.randn(samples, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * std + mean
    truth = torch.nn.functional.gelu(h, approximate=approximate)
    eager = torch.nn.functional.gelu(h.to(dtype), approximate=approximate)
    fused = torch.from_numpy(evaluate(coefficients, h.numpy())).to(dtype)
    result = compare(fused, eager, truth)
    return result.error_fused / result.error_bound, result.max_fused / result.max_bound


def _print_fit(result, approximate):
    """The coefficients and what they are worth."""
    error, where, last = max_error(result.coefficients, approximate)
    print(f"approximate={approximate!r}, {len(result.coefficients)} terms, lowest first:")
    print("  " + ", ".join(str(c) for c in result.coefficients))
    print(f"  max |Phi error| {result.phi_error:.3e}, two-sided up to |x| = {result.boundary:.4f}")
    print(f"  overshoots beyond {result.saturation:.4f}; the last |x| not saturated in fp32 is {last:.4f}")
    print(f"  max |gelu error| over [-40, 40] in fp32 {error:.3e} at x = {where:.4f}")
    for limit in (0.05, 0.3, 1.0):
        relative = relative_error(result.coefficients, approximate, limit)
        print(f"  max relative error for |x| <= {limit}: {relative:.2e} = 2^{math.log2(relative):.1f}")


def _print_parity(coefficients, approximate):
    """A table of parity ratios over the mean and standard deviation of the pre-activations."""
    import torch

    stds = (0.05, 0.3, 1.0, 3.0)
    print("  error / allowed error, L2 and max" + "".join(f"{f'std {std}':>13}" for std in stds))
    for dtype in (torch.bfloat16, torch.float16):
        for mean in (0.0, -1.0, -2.0):
            ratios = [parity(coefficients, approximate, dtype, mean, std) for std in stds]
            columns = "".join(f"{l2:8.2f} {largest:4.2f}" for l2, largest in ratios)
            print(f"    {str(dtype).removeprefix('torch.'):9} mean {mean:4.1f}" + " " * 14 + columns)


def main(argv=None):
    """Print the coefficients and their errors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fit_gelu", description="Fit Phi for GELU.")
    parser.add_argument("--approximate", choices=("none", "tanh"), help="default: both")
    parser.add_argument("--terms", type=int, help="number of coefficients, odd (default: 7 and 9)")
    parser.add_argument("--parity", action="store_true", help="simulate parity with eager in bf16 and fp16")
    args = parser.parse_args(argv)
    for approximate in [args.approximate] if args.approximate else ["none", "tanh"]:
        for terms in [args.terms] if args.terms else [7, 9]:
            result = fit(approximate, terms)
            _print_fit(result, approximate)
            if args.parity:
                _print_parity(result.coefficients, approximate)


if __name__ == "__main__":
    main()

"""GELU on tiles in registers, exact or as a saturating polynomial.

GELU is x * Phi(x). An exact Phi costs about 33 instructions an element with erf, which in these kernels takes
longer than the matrix products beside it. Where the result is rounded to 16 bits anyway, Phi is replaced by

    Phi(x) ~= clamp(x * P(x*x) + 1/2, 0, 1)

whose P is fitted so that it only overshoots once Phi is 0 or 1 to within the error. So x needs no clamp, the
outer one costs nothing (ptxas makes it the .SAT of the FFMA), and n terms are n + 2 instructions.

How many terms a dtype needs, and the coefficients, are set here and nowhere else. Both come
from ``python -m benchmarks.fit_gelu --parity``, which minimises max |error of Phi| and then simulates
pre-activations ~ N(mean, std) against eager GELU in the same dtype. max |error| in fp32 over [-40, 40]:

    terms   Phi erf   Phi tanh   GELU erf   GELU tanh
      7     6.7e-5     6.3e-5     2.6e-4     2.3e-4    bf16: at most 0.73 of the parity bounds
      9     9.3e-6     8.0e-6     6.1e-5     4.1e-5    fp16: at most 0.73; with 7 terms up to 2.3

for means 0, -1, -2 and std 0.05 to 3; the exact GELU is at 0.7 as well. The bounds are missed only
where all pre-activations lie near -3 (std 0.3 or less), so that GELU is about -0.004 throughout.

NaN gives NaN, inf gives inf and -inf gives NaN, as torch has it (-inf * 0), in every form: on the GPU .SAT
turns a NaN Phi into 0, and the product with x brings the NaN back.
"""

import triton
import triton.language as tl

# P(t), lowest power first: the shortest decimals that round to the fp32 coefficients
ERF_7 = tl.constexpr(
    (0.39866427, -0.06569086, 0.009298003, -0.00092651125, 6.0033482e-05, -2.2325369e-06, 3.572601e-08)
)
ERF_9 = tl.constexpr(
    (0.3988989, -0.06633398, 0.009806734, -0.0011049719, 9.268844e-05, -5.5429973e-06, 2.2015954e-07)
    + (-5.1447335e-09, 5.3101436e-11)
)
TANH_7 = tl.constexpr(
    (0.39867765, -0.06603228, 0.009519634, -0.0009800117, 6.623081e-05, -2.5804081e-06, 4.3322434e-08)
)
TANH_9 = tl.constexpr(
    (0.3989047, -0.066683814, 0.010059835, -0.0011787587, 0.000104397295, -6.6452326e-06, 2.8167406e-07)
    + (-7.024167e-09, 7.729736e-11)
)

SQRT_HALF = tl.constexpr(0.7071067811865476)
TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
TANH_CUBIC = tl.constexpr(0.044715)


def polynomial_terms(dtype):
    """gelu's POLYNOMIAL where its result is rounded to ``dtype``, a ``tl.dtype``."""
    return {tl.bfloat16: 7, tl.float16: 9}.get(dtype, 0)


@triton.jit
def gelu(
    x,  # any shape, fp32 or fp64
    APPROXIMATE: tl.constexpr,  # "none" (erf) or "tanh", as torch.nn.GELU has it
    POLYNOMIAL: tl.constexpr,  # terms of P, 7 or 9, or 0 for the exact form: see polynomial_terms
):
    """GELU of x, in x's shape and dtype."""
    tl.static_assert(APPROXIMATE == "none" or APPROXIMATE == "tanh", "APPROXIMATE must be 'none' or 'tanh'")
    exact: tl.constexpr = POLYNOMIAL == 0
    nine: tl.constexpr = POLYNOMIAL == 9
    tl.static_assert(exact or nine or POLYNOMIAL == 7, "POLYNOMIAL must be 0, 7 or 9 terms")
    if APPROXIMATE == "tanh":
        if exact:
            return _gelu_tanh(x)
        elif nine:
            return _gelu_polynomial(x, TANH_9, 9)
        else:
            return _gelu_polynomial(x, TANH_7, 7)
    else:
        if exact:
            return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
        elif nine:
            return _gelu_polynomial(x, ERF_9, 9)
        else:
            return _gelu_polynomial(x, ERF_7, 7)


@triton.jit
def _gelu_tanh(x):
    """x * sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3), which is 0.5 x (1 + tanh(u)).

    exp may overflow to inf (sigmoid is then 0, as it should be), and no digits cancel where x is negative.
    """
    v = TWO_SQRT_2_OVER_PI * x * (1.0 + TANH_CUBIC * x * x)
    return x / (1.0 + tl.exp(-v))


@triton.jit
def _gelu_polynomial(x, P: tl.constexpr, TERMS: tl.constexpr):
    """x * clamp(x * P(x*x) + 1/2, 0, 1), by Horner's rule."""
    t = x * x
    p = t * P[TERMS - 1] + P[TERMS - 2]
    for i in tl.static_range(TERMS - 3, -1, -1):
        p = p * t + P[i]
    return x * tl.clamp(x * p + 0.5, 0.0, 1.0)

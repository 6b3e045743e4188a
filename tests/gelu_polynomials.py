"""The polynomials of GELU that are shipped, and bounds of their rounding in fp32."""

import numpy as np
from fastmixer.kernels import activations

F32 = np.finfo(np.float32)
APPROXIMATE = ["none", "tanh"]
TERMS = [7, 9]
SHIPPED = {
    ("none", 7): activations.ERF_7.value,
    ("none", 9): activations.ERF_9.value,
    ("tanh", 7): activations.TANH_7.value,
    ("tanh", 9): activations.TANH_9.value,
}


def coefficient_error(coefficients, x):
    """A bound of what rounding P's coefficients to fp32 changes in x P(x x)."""
    x = np.abs(x)
    return F32.eps / 2 * sum(abs(float(c)) * x ** (2 * k + 1) for k, c in enumerate(coefficients))


def evaluation_error(coefficients, x):
    """A bound of all fp32 rounding in x P(x x) + 1/2: x x and two roundings a step for every coefficient."""
    return (3 * len(coefficients) + 2) * (coefficient_error(coefficients, x) + F32.eps / 4)

"""The weights and settings of one half of a Mixer block, as every layer of the library passes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

# The length of ``Half.arguments()``.
ARGUMENTS = 10


class Half(NamedTuple):
    """One residual half of a Mixer block: ``x + scale * mlp(layer_norm(x))``.

    With S tokens, C channels, D hidden units of the token MLP and E of the channel MLP (all >= 1):

    ==============  ===============  =================
    field           token half       channel half
    ==============  ===============  =================
    norm_weight     (C,) or None     (C,) or None
    norm_bias       (C,) or None     (C,) or None
    fc1_weight      (D, S)           (E, C)
    fc1_bias        (D,) or None     (E,) or None
    fc2_weight      (S, D)           (C, E)
    fc2_bias        (S,) or None     (C,) or None
    ==============  ===============  =================

    The linear weights and biases share one floating dtype; the norm parameters may have another (fp32 beside
    16-bit weights). ``eps`` is the LayerNorm's, ``approximate`` the GELU's: "none" (erf) or "tanh".
    ``residual_scale`` is None (1), a float, or a tensor of shape (), (B,) or (B, 1, 1): the factor of each
    sample's branch, which is how stochastic depth (https://arxiv.org/abs/1603.09382) enters. Nothing is
    checked here: the functions that take a half do.
    """

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    fc1_weight: Tensor
    fc1_bias: Tensor | None
    fc2_weight: Tensor
    fc2_bias: Tensor | None
    eps: float = 1e-6
    approximate: str = "none"
    residual_scale: float | Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor of the half, absent ones as None; the residual scale counts if it is one."""
        return (*self[:6], self.residual_scale if isinstance(self.residual_scale, Tensor) else None)

    def arguments(self) -> tuple:
        """The half as an operator takes it: ``tensors()``, the scale if it is a number, eps, approximate."""
        scale = self.residual_scale
        number = 1.0 if scale is None or isinstance(scale, Tensor) else float(scale)
        return *self.tensors(), number, float(self.eps), self.approximate

    @classmethod
    def of_arguments(cls, arguments: Sequence[Any]) -> Half:
        """The half that ``arguments`` describe."""
        *parameters, scale, number, eps, approximate = arguments
        if scale is None and number != 1.0:
            scale = number
        return cls(*parameters, eps, approximate, scale)

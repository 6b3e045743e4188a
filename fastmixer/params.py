"""The weights and settings of one half of a Mixer block, as every layer of the library passes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class MixingParams(NamedTuple):
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
    checked here: the functions that take these parameters do.
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
        """Every tensor among the fields, absent ones as None; the residual scale counts if it is one."""
        return (*self[:6], self.residual_scale if isinstance(self.residual_scale, Tensor) else None)


class Needs(NamedTuple):
    """Which inputs of a half need a gradient."""

    x: bool
    norm_weight: bool
    norm_bias: bool
    fc1_weight: bool
    fc1_bias: bool
    fc2_weight: bool
    fc2_bias: bool

    @property
    def before_fc1(self) -> bool:
        """Whether LN(x) needs one."""
        return self.x or self.norm_weight or self.norm_bias

    @property
    def before_gelu(self) -> bool:
        """Whether the pre-activation needs one."""
        return self.before_fc1 or self.fc1_weight or self.fc1_bias

    @property
    def hidden(self) -> bool:
        """Whether the hidden is needed at all: only fc2's bias does without."""
        return self.before_gelu or self.fc2_weight


Gradients = dict[str, Tensor]  # by the names of Needs

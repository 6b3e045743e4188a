"""The parity criterion, in one place: is a fused result as close to the truth as eager PyTorch is?

Truth is the fp64 reference on the same (upcast) inputs and weights, and eager's own rounding in the same
dtype is the yardstick. With ``err(a) = ||a - truth|| / ||truth||`` and ``eps`` that of the accumulation type,

    err(fused)          <= 1.25 * err(eager)          +  8 * eps
    max |fused - truth| <= 2    * max |eager - truth| + 16 * eps * max |truth|

No tolerance is picked by hand: a dtype that rounds coarsely widens the bound by itself, and a fused result
that rounds more often than eager does fails in every dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

ERROR_FACTOR, ERROR_EPS = 1.25, 8
MAX_FACTOR, MAX_EPS = 2.0, 16


@dataclass(frozen=True)
class Parity:
    """Both errors of one comparison, the bounds that eager's error sets, and the verdict.

    Attributes:
        error_fused: relative L2 error against the truth; inf when a NaN or inf stands where none belongs.
        error_eager: relative L2 error against the truth, over eager's finite elements.
        max_fused: max |fused - truth|; inf as above.
        max_eager: max |eager - truth|, over eager's finite elements.
        error_bound: error_fused may reach this.
        max_bound: max_fused may reach this.
        misplaced: elements where fused and truth disagree on being NaN, inf, -inf or finite.
    """

    error_fused: float
    error_eager: float
    max_fused: float
    max_eager: float
    error_bound: float
    max_bound: float
    misplaced: int = 0

    @property
    def ok(self) -> bool:
        """Whether the fused result is inside both bounds."""
        within = self.error_fused <= self.error_bound and self.max_fused <= self.max_bound
        return within and self.misplaced == 0

    @property
    def ratio(self) -> float:
        """``error_fused / error_eager``: 1 when both are exact, inf when only eager is."""
        if self.error_eager == 0:
            return 1.0 if self.error_fused == 0 else float("inf")
        return self.error_fused / self.error_eager

    @property
    def share_of_bound(self) -> float:
        """How much of its bounds the comparison uses up: above 1 it fails."""
        if self.misplaced:
            return float("inf")
        pairs = (self.error_fused, self.error_bound), (self.max_fused, self.max_bound)
        return max(
            value / bound if bound > 0 else float("inf") if value > 0 else 0.0 for value, bound in pairs
        )

    def __str__(self) -> str:
        text = (
            f"error {self.error_fused:.3e}, eager {self.error_eager:.3e} (bound {self.error_bound:.3e}), "
            f"largest {self.max_fused:.3e}, eager {self.max_eager:.3e} (bound {self.max_bound:.3e})"
        )
        if self.misplaced:
            text += f"; {self.misplaced} elements are NaN or inf on one side only"
        return f"{'ok' if self.ok else 'FAILED'}: {text}"


def compare(
    fused: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    accumulate_dtype: torch.dtype = torch.float32,
) -> Parity:
    """Measures ``fused`` and ``eager`` against ``truth``.

    Where the truth is NaN, fused must be NaN; where it is infinite, fused must be the same infinity;
    everywhere else fused must be finite. Eager is judged on its finite elements only, so its overflow excuses
    nothing. A truth that is zero throughout makes both errors absolute. Zero-sized tensors pass.

    Args:
        fused: any shape and floating dtype.
        eager: the same shape: plain PyTorch in the same dtype.
        truth: the same shape, float64.
        accumulate_dtype: the dtype that sums are kept in, whose eps widens the bounds.

    Returns:
        The errors, the bounds and the verdict, as plain numbers.

    Raises:
        TypeError: truth is not float64, or accumulate_dtype is not a floating dtype.
        ValueError: the shapes differ.
    """
    if truth.dtype != torch.float64:
        raise TypeError(f"truth must be float64, got {truth.dtype}")
    if not accumulate_dtype.is_floating_point:
        raise TypeError(f"accumulate_dtype must be a floating dtype, got {accumulate_dtype}")
    if not fused.shape == eager.shape == truth.shape:
        shapes = f"fused {tuple(fused.shape)}, eager {tuple(eager.shape)}, truth {tuple(truth.shape)}"
        raise ValueError(f"fused, eager and truth must have one shape, got {shapes}")
    with torch.no_grad():
        fused, eager = (t.to(truth.device, torch.float64) for t in (fused, eager))
        expected = truth.isfinite()
        same = (fused == truth) | (fused.isnan() & truth.isnan())
        misplaced = int((~torch.where(expected, fused.isfinite(), same)).sum())
        error_fused, max_fused = (float("inf"),) * 2 if misplaced else _errors(fused, truth, expected)
        error_eager, max_eager = _errors(eager, truth, expected & eager.isfinite())
        largest = _largest(torch.where(expected, truth, 0))
    eps = torch.finfo(accumulate_dtype).eps
    return Parity(
        error_fused=error_fused,
        error_eager=error_eager,
        max_fused=max_fused,
        max_eager=max_eager,
        error_bound=ERROR_FACTOR * error_eager + ERROR_EPS * eps,
        max_bound=MAX_FACTOR * max_eager + MAX_EPS * eps * largest,
        misplaced=misplaced,
    )


def _errors(values: torch.Tensor, truth: torch.Tensor, where: torch.Tensor) -> tuple[float, float]:
    """Relative L2 error and largest absolute error over the elements picked by ``where``."""
    difference = torch.where(where, values - truth, 0)
    norm = float(torch.where(where, truth, 0).norm())
    return float(difference.norm()) / (norm or 1.0), _largest(difference)


def _largest(values: torch.Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0

"""What tests put in place of the fused path: every block and every public function passes here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastmixer import functional
from fastmixer.params import MixingParams

Halves = dict[str, MixingParams]
Run = Callable[[Tensor, Halves], Tensor]


def replaced(call: Callable[[Run, Tensor, Halves], Tensor]) -> Callable[..., Callable[[], Tensor]]:
    """A ``functional.prepared`` whose calls give ``call(run, x, halves)``; run gives what they would give."""
    original = functional.prepared

    def prepared(x: Tensor, halves: Halves, *kept: object) -> Callable[[], Tensor]:
        return lambda: call(lambda x, halves: original(x, halves, *kept)(), x, halves)

    return prepared


def replace_calls(patch: Any, call: Callable[[Run, Tensor, Halves], Tensor]) -> None:
    """The same, put there by pytest's ``monkeypatch``."""
    patch.setattr(functional, "prepared", replaced(call))

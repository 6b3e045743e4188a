"""What a recording must not do: compute. A plan would not repeat it, and nobody would know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmixer.ops import plan, plan_recording


class OnlyMemory(TorchDispatchMode):
    """Refuses whatever is neither an allocation nor a view of what is known."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self._known |= {plan_recording._storage(t) for t in plan.found(Tensor, args)}
        made = function(*args, **kwargs or {})
        new = {plan_recording._storage(t) for t in plan.found(Tensor, (made,))} - self._known
        if new and "empty" not in function.__name__:
            raise RuntimeError(f"{function} in a recording: Context.call is missing")
        return made


def guard(patch: pytest.MonkeyPatch) -> None:
    """Has every recording watched. Not in the product: a dispatch mode imports torch._dynamo."""
    original = plan_recording.record

    def record(function: Callable, context: Any, inputs: Any) -> plan.Plan:
        def watched(*args: Any) -> Any:
            with OnlyMemory():
                return function(*args)

        return original(watched, context, inputs)

    patch.setattr(plan_recording, "record", record)

"""What users are told, at the line of theirs that led to it; also from inside a trace."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

# No user's lines; accelerate's hooks stand between a model and its forward.
_PASSED_OVER = ("torch", "fastmixer", "functools", "contextlib", "accelerate")


def constant_in_traces(function: Callable) -> Callable:
    """Decorates what a trace calls for real, once, and takes the result of as a constant.

    As ``torch.compiler.assume_constant_result``, which imports torch._dynamo: a second, at import.
    """
    function._dynamo_marked_constant = True
    return function


class FallbackWarning(UserWarning):
    """The reference ran where the fused kernels could not, or a fused block's own forward; says why.

    Once per reason where it is the reference, once per block and reason where it is a block, by the name that
    ``fuse`` found it under. It points to the line that called PyTorch or fastmixer.
    """


class ThawWarning(UserWarning):
    """A frozen block was thawed by a call or a move, and packs its weights in every call again; says why."""


@constant_in_traces
def warn(message: str, category: type[Warning] = FallbackWarning) -> None:
    """Warns at the user's line that led here: the innermost outside of PyTorch, fastmixer and wrappers."""
    frame, level = sys._getframe(1), 2
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_OVER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)

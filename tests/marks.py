"""What an expression for pytest's option -m selects: tests for a GPU, or tests for the interpreter."""

from __future__ import annotations

import itertools
import re

import pytest
from _pytest.mark.expression import Expression


def names_of(marks: str) -> set[str]:
    """The marks that an expression for pytest's option -m names."""
    return set(re.findall(r"\w+", marks)) - {"and", "or", "not"}


def selects_gpu_tests(marks: str) -> bool:
    """Whether an expression for -m selects only tests with the mark gpu; False: only tests without.

    Raises:
        pytest.UsageError: it selects both: kernels are compiled or interpreted, for a whole process.
    """
    try:
        expression = Expression.compile(marks)
    except SyntaxError:
        return False  # pytest says what is wrong with it
    others = names_of(marks) - {"gpu"}
    chosen = [set(some) for n in range(len(others) + 1) for some in itertools.combinations(others, n)]
    interpreted, native = (
        not marks or any(expression.evaluate((gpu | some).__contains__) for some in chosen)
        for gpu in (set(), {"gpu"})
    )
    if interpreted and native:
        raise pytest.UsageError(
            f"-m {marks!r} selects tests that need a GPU and tests that run in the interpreter, and one run "
            'is for one of them: add "and gpu" or "and not gpu"'
        )
    return native

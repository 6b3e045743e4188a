"""Mutants: edits of one file each that break the code as a real bug would, and the tests that must notice.

They are listed in the ``.txt`` files beside this one, by these marks at the beginning of a line:

    == kernels/mlp.py                   the file that the mutants below edit, from the repository's root
    @ tests/ops/test_exact_sums.py      arguments of pytest, for all mutants up to the next @ or ==
    fc2 rounds its accumulator          what is wrong then: a line without a mark begins a mutant
    - acc = tl.dot(a, b, acc)           the old text, which occurs once in the file; lines or a part
    + acc = tl.dot(a, b, acc.to(DTYPE)) what takes its place, or nothing
    = nobody reads the last digits      why nothing can notice: only of a mutant that is meant to survive

A lone - or + is an empty line of the text. Other empty lines, and those that begin with #, say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass
class Mutant:
    """One edit, and what is expected of it; the fields are those of the text above."""

    path: str
    bug: str
    tests: list[str]
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    survives: str = ""

    def applied(self, source: str) -> str:
        """The text of the file with the edit.

        Raises:
            ValueError: the old text is not there exactly once, or the edit changes nothing.
        """
        old, new = "\n".join(self.old), "\n".join(self.new)
        if not old or (count := source.count(old)) != 1:
            raise ValueError(f"{self}: the old text occurs {count if old else 'no'} times, not once")
        if old == new:
            raise ValueError(f"{self}: the new text is the old one")
        return source.replace(old, new)

    def __str__(self) -> str:
        return f"{self.path}: {self.bug}"


def parsed(text: str) -> Iterator[Mutant]:
    """The mutants of a list.

    Raises:
        ValueError: a line has no place where it stands.
    """
    path, tests, mutant, is_used = "", [], None, True
    for number, line in enumerate(text.splitlines(), 1):
        mark, rest = line[:2].ljust(2), line[2:]
        if not line or line.startswith("#"):
            continue
        if line.startswith("== ") or mark == "@ ":
            if not is_used:
                raise ValueError(f"line {number}: there is no mutant for the tests before it")
            path, tests = (line[3:], []) if line.startswith("== ") else (path, rest.split())
            is_used = not tests
        elif mark in ("- ", "+ ", "= ") and mutant is None:
            raise ValueError(f"line {number}: {line!r} belongs to no mutant")
        elif mark == "- ":
            mutant.old.append(rest)
        elif mark == "+ ":
            mutant.new.append(rest)
        elif mark == "= ":
            mutant.survives = rest
        elif path and tests:
            if mutant is not None:
                yield mutant
            mutant, is_used = Mutant(path, line, tests), True
        else:
            raise ValueError(f"line {number}: {line!r} has no file or no tests")
    if not is_used:
        raise ValueError(f"line {number}: there is no mutant for the last tests")
    if mutant is not None:
        yield mutant


def committed() -> list[Mutant]:
    """All mutants of the lists beside this file."""
    lists = sorted(Path(__file__).parent.glob("*.txt"))
    return [mutant for listed in lists for mutant in parsed(listed.read_text())]

"""What commands share: how arguments are read, how what cannot be done is refused, and what is shown."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib.util
import re
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}
DEFAULT_MODEL = "mixer_b16_224"
SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600}  # of a unit of time


class UsageError(ValueError):
    """What the user asked for cannot be done as asked: reported without a traceback, exit code 2."""


def did_you_mean(word: str, known: Iterable[str], also: Iterable[str] = ()) -> str:
    """A hint for an unknown word: the nearest of both lists, or when none is near all of ``known``."""
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(word, dict.fromkeys([*known, *also]), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"


def dtype_argument(text: str, expected: str = "bf16, fp16 or fp32") -> str:
    """The torch name of a dtype given as bf16, torch.bfloat16 or bfloat16."""
    name = text.lower().removeprefix("torch.")
    name = DTYPES.get(name, name)
    if name not in DTYPES.values():
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return name


def dtype_or_autocast(text: str) -> str:
    """As ``dtype_argument``, or "autocast"."""
    return "autocast" if text.lower() == "autocast" else dtype_argument(text, "bf16, fp16, fp32 or autocast")


def seconds(text: str) -> float:
    """A command-line argument as a time above 0, in seconds; argparse.ArgumentTypeError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip().lower())
    number = float(match[1]) * SECONDS[match[2]] if match else 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time such as 90, 120s, 5m or 1h, got {text!r}")
    return number


def positive(text: str, expected: str = "a whole number above 0") -> int:
    """A command-line argument as a whole number above 0; argparse.ArgumentTypeError otherwise."""
    number = int(text) if text.strip().isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return number


def positive_or_all(text: str) -> int | str:
    """As ``positive``, or "all"."""
    return text if text == "all" else positive(text, "all or a whole number above 0")


@contextlib.contextmanager
def progress_bar(description: str, total: int | None = None) -> Iterator[Callable[..., None] | None]:
    """A bar on stderr, gone when done, as the function that changes it; lines on stderr go above it.

    The function takes what ``rich.progress.Progress.update`` does. None without a terminal or without rich.
    """
    if not (sys.stderr.isatty() and importlib.util.find_spec("rich")):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield functools.partial(progress.update, progress.add_task(description, total=total))


def wide_console() -> Console:
    """rich's console on stdout. A file or pipe has no width: nothing is folded into 80 columns there."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 140
    return console


def table(*titles: str, texts: Collection[str], title: str | None = None) -> Table:
    """An empty table of these columns: ``texts`` on the left, the others, numbers, on the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD)
    for column in titles:
        table.add_column(column, overflow="fold", justify="left" if column in texts else "right")
    return table

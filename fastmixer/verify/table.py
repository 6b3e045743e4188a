"""What the user of ``verify`` sees: the progress bar, the tables and the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fastmixer import parity
from fastmixer.verify.backward import Gradients, Part
from fastmixer.verify.forward import Advance, Result

if TYPE_CHECKING:
    from rich.table import Table


@contextlib.contextmanager
def progress_bar(steps: int) -> Iterator[Advance]:
    """A bar on stderr, gone when done; ``steps`` is how often it is advanced."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = False
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing", total=steps)

        def advance(description: str) -> None:
            nonlocal started
            progress.update(task, description=description, advance=1 if started else 0)
            started = True

        yield advance


def render(result: Result, title: str, weights: str, gradients: Gradients | None = None) -> None:
    """Prints the tables and the verdict to stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)  # a file or pipe has no width: never cut a cell
    console.print(f"{title}\n{weights}", markup=False)
    table = _table("block", "eager error", "fused error", "ratio", "eager max", "fused max", "verdict")
    for row in result.rows:
        table.add_row(row.name, *_cells(row.parity, row.reason))
    table.add_section()
    table.add_row("logits", *_cells(result.logits, ""))
    console.print(table)
    if gradients is not None:
        table = _table("block", "worst tensor", "eager error", "fused error", "ratio", "of bound", "verdict")
        for part in gradients.parts:
            for cells in _gradient_rows(part):
                table.add_row(*cells)
        console.print(table)
    for line in _summary(result, gradients):
        console.print(line)


def _table(*titles: str) -> Table:
    """An empty table: its texts fold, its numbers are aligned on the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for title in titles:
        if title in ("block", "worst tensor", "verdict"):
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify="right")
    return table


def _cells(p: parity.Parity | None, reason: str) -> list[str]:
    if p is None:
        return ["-"] * 5 + [f"[yellow]not fused[/]: {reason}"]
    numbers = [f"{v:.2e}" for v in (p.error_eager, p.error_fused)] + [f"{p.ratio:.2f}"]
    numbers += [f"{v:.2e}" for v in (p.max_eager, p.max_fused)]
    return [*numbers, "[green]ok[/]" if p.ok else "[red]FAILED[/]"]


def _gradient_rows(part: Part) -> Iterator[list[str]]:
    """One line, that of its worst tensor, for a part that is all good; else one for each that failed."""
    count = len(part.tensors)
    for index, name in enumerate(part.failed or (part.worst,)):
        p = part.tensors[name]
        numbers = [f"{v:.2e}" for v in (p.error_eager, p.error_fused)] + [f"{p.ratio:.2f}"]
        verdict = "[red]FAILED[/]" if part.failed else f"[green]{count} of {count} ok[/]"
        yield [part.name if index == 0 else "", name, *numbers, f"{p.share_of_bound:.2f}", verdict]


def _summary(result: Result, gradients: Gradients | None) -> list[str]:
    compared = [row for row in result.rows if row.parity is not None]
    good = sum(row.parity.ok for row in compared)
    agreement = ", ".join(f"{pair} {count:g}" for pair, count in result.top5.items())
    times = [
        f"{name} {value:.3f} ms" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.milliseconds.items()
    ]
    ok = result.ok and (gradients is None or gradients.ok)
    unfused = len(result.rows) - len(compared)
    return [
        "errors: ||a - truth|| / ||truth||, max |a - truth|; a block sees the same input in all three runs",
        *(_coverage(gradients) if gradients is not None else []),
        f"top-5 classes in common: {agreement}",
        *([f"time for the model (median): {', '.join(times)}"] if times else []),
        f"{'[bold green]PASSED[/]' if ok else '[bold red]FAILED[/]'}: {good} of {len(compared)} fused blocks"
        + (f" ({unfused} not fused)" if unfused else "")
        + (f", {_count(gradients)}" if gradients is not None else "")
        + f" and {'' if result.logits.ok else 'not '}the logits are within "
        "1.25 x eager's error + 8 eps (max: 2 x + 16 eps)",
    ]


def _coverage(gradients: Gradients) -> list[str]:
    """What was compared, and what was not."""
    lines = [
        "gradients: of a block's x and every parameter, given a random one of its output; training's output "
        f"counts too; memory {gradients.memory}"
    ]
    if gradients.left_out:
        lines.append(
            f"gradients not compared: of the {len(gradients.left_out)} other fused blocks, nor end to end "
            "(--blocks all)"
        )
    return lines


def _count(gradients: Gradients) -> str:
    total = sum(len(part.tensors) for part in gradients.parts)
    failed = sum(len(part.failed) for part in gradients.parts)
    return f"{total - failed} of {total} gradients"

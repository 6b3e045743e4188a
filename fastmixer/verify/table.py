"""What the user of ``verify`` sees: the progress bar, the tables and the verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastmixer import dispatch, usage
from fastmixer.parity import Parity
from fastmixer.verify.measure import Advance, Result

FAILED = "[red]FAILED[/]"
TEXTS = ("block", "worst tensor", "verdict")  # columns that hold no numbers


@contextlib.contextmanager
def progress_bar(steps: int) -> Iterator[Advance]:
    """A bar over so many steps, each of which is announced by its description."""
    with usage.progress_bar("preparing", steps) as bar:
        yield lambda description: bar and bar(description=description, advance=1)


def render(result: Result, title: str, weights: str) -> None:
    """Prints the tables and the verdict to stdout."""
    console = usage.wide_console()
    console.print(f"{title}\n{weights}", markup=False)
    numbers = ("eager error", "fused error", "ratio")
    table = usage.table("block", *numbers, "eager max", "fused max", "verdict", texts=TEXTS)
    for name, block in result.blocks.items():
        table.add_row(name, *_cells(block))
    table.add_section()
    table.add_row("logits", *_cells(result.logits))
    console.print(table)
    if result.gradients is not None:
        table = usage.table("block", "worst tensor", *numbers, "of bound", "verdict", texts=TEXTS)
        for name, tensors in result.gradients.items():
            for cells in _gradient_rows(name, tensors):
                table.add_row(*cells)
        console.print(table)
    for line in _summary(result):
        console.print(line)


def _cells(block: Parity | str) -> list[str]:
    if isinstance(block, str):
        return ["-"] * 5 + [f"[yellow]not fused[/]: {block}"]
    verdict = "[green]ok[/]" if block.ok else FAILED
    return [*_errors(block), f"{block.max_eager:.2e}", f"{block.max_fused:.2e}", verdict]


def _gradient_rows(name: str, tensors: dict[str, Parity]) -> Iterator[list[str]]:
    """One row for each tensor that failed; if none did, for the one that is nearest its bound."""
    failed = [tensor for tensor, parity in tensors.items() if not parity.ok]
    verdict = FAILED if failed else f"[green]{len(tensors)} of {len(tensors)} ok[/]"
    for tensor in failed or [max(tensors, key=lambda tensor: tensors[tensor].share_of_bound)]:
        parity = tensors[tensor]
        yield [name, tensor, *_errors(parity), f"{parity.share_of_bound:.2f}", verdict]
        name = ""


def _errors(parity: Parity) -> list[str]:
    return [f"{parity.error_eager:.2e}", f"{parity.error_fused:.2e}", f"{parity.ratio:.2f}"]


def _summary(result: Result) -> Iterator[str]:
    yield "errors: ||a - truth|| / ||truth||, max |a - truth|; a block sees the same input in all three runs"
    gradients = result.gradients
    if gradients is not None:
        yield (
            "gradients: of a block's x and every parameter, given a random one of its output; training's "
            f"output counts too; memory {dispatch.current_memory()}"
        )
        if left_out := len(result.compared.keys() - gradients.keys()):
            yield f"gradients not compared: of {left_out} other fused blocks, nor end to end (--blocks all)"
    yield "top-5 classes in common: " + ", ".join(f"{pair} {n:g}" for pair, n in result.top5.items())
    if result.milliseconds:
        times = [
            f"{name} {value:.3f} ms" if isinstance(value, float) else f"{name} {value}"
            for name, value in result.milliseconds.items()
        ]
        yield f"time for the model (median): {', '.join(times)}"
    good = sum(parity.ok for parity in result.compared.values())
    text = f"{good} of {len(result.compared)} fused blocks"
    if unfused := len(result.blocks) - len(result.compared):
        text += f" ({unfused} not fused)"
    if gradients is not None:
        verdicts = [parity.ok for tensors in gradients.values() for parity in tensors.values()]
        text += f", {sum(verdicts)} of {len(verdicts)} gradients"
    yield (
        f"{'[bold green]PASSED[/]' if result.ok else '[bold red]FAILED[/]'}: {text} and "
        f"{'' if result.logits.ok else 'not '}the logits are within 1.25 x eager's error + 8 eps "
        "(max: 2 x + 16 eps)"
    )

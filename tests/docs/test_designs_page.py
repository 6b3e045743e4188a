"""docs/designs.md: its tables are what is recorded of compiled code, and what the model predicts.

``python tests/docs/test_designs_page.py --write`` writes them. What is recorded is what compiles: the tests
of records hold it to the device code, and the slow ones to a fresh compilation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from fastmixer import configs
from fastmixer.configs import DEVICES, TARGETS, Library, Problem, Target, TileConfig, resources
from fastmixer.configs.designs import DESIGNS
from fastmixer.configs.models import MODEL_BLOCKS
from fastmixer.configs.ops import OPS
from fastmixer.configs.predict import cost

PAGE = Path(__file__).parents[2] / "docs" / "designs.md"
BEGIN, END = "<!-- designs:begin -->\n", "<!-- designs:end -->\n"
BF16 = torch.bfloat16
TRITONS = ("3.6.0", "3.9.0")
COLUMNS = (
    "Op", "Design", "Tile, warps, stages", "Registers", "Spills, in loops", "Shared memory, KB",
    "Programs per SM", "Instructions per K step", "wgmma columns", "Full waits per K step", "Serialised",
)  # fmt: skip


COMPILED = """bf16: the channel half of B/16, and its token half at 448 pixels (784 tokens), read from code
that Triton 3.6.0 / 3.9.0 compile; one figure where both agree. A full wait drains the tensor cores; what is
serialised, spills in a loop or waits more than once in a K step is not chosen by default. All of them, and
fc1 that stores the pre-activation and float16 too, are what `python -m fastmixer compile` compiles here."""
PREDICTED = """**Predicted, not measured**: microseconds on an H200 in bf16, by the cost model with what
Triton 3.6.0 compiles. Of descriptors it knows the instructions that they save, nothing else, and it takes a
library's product to reach 80% of the data sheet. The [log](../benchmarks/NOTES.md) says what is expected."""


def problem_of(model: str, batch: int, approximate: str = "none") -> Problem:
    S, C, _, E = MODEL_BLOCKS[model]
    return Problem(batch, S, C, E, BF16, BF16, approximate)


def compiled_problem(op: str) -> Problem:
    """The channel half of B/16, or its token half where that takes two passes."""
    return Problem(64, 784, 768, 384, BF16, BF16) if OPS[op].half == "token" else problem_of("B/16", 64)


def figures(needs: resources.Resources, target: Target, warps: int) -> list[str]:
    spills, programs = f"{needs.spills}, {needs.loop_spills}", needs.residency(target.arch, warps)
    counts = [needs.registers, spills, round(needs.shared_memory / 1024), programs, needs.loop_instructions]
    waits = [needs.wgmma_columns, needs.full_waits, "yes" if needs.serialised else "no"]
    return [str(figure) for figure in (*counts, *(waits if needs.wgmma else "---"))]


def compiled_row(op: str, name: str, tiles: TileConfig, target: Target) -> list[str]:
    """What each Triton makes of it, once where both make the same."""
    targets = [replace(target, triton=version) for version in TRITONS]
    found = [resources.find(op, compiled_problem(op), tiles, one) for one in targets]
    old, new = (figures(needs, target, tiles.num_warps) for needs in found)
    both = [a if a == b else f"{a} / {b}" for a, b in zip(old, new, strict=True)]
    shape = f"{tiles.block_m} x {tiles.block_n} x {tiles.block_k}, {tiles.num_warps}, {tiles.num_stages}"
    return [f"`{op}`", f"`{name}`", shape, *both]


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compiled() -> Iterator[str]:
    yield "## What the compiler makes of them"
    yield COMPILED
    for arch, target in TARGETS.items():
        rows = [list(COLUMNS)]
        for op in DESIGNS:
            known = configs.designs_of(op, compiled_problem(op), target)
            tiled = {name: runs for name, runs in known.items() if isinstance(runs, TileConfig)}
            rows += [compiled_row(op, name, tiles, target) for name, tiles in tiled.items()]
        yield f"### {arch}"
        yield table(rows)


def predicted() -> Iterator[str]:
    """By the cost model, which nobody has compared with a clock."""
    yield "## What is predicted"
    yield PREDICTED
    target = replace(DEVICES["nvidia-h200"].target, triton=TRITONS[0])
    cells = [(model, batch) for model in ("S/16", "B/16", "L/16") for batch in (64, 256)]
    for op in ("channel_fc1", "channel_fc2"):
        rows = [["Design", *(f"{model}, batch {batch}" for model, batch in cells)]]
        for name in configs.designs_of(op, problem_of("B/16", 64, "tanh"), target):
            times = []
            for model, batch in cells:
                problem = problem_of(model, batch, "tanh")
                choice = configs.designs_of(op, problem, target)[name]
                times.append(f"{1e6 * cost.predict_launch(op, problem, choice, target).seconds:.0f}")
            rows.append([f"`{name}`", *times])
        yield f"### {op}"
        yield table(rows)


def page() -> str:
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return head + BEGIN + "\n" + "\n\n".join([*compiled(), *predicted()]) + "\n\n" + END + tail


def test_the_page_is_up_to_date() -> None:
    assert page() == PAGE.read_text(), "run `python tests/docs/test_designs_page.py --write`"


def test_the_page_names_every_design() -> None:
    text = PAGE.read_text().partition(BEGIN)[0]
    names = {design.name for found in DESIGNS.values() for design in found}
    names |= {library.value for op in DESIGNS for library in OPS[op].library} | {"rule"}
    assert Library.ADDMM.value in names and {name for name in names if f"`{name}`" not in text} == set()


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page())
    else:
        print(page(), end="")

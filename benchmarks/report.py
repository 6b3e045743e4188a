"""``python -m benchmarks.report``: the README's tables, a full report per GPU, and plots, from JSON alone.

Reads every ``benchmarks/results/<gpu>/*.json``; of each cell the newest complete run counts. Writes what is
between the README's two markers, and ``REPORT.md`` and the plots beside the JSON files. ``--check`` writes
nothing and says whether that would change anything; ``--compare A B`` tells what moved between two runs. With
files or folders of one GPU's results, wherever they lie, it prints their full report and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import compare, plots, tables
from .recorded import Cell, ResultError, newest_cells, read_all, replaced, tell

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: ``--check`` or ``--compare`` found something; 2: it cannot be done."""
    options = _parser().parse_args(argv)
    try:
        if options.compare:
            return compare.show(*options.compare, force=options.force)
        return _print(options.paths) if options.paths else _report(options)
    except (ResultError, OSError, UnicodeDecodeError) as error:
        tell(error)
        return 2


def _print(paths: Sequence[Path]) -> int:
    """Prints the full report, without plots, of what these files and folders hold."""
    cells = newest_cells(read_all(paths))
    if not cells:
        raise ResultError(f"{', '.join(map(str, paths))}: no complete run with a cell in it")
    print(tables.gpu_report(cells, []), end="")
    return 0


def _report(options: argparse.Namespace) -> int:
    """Writes the README's part and each GPU's REPORT.md and plots, or with ``--check`` compares them.

    Nothing is written where a file is no valid result, so that none vanishes from the tables unnoticed.
    """
    if options.results is not None and not options.results.is_dir():
        raise ResultError(f"--results: {options.results} is no folder")
    readme = options.readme
    before = _text_of(readme)
    folders = _gather(options.results or RESULTS)
    beside = readme.resolve().parent
    linked = {Path(os.path.relpath(f.resolve(), beside)).as_posix(): cells for f, cells in folders.items()}
    texts = {readme: between_markers(before, tables.readme_part(linked), readme)}
    pictures: dict[Path, plots.Plot] = {}
    for folder, cells in folders.items():
        planned = plots.planned(cells)
        pictures |= {folder / plot.name: plot for plot in planned}
        texts[folder / "REPORT.md"] = tables.gpu_report(cells, [plot.name for plot in planned])
    changed = {p: text for p, text in texts.items() if not (p.is_file() and _text_of(p) == text)}

    if options.check:  # pictures are only missed, never compared
        outdated = [f"{path}: is out of date" for path in changed]
        outdated += [f"{path}: is missing" for path in pictures if not path.is_file()]
        print("\n".join(outdated) or "up to date")
        return 1 if outdated else 0
    drawn = {} if options.no_plots else pictures
    if drawn and importlib.util.find_spec("matplotlib") is None:
        tell(plots.UNAVAILABLE)
        return 2
    for path, text in changed.items():
        with replaced(path) as temporary:
            temporary.write_bytes(text.encode("utf-8"))
        print(f"written: {path}")
    for path, plot in drawn.items():
        with replaced(path) as temporary:  # without matplotlib's version: the same picture is the same file
            plot.figure().savefig(temporary, format="png", dpi=150, metadata={"Software": None})
        print(f"written: {path}")
    return 0


def _gather(results: Path) -> dict[Path, list[Cell]]:
    """The cells of each GPU's folder that has any."""
    for path in sorted(results.glob("*.json")):
        tell(f"{path}: left out: not in a GPU's folder")
    folders = {}
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        if cells := newest_cells(read_all([folder])):
            folders[folder] = cells
        else:
            tell(f"{folder}: no complete run with a cell in it")
    return folders


def _text_of(path: Path) -> str:
    """A file's text, its line ends as they are."""
    return path.read_bytes().decode("utf-8")


def between_markers(text: str, part: str, path: Path) -> str:
    """``text`` with ``part`` between its two markers; a ResultError that says what to add without them."""
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ResultError(
                f"{path}: {marker} must stand in it once, found {text.count(marker)} times; "
                f"put {BEGIN} and {END}, each on its own line, where the tables are to go"
            )
    above, _, rest = text.partition(BEGIN)
    _, end, below = rest.partition(END)
    if not end:
        raise ResultError(f"{path}: {END} stands before {BEGIN}; swap them")
    return f"{above}{BEGIN}\n\n{part}\n\n{END}{below}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    printed = "print the full report of these files and folders, and write nothing"
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help=printed)
    parser.add_argument("--results", type=Path, metavar="DIR", help="default: benchmarks/results")
    parser.add_argument("--readme", type=Path, default=Path("README.md"), metavar="FILE")
    parser.add_argument("--no-plots", action="store_true", help="tables only; needs no matplotlib")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    moved = "what moved from A to B, two files or two folders of one GPU; exit 1 on a regression"
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help=moved)
    parser.add_argument(
        "--force", action="store_true", help="compare although GPU or device differ, or a run is not complete"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())

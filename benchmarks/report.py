"""``python -m benchmarks.report``: the README's tables, a full report a GPU, and plots, from JSON alone.

Reads every ``benchmarks/results/<gpu>/*.json``; of each cell the newest complete run counts. Writes what is
between the README's two markers, and ``REPORT.md`` and the plots beside the JSON files. ``--check`` writes
nothing and says whether that would change anything; ``--compare A B`` tells what moved between two runs. With
files or folders of one GPU's results, wherever they lie, it prints their full report and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import compare, plots, tables
from .recorded import Cell, Key, ResultError, newest_cells, read_all

RESULTS = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


class ReadmeError(ValueError):
    """A README in which the tables have no place; the message says what to add."""


@dataclass(frozen=True)
class Report:
    """What is to be written: the text of every file, and the plots of each folder."""

    texts: dict[Path, str]
    pictures: dict[Path, list[plots.Plot]]

    def outdated(self) -> list[str]:
        """What differs from the files that are there. Pictures are only missed, never compared."""
        found = [f"{path}: is out of date" for path, text in self.texts.items() if _text_of(path) != text]
        names = [folder / plot.name for folder, drawn in self.pictures.items() for plot in drawn]
        return found + [f"{path}: is missing" for path in names if not path.is_file()]


def make(results: Path, readme: Path) -> tuple[Report, list[str]]:
    """The report of a results folder, and a note about everything that was left out of it.

    Raises ResultError for a file that is no valid result, so that none vanishes from the tables unnoticed,
    ReadmeError for a README without markers, and OSError for one that cannot be read.
    """
    before = readme.read_bytes().decode("utf-8")
    folders, notes = _gather(results)
    linked = {tables.link_to(folder, readme): cells for folder, cells in folders.items()}
    texts = {readme: between_markers(before, tables.readme_part(linked), readme)}
    pictures = {folder: plots.planned(cells) for folder, cells in folders.items()}
    for folder, cells in folders.items():
        texts[folder / "REPORT.md"] = tables.gpu_report(cells, [plot.name for plot in pictures[folder]])
    return Report(texts, pictures), notes


def _gather(results: Path) -> tuple[dict[Path, Mapping[Key, Cell]], list[str]]:
    """The cells of each GPU's folder; folders with none are noted."""
    folders = {}
    notes = [f"{path}: left out: not in a GPU's folder" for path in sorted(results.glob("*.json"))]
    for folder in sorted(path for path in results.glob("*") if path.is_dir()):
        runs, left_out = read_all([folder])
        notes += left_out
        cells = newest_cells(runs)
        if cells:
            folders[folder] = cells
        else:
            notes.append(f"{folder}: no complete run with a cell in it")
    return folders, notes


def between_markers(text: str, part: str, path: Path) -> str:
    """``text`` with ``part`` between its two markers, and every other character as it was."""
    begin, end = (_only(text, marker, path) for marker in (BEGIN, END))
    if end < begin:
        raise ReadmeError(f"{path}: {END} stands before {BEGIN}; swap them")
    return f"{text[: begin + len(BEGIN)]}\n\n{part}\n\n{text[end:]}"


def _only(text: str, marker: str, path: Path) -> int:
    """Where the marker stands; it must do so once."""
    if text.count(marker) != 1:
        raise ReadmeError(
            f"{path}: {marker} must stand in it once, found {text.count(marker)} times; "
            f"put {BEGIN} and {END}, each on its own line, where the tables are to go"
        )
    return text.index(marker)


def _text_of(path: Path) -> str | None:
    """A file's text, its line ends as they are; None where there is no file."""
    return path.read_bytes().decode("utf-8") if path.is_file() else None


def _write(path: Path, text: str) -> None:
    """Replaces the file whole: a reader finds the old one or the new one. Its permissions stay."""
    path = path.resolve()  # a link stays a link
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(text.encode("utf-8"))
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- command line ----------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done; 1: ``--check`` or ``--compare`` found something; 2: it cannot be done."""
    options = _parser().parse_args(argv)
    try:
        if options.compare:
            return compare.show(*options.compare, force=options.force)
        return _print(options.paths) if options.paths else _report(options)
    except (ResultError, ReadmeError, OSError, UnicodeDecodeError) as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2


def _print(paths: Sequence[Path]) -> int:
    """Prints the full report, without plots, of what these files and folders hold."""
    runs, notes = read_all(paths)
    _say(notes)
    cells = newest_cells(runs)
    if not cells:
        raise ResultError(f"{', '.join(map(str, paths))}: no complete run with a cell in it")
    print(tables.gpu_report(cells, []), end="")
    return 0


def _say(notes: Sequence[str]) -> None:
    for note in notes:
        print(f"benchmarks.report: {note}", file=sys.stderr)


def _report(options: argparse.Namespace) -> int:
    if options.results is not None and not options.results.is_dir():
        raise ResultError(f"--results: {options.results} is no folder")
    report, notes = make(options.results or RESULTS, options.readme)
    _say(notes)
    if options.check:
        outdated = report.outdated()
        print("\n".join(outdated) if outdated else "up to date")
        return 1 if outdated else 0
    drawn = {} if options.no_plots else report.pictures
    if any(drawn.values()) and not plots.available():
        print(f"benchmarks.report: {plots.UNAVAILABLE}", file=sys.stderr)
        return 2
    for path, text in report.texts.items():
        if _text_of(path) != text:
            _write(path, text)
            print(f"written: {path}")
    for folder, pictures in drawn.items():
        for plot in pictures:
            plots.save(plot, folder / plot.name)
            print(f"written: {folder / plot.name}")
    return 0


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
    parser.add_argument("--force", action="store_true", help="compare although GPU or schema differ")
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""What the pages say: snippets run as they stand; files, names, tests and headings exist."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

from fastmixer.blocks.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "families").glob("*.md"))
# docs/api.md is made from the docstrings, and test_api_reference.py is about it.
WRITTEN = [
    *PAGES,
    *sorted(page for page in ROOT.glob("docs/*.md") if page.name != "api.md"),
    ROOT / "README.md",
    ROOT / "benchmarks" / "NOTES.md",
]
FOLDERS = ("fastmixer", "kernels", "benchmarks", "tests", "examples")

SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
IMPORT = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
ANCHOR = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SHOWN_BY = re.compile(r"\]\(\.\./(tests/[\w/]+\.py) \"(test_\w+)\"\)")
FILE = re.compile(r"[\w/]*\w\.py\b")
NAME = re.compile(r"(?<![\w./])fastmixer(?:\.[A-Za-z]\w*)+")
TEST = re.compile(r"`(test_\w+)`")

on_each_page = pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.stem)


def snippets() -> list[tuple[str, str]]:
    found = [(page, code) for page in PAGES for code in SNIPPET.findall(page.read_text())]
    return [(f"{page.stem}-{number}", code) for number, (page, code) in enumerate(found)]


@pytest.mark.parametrize("name, code", [pytest.param(*pair, id=pair[0]) for pair in snippets()])
def test_snippets_run(name: str, code: str, capsys: pytest.CaptureFixture) -> None:
    for package in IMPORT.findall(code):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    exec(compile(code, f"{name}.md", "exec"), {"__name__": "__main__"})
    assert "blocks fused" in capsys.readouterr().out  # the report of fuse


def test_every_family_has_a_page_with_a_snippet() -> None:
    names = {page.stem for page in PAGES}
    families = {family.__name__ for family in FAMILIES}
    assert names == {"mlp-mixer-pytorch" if name == "lucidrains" else name for name in families}
    assert {name.rpartition("-")[0] for name, _ in snippets()} == names


@pytest.mark.parametrize("page", [*WRITTEN, ROOT / "docs" / "api.md"], ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert text.startswith("# ")
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


@on_each_page
def test_anchors_are_those_of_headings(page: Path) -> None:
    for target, anchor in ANCHOR.findall(page.read_text()):
        headings = HEADING.findall((page.parent / target if target else page).read_text())
        assert anchor in {re.sub(r"[^\w -]", "", line).replace(" ", "-").lower() for line in headings}


@functools.cache
def python_files() -> dict[str, str]:
    """The text of every Python file, by its path with a leading slash."""
    paths = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return {f"/{path.relative_to(ROOT).as_posix()}": path.read_text() for path in paths}


@on_each_page
def test_files_and_names_and_tests_that_a_page_mentions_exist(page: Path) -> None:
    """A file may be mentioned by the end of its path."""
    text = page.read_text()
    files = {file.lstrip("/") for file in FILE.findall(text)}
    assert [file for file in files if not any(path.endswith(f"/{file}") for path in python_files())] == []
    tests = [code for path, code in python_files().items() if path.startswith("/tests/")]
    assert [name for name in TEST.findall(text) if not any(f"def {name}(" in code for code in tests)] == []
    for name in set(NAME.findall(text)):
        pkgutil.resolve_name(name)  # raises for one that does not exist


def test_the_matrix_of_support_names_tests_that_exist() -> None:
    cells = SHOWN_BY.findall((ROOT / "docs" / "support.md").read_text())
    assert len(cells) > 30
    assert [(path, name) for path, name in cells if f"def {name}(" not in (ROOT / path).read_text()] == []


def test_no_family_is_longer_than_forty_lines() -> None:
    """A family is told by where its modules are; the rest is common to all."""
    lengths = {family.__name__: len(inspect.getsource(family).splitlines()) for family in FAMILIES}
    assert max(lengths.values()) <= 40, lengths

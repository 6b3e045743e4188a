"""Every Python snippet of the pages runs as it stands."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from fastmixer.blocks.families import ADAPTERS

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "families").glob("*.md"))

SNIPPET = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
IMPORT = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")
SHOWN_BY = re.compile(r"\]\((tests/[\w/]+\.py) \"(test_\w+)\"\)")


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
    modules = {adapter.__name__.rpartition(".")[2] for adapter in ADAPTERS}
    assert names == {"mlp-mixer-pytorch" if name == "lucidrains" else name for name in modules}
    assert {name.rpartition("-")[0] for name, _ in snippets()} == names


@pytest.mark.parametrize(
    "page", [*PAGES, *ROOT.glob("docs/*.md"), ROOT / "README.md"], ids=lambda page: page.stem
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    assert text.startswith("# ")
    assert [link for link in LINK.findall(text) if not (page.parent / link).exists()] == []


def test_the_matrix_of_the_readme_names_tests_that_exist() -> None:
    cells = SHOWN_BY.findall((ROOT / "README.md").read_text())
    assert len(cells) > 30
    assert [(path, name) for path, name in cells if f"def {name}(" not in (ROOT / path).read_text()] == []


def test_no_adapter_is_longer_than_eighty_lines() -> None:
    """A family is told by where its modules are; the rest is common to all."""
    lengths = {a.__name__: len(Path(a.__file__).read_text().splitlines()) for a in ADAPTERS}
    assert max(lengths.values()) <= 80, lengths

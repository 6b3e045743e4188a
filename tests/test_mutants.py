"""The list of mutants is of this code, and the runner's verdicts are right. CI runs some of them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutants import __main__ as runner
from mutants.mutant import ROOT, Mutant, committed, parsed

MUTANTS = committed()


def faults(mutant: Mutant) -> Iterator[str]:
    """What is wrong with an entry of the list."""
    try:
        edited = mutant.applied((ROOT / mutant.path).read_text())
        compile(edited, mutant.path, "exec")
    except (OSError, SyntaxError, ValueError) as error:
        yield str(error)
    for test in mutant.tests:
        file, *name = test.split("::")
        if not (ROOT / file).exists():
            yield f"{mutant}: there is no {file}"
        elif name and f"def {name[0].partition('[')[0]}(" not in (ROOT / file).read_text():
            yield f"{mutant}: there is no {test}"


def test_each_is_an_edit_of_this_code_by_tests_that_exist() -> None:
    assert not [fault for mutant in MUTANTS for fault in faults(mutant)]


def test_there_are_many_and_few_survive() -> None:
    assert len({str(mutant) for mutant in MUTANTS}) == len(MUTANTS) >= 80
    assert sum(bool(mutant.survives) for mutant in MUTANTS) <= 0.05 * len(MUTANTS)


@pytest.mark.parametrize("folder", ["kernels", "fastmixer/ops"])
def test_every_file_of_kernels_and_launchers_has_some(folder: str) -> None:
    without = {f"{folder}/{path.name}" for path in (ROOT / folder).glob("[!_]*.py")} - {
        m.path for m in MUTANTS
    }
    assert not without


LIST = """
# A comment, and a list.
== a.py
@ tests/a.py tests/b.py
adds one too many
- x + 1
+ x + 2

forgets to return
-     y = x
-     return y
= nobody asks
@ tests/c.py
is never there
- nowhere
"""


def test_a_list_says_what_its_format_says() -> None:
    first, second, third = parsed(LIST)
    assert str(first) == "a.py: adds one too many" and first.tests == ["tests/a.py", "tests/b.py"]
    assert first.applied("def f(x):\n    return x + 1\n") == "def f(x):\n    return x + 2\n"
    assert second.survives == "nobody asks" and second.tests == first.tests
    assert second.applied("def f(x):\n    y = x\n    return y\n") == "def f(x):\n\n"
    assert third.tests == ["tests/c.py"] and not third.survives
    for source in ("", "nowhere nowhere"):
        with pytest.raises(
            ValueError, match=r"a\.py: is never there: the old text occurs \d times, not once"
        ):
            third.applied(source)


@pytest.mark.parametrize(
    "text",
    [
        "- old",
        "== a.py\nno tests",
        "@ tests/a.py\nno file",
        "== a.py\n@ t\n+ new",
        "== a.py\n@ t",
        "== a.py\n@ t\n@ u\nbug\n- old",
        "== a.py\n@ t\n== b.py\n@ t\nbug\n- old",
    ],
)
def test_a_line_that_has_no_place_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"line \d"):
        list(parsed(text))


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a process starts sooner
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef unused():\n    return 1\n")
    (tmp_path / "test_sums.py").write_text(
        "from sums import add\n\n\ndef test():\n    assert add(1, 2) == 3\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def mutant(old: str, new: str, survives: str = "") -> Mutant:
    return Mutant("sums.py", f"{new} for {old}", ["test_sums.py"], [old], [new], survives)


KILLED = mutant("a + b", "a - b")
LISTED = mutant("return 1", "return 3", "nobody calls it")
CRASHES = mutant("return a + b", "import os; os.abort()")
HANGS = mutant("return a + b", "import time; time.sleep(60)")


def test_killed_mutants_and_a_listed_survivor_are_as_they_should(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.delenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD")  # two at a time, by pytest-xdist
    before = (repository / "sums.py").read_text()
    assert runner.run([KILLED, LISTED, CRASHES], repository, 2, 30) == 0
    out = capfd.readouterr().out
    assert "3 mutants: 1 killed by a crash, 1 killed by a test, 1 survives as listed" in out
    assert (repository / "sums.py").read_text() == before


def test_one_that_hangs_is_killed(repository: Path, capfd: pytest.CaptureFixture) -> None:
    assert runner.run([HANGS], repository, 1, 4) == 0
    assert "1 mutants: 1 killed by the limit" in capfd.readouterr().out


def test_ctrl_c_ends_it_at_once(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator:
        while not runner._running:
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "as_completed", interrupted)
    began = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        runner.run(10 * [HANGS], repository, 1, 60)
    assert not runner._running and time.perf_counter() - began < 50


def test_what_is_not_as_it_should_fails_the_run(repository: Path, capfd: pytest.CaptureFixture) -> None:
    wrong = {
        "SURVIVED": mutant("return 1", "return 2"),
        "KILLED, NOT LISTED": mutant("a + b", "a * b", "wrongly listed"),
        "NOT TRIED": mutant("def add", "def subtract"),  # the tests are not even collected
    }
    assert runner.run([KILLED, *wrong.values()], repository, 1, 30) == 1
    out = capfd.readouterr().out
    for verdict, one in wrong.items():
        assert any(line.startswith(verdict) and str(one) in line for line in out.splitlines()), verdict
    assert "4 mutants: 1 KILLED, NOT LISTED, 1 NOT TRIED, 1 SURVIVED, 1 killed by a test" in out


def test_nothing_is_claimed_where_the_tests_fail_anyway(
    repository: Path, capfd: pytest.CaptureFixture
) -> None:
    (repository / "test_sums.py").write_text("def test():\n    assert False\n")
    assert runner.run([KILLED], repository, 1, 30) == 1
    out = capfd.readouterr().out
    assert "they do not pass without one" in out and "killed" not in out

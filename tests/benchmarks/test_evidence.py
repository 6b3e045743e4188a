"""``python -m fastmixer evidence``: its runner, and a dry run of it all on a bare machine."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from hidden_packages import HIDE
from test_evidence_plan import of_kind

from benchmarks.evidence import command, plan, runner
from benchmarks.evidence.plan import Stage
from fastmixer import cli

ROOT = Path(__file__).parents[2]


# ---- the runner ------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., runner.Runner]:
    """Runs stages in a temporary folder, where they find ``record.txt``, and returns the runner."""
    for name, seconds in {"TICK": 0.02, "POLITE": 0.5, "REPORT_EVERY": 0.1}.items():
        monkeypatch.setattr(runner, name, seconds)

    def run(*planned: Stage, seconds: float = 60.0, **options: object) -> runner.Runner:
        options = {"grace": 30.0, **options}
        made = runner.Runner(
            tmp_path, tmp_path, {**os.environ, "A": "outer", "B": "outer"},
            end=time.monotonic() + seconds, **options,
        )  # fmt: skip
        made.run(planned)
        return made

    return run


def script(name: str, code: str, seconds: float = 30.0, **options: object) -> Stage:
    return Stage(name, seconds, ("-c", code), **options)


def states(made: runner.Runner) -> dict[str, str]:
    return {name: outcome["state"] for name, outcome in made.outcomes.items()}


# Ends by no polite signal, and leaves a child, whose number is in record.txt.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
open("record.txt", "w").write(str(child.pid))
"""


def ends(process: int) -> bool:
    """Whether the process ends within seconds, or has ended."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_who_fails_hangs_or_dies_costs_only_itself(run: Callable, tmp_path: Path) -> None:
    made = run(
        script("fails", "print('what went wrong'); raise SystemExit(3)"),
        script("hangs", STUBBORN + "time.sleep(300)", seconds=3),
        script("dies", "import os; os.abort()"),
        script("last", "print('fine')"),
    )
    assert states(made) == {"fails": "exit 3", "hangs": "timed out", "dies": "signal 6", "last": "ok"}
    assert made.outcomes["fails"]["tail"] == "what went wrong\n"
    assert 3 <= made.outcomes["hangs"]["seconds"] < 20
    assert (tmp_path / "last.log").read_text() == "fine\n"
    assert ends(int((tmp_path / "record.txt").read_text()))


def test_what_a_stage_leaves_behind_ends_with_it(run: Callable, tmp_path: Path) -> None:
    assert states(run(script("leaves a child", STUBBORN))) == {"leaves a child": "ok"}
    assert ends(int((tmp_path / "record.txt").read_text()))


WRITE = "print('{}', file=open('record.txt', 'a'))"

# A second after another stage has written, however slow the machine.
WRITE_AFTER = """
import os, time
while not os.path.exists("record.txt"):
    time.sleep(0.05)
time.sleep(1)
"""


def test_what_is_timed_waits_for_the_background(run: Callable, tmp_path: Path) -> None:
    made = run(
        script("behind", WRITE_AFTER + WRITE.format("behind"), background=True),
        script("beside", WRITE.format("beside")),
        script("timed", WRITE.format("timed"), timed=True),
    )
    assert set(states(made).values()) == {"ok"}
    assert (tmp_path / "record.txt").read_text().split() == ["beside", "behind", "timed"]


def test_what_is_timed_waits_no_longer_than_the_grace(run: Callable, tmp_path: Path) -> None:
    begun = time.monotonic()
    made = run(
        script("behind", "import time; time.sleep(300)", background=True),
        script("timed", WRITE.format("timed"), timed=True),
        grace=0.2,
    )
    assert states(made) == {"behind": "cut short", "timed": "ok"} and time.monotonic() - begun < 30


def test_a_background_stage_has_a_limit_too(run: Callable) -> None:
    made = run(
        script("behind", "import time; time.sleep(300)", background=True, seconds=0.3),
        script("beside", "import time; time.sleep(1.5)"),
    )
    assert states(made) == {"behind": "timed out", "beside": "ok"}


def test_the_whole_ends_in_time(run: Callable) -> None:
    """The last stage has all that is left, and one for which nothing is left is not begun."""
    begun = time.monotonic()
    made = run(
        script("first", "import time; time.sleep(300)", seconds=12),
        script("second", "", seconds=12),
        seconds=13,
    )
    assert states(made) == {"first": "timed out", "second": "no time"} and time.monotonic() - begun < 20
    made = run(script("only", "import time; time.sleep(1)", seconds=0.1))
    assert states(made) == {"only": "ok"}


def test_what_a_stage_leaves_the_later_ones_may_use(run: Callable) -> None:
    """Up to as much again, and only if the later ones still have their own."""
    made = run(*(script(name, "", seconds=30) for name in "abc"), seconds=100)
    limits = [outcome["limit"] for outcome in made.outcomes.values()]
    assert limits[0] == pytest.approx(40, abs=0.5) and 55 < limits[1] <= 60 and limits[2] > 85
    made = run(*(script(name, "", seconds=30) for name in "abc"), seconds=50)
    limits = [outcome["limit"] for outcome in made.outcomes.values()]
    assert limits[:2] == [30, 30] and 40 < limits[2] <= 50


def test_an_interrupt_ends_what_runs(run: Callable, tmp_path: Path) -> None:
    def interrupt() -> None:
        if (tmp_path / "record.txt").exists() and "hangs" not in interrupted:
            interrupted.append("hangs")
            raise KeyboardInterrupt

    interrupted: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run(
            script("behind", "import time; time.sleep(300)", background=True),
            script("hangs", STUBBORN + "time.sleep(300)"),
            report=interrupt,
        )
    assert ends(int((tmp_path / "record.txt").read_text()))


def test_where_there_are_no_tests_a_stage_that_needs_them_says_so(run: Callable, tmp_path: Path) -> None:
    needy = script("needy", "", needs_tests=True), script("other", "")
    assert states(run(*needy)) == {"needy": "not in this installation", "other": "ok"}
    (tmp_path / "tests").mkdir()
    assert states(run(*needy)) == {"needy": "ok", "other": "ok"}


def test_a_tool_that_is_not_there_is_named(run: Callable) -> None:
    made = run(Stage("a", 20.0, ("-c", ""), tool=("env", "no-such-tool")), script("last", "", seconds=40))
    assert states(made) == {"a": "exit 127", "last": "ok"} and "no-such-tool" in made.outcomes["a"]["tail"]


def test_a_stage_has_its_own_variables_and_is_told_its_time(run: Callable, tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['A'], os.environ['B'], sys.argv[1])"
    stage = Stage("a", 20.0, ("-c", code, "{seconds}s"), environment={"B": "inner"})
    run(stage, script("last", "", seconds=40))
    assert (tmp_path / "a.log").read_text() == "outer inner 12s\n"


# ---- the command -----------------------------------------------------------------------------------------


def test_without_a_gpu_it_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(["evidence", "--out", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == (
        "evidence: needs a CUDA or ROCm GPU, and torch sees none; --dry-run shows the plumbing\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, reason",
    [
        ([], "the following arguments are required: --out"),
        (["--out", "DIR", "--minutes", "0"], "expected a number of minutes, 1 or more, got '0'"),
        (
            ["--out", "DIR", "--dry-run", "--only", "smoke,crush"],
            "unknown stage 'crush'; did you mean crash",
        ),
        (["--out", "USED", "--dry-run"], "holds the results of an earlier run; name another folder"),
    ],
)
def test_what_cannot_be_asked(
    arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folders = {"DIR": str(tmp_path / "new"), "USED": str(tmp_path)}
    (tmp_path / "summary.json").write_text("{}")
    assert cli.main(["evidence", *(folders.get(word, word) for word in arguments)]) == 2
    assert reason in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_the_exit_code_is_1_where_a_stage_did_not_what_it_should(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the run's own, which no later test shall meet
    for name, code, expected, status in (
        ("done", 0, "ok", 0),
        ("failed", 3, "ok", 1),
        ("planned", 3, "exit 3", 0),
    ):
        stage = script(name, f"raise SystemExit({code})", expected=expected)
        monkeypatch.setattr(plan, "stages", lambda *_, stage=stage: [stage])
        assert command.main(["--dry-run", "--out", str(tmp_path / name)]) == status
        assert (tmp_path / name / "summary.json").exists()


def test_stages_see_neither_the_users_settings_nor_the_users_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = ("FASTMIXER_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
    settings = ("TRITON_INTERPRET", "FASTMIXER_BACKEND", "FASTMIXER_MEMORY")
    for name in (*mine, *settings):
        monkeypatch.setenv(name, "the user's")
    environment = command.child_environment(tmp_path)
    assert not [name for name in settings if name in environment]
    folders = [Path(environment[name]) for name in mine]
    assert len(set(folders)) == len(mine)
    assert all(folder.parent == tmp_path and not list(folder.iterdir()) for folder in folders)


def start(out: Path, *arguments: str, place: Path = ROOT, **environment: str) -> subprocess.Popen:
    """A dry run in the folder ``place``, without a home directory and without this run's settings."""
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("TRITON_", "FASTMIXER_", "PYTEST"))}
    kept.pop("HOME", None)
    command = [sys.executable, "-m", "fastmixer", "evidence", "--dry-run", "--out", str(out), *arguments]
    output = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, cwd=place, env={**kept, **environment}, **output)


def test_sigterm_ends_it_with_a_summary(tmp_path: Path) -> None:
    process = start(tmp_path / "out", "--only", "hang")
    log = tmp_path / "out" / "logs" / "hang.log"
    while not log.exists():
        time.sleep(0.1)
        assert process.poll() is None
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "INTERRUPTED" in output and output.endswith((tmp_path / "out" / "summary.txt").read_text() + "\n")
    assert (
        json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]["hang"]["state"] == "cut short"
    )


WITHOUT = "sys.meta_path.insert(0, Hidden('platformdirs', 'mlp_mixer_pytorch'))\n"


def bare_checkout(folder: Path) -> dict[str, str]:
    """A copy of the checkout without git, and the variables of a Python without two of the packages."""
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, folder / "checkout", ignore=left_out)
    hidden = folder / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(HIDE + WITHOUT)
    return {"PYTHONPATH": str(hidden), "CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.slow
def test_a_dry_run_of_every_stage_on_a_bare_machine(tmp_path: Path) -> None:
    """No git, no installation, no home, neither platformdirs nor mlp-mixer-pytorch; a hang and a crash."""
    environment, out = bare_checkout(tmp_path), tmp_path / "out"
    checkout = tmp_path / "checkout"
    process = start(out, "--minutes", "40", "--commit", "abc", place=checkout, **environment)
    output, _ = process.communicate(timeout=2500)
    assert process.returncode == 0, output
    planned = plan.stages("dry run", out, "cpu")
    found = json.loads((out / "summary.json").read_text())
    assert {name: stage["state"] for name, stage in found["stages"].items()} == {
        stage.name: stage.expected for stage in planned
    }
    assert found["stages"]["hang"]["seconds"] < 30 and found["unreadable"] == {}
    assert all(row["ok"] for rows in found["rows"].values() for row in rows)
    assert {"smoke", "api", "ncu"} == set(found["rows"])
    assert len(found["rows"]["smoke"]) == 3 and found["environment"]["commit"] is None
    cells = {file: run["cells"] for file, run in found["bench"].items()}
    benches = of_kind("bench", planned)
    assert set(cells) == {f"{stage.name}.json" for stage in benches if not stage.background}
    warmed = {path.name for path in (out / "warm").iterdir()}
    assert warmed == {f"{stage.name}.json" for stage in benches if stage.background}
    for (cell,) in cells.values():
        assert cell["ok"] and cell["times_fused"]["eager"] > 0 and cell["errors"] == {}
    text = (out / "summary.txt").read_text()
    assert output.endswith(text + "\n") and "A DRY RUN ON A CPU" in text
    assert "passed" in (out / "logs" / "tests.log").read_text()
    assert "every kernel ran on cpu" in (out / "logs" / "memcheck.log").read_text()
    report = [sys.executable, "-m", "benchmarks.report", str(out / "bench" / "cpu")]
    shown = subprocess.run(report, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    assert "S/32" in shown.stdout and "abc" in shown.stdout


def install(checkout: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies what ``setup.py`` installs to where it installs it."""
    given: dict = {}

    def find_packages(folder: str) -> list[str]:
        files = (checkout / folder).glob("*/**/__init__.py")
        return [".".join(file.parent.relative_to(checkout / folder).parts) for file in files]

    setuptools = SimpleNamespace(setup=given.update, find_packages=find_packages)
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    runpy.run_path(str(checkout / "setup.py"))
    for package in given["packages"]:
        nearest = max(
            (name for name in given["package_dir"] if f"{package}.".startswith(f"{name}.")), key=len
        )
        rest = package.removeprefix(nearest).strip(".").replace(".", "/")
        source = checkout / given["package_dir"][nearest] / rest
        for pattern in ("*.py", *given["package_data"].get(package, ())):
            for file in source.glob(pattern):
                target = folder / package.replace(".", "/") / file.relative_to(source)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)


@pytest.mark.slow
def test_an_installed_package_runs_what_needs_no_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment, installed = bare_checkout(tmp_path), tmp_path / "installed"
    install(tmp_path / "checkout", installed, monkeypatch)
    shutil.rmtree(tmp_path / "checkout")
    environment["PYTHONPATH"] += f"{os.pathsep}{installed}"
    process = start(tmp_path / "out", "--only", "environment,smoke,tests", place=tmp_path, **environment)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["stages"]
    expected = {"environment": "ok", "smoke": "ok", "tests": "not in this installation"}
    assert {name: stage["state"] for name, stage in found.items()} == expected

"""``python -m benchmarks.host``: a real run over the stub driver, what it compares, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
from pathlib import Path

import pytest
import torch

from benchmarks import host, host_times

TOTALS = ("eval", "training forward", "training backward", "training")
PARTS = (
    *("eval: checks", "eval: plan", "eval: allocation and binding", "eval: launches"),
    "eval: above Triton's launcher, per launch",
)


def test_a_run_without_a_gpu_times_a_block_and_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    command = ["--sizes", "16", "32", "16", "64", "--repetitions", "5", "--json", str(tmp_path / "host.json")]
    assert host.main(command) == 0
    report = json.loads((tmp_path / "host.json").read_text())
    assert report["launches"] == 5 and report["add_us"] > 0
    assert report["protocol"]["sizes"] == [16, 32, 16, 64] and not report["protocol"]["gpu"]
    assert tuple(row["name"] for row in report["rows"]) == TOTALS + PARTS
    times = {row["name"]: row["us"] for row in report["rows"]}
    # Parts are differences of times, which on a busy machine may be anything.
    assert all(times[name] > 0 for name in TOTALS) and all(math.isfinite(us) for us in times.values())
    shown = capsys.readouterr().out
    assert "5 launches in eval" in shown and "needs a GPU" in shown
    table = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("|")][2:]
    assert [cells[0].strip() for cells in table] == [*TOTALS, *PARTS]
    assert [float(cells[1].replace(",", "")) > 0 for cells in table[: len(TOTALS)]] == [True] * len(TOTALS)


def test_the_clock_gives_microseconds_of_one_call_with_nothing_before_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A millisecond by the clock, but once in five repetitions; longer where launches are in the queue."""
    now, queued, slow = [0.0], [0], itertools.cycle([9.0, 1.0, 1.0, 1.0, 1.0])

    def launching() -> None:
        now[0] += 1e-3 * (next(slow) if queued[0] == 0 else 1.0)
        queued[0] += 1
        now[0] += 1.0 * (queued[0] > 2 * host_times.CALLS)

    def step() -> tuple[float]:
        now[0] += 2e-3
        return (2e-3,)

    monkeypatch.setattr(host_times.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(host_times.Clock, "_settle", lambda self: queued.__setitem__(0, 0))
    clock = host_times.Clock(gpu=False, repetitions=5)
    assert clock({"launching": launching}) == pytest.approx({"launching": 1000.0})
    assert clock.spans(step) == pytest.approx([2000.0])


def test_two_codes_take_turns_and_what_one_does_not_have_is_left_out() -> None:
    new = [{"rows": {"eval": us, "eval: plan": 2.0}} for us in (4.0, 5.0, 9.0)]
    old = [{"rows": {"eval": us}} for us in (20.0, 10.0, 9.0)]
    assert host._rows(new, old, {"eager": {"eval": 2.5}}) == [
        {"name": "eval", "us": 5.0, "old_us": 10.0, "new_to_old": 0.5, "eager_us": 2.5, "new_to_eager": 2.0},
        {"name": "eval: plan", "us": 2.0, "old_us": None, "new_to_old": None}
        | {"eager_us": None, "new_to_eager": None},
    ]


def test_an_unknown_revision_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "_measured", lambda *_: pytest.fail("something was measured"))
    assert host.main(["--against", "no-such-revision"]) == 2
    error = capsys.readouterr().err
    assert "--against" in error and "'no-such-revision'" in error and len(error.splitlines()) == 1


def test_what_a_failed_process_said_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*_: object) -> None:
        raise subprocess.CalledProcessError(3, ["python"], stderr="the kernels are broken")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # no stub is built
    monkeypatch.setattr(host, "_measured", measured)
    assert host.main([]) == 1
    error = capsys.readouterr().err
    assert "exit code 3" in error and "the kernels are broken" in error


def test_a_worktree_is_gone_after_the_run_even_if_it_failed(tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    for args in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run([*git, *args], check=True)
    with pytest.raises(KeyError), host._worktree(tmp_path, "HEAD") as (tree, commit):
        assert len(commit) == 40 and (tree / ".git").exists()
        raise KeyError
    listed = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True).stdout
    assert not tree.exists() and len(listed.splitlines()) == 1

"""The tuner's loop with stub tools: what is recorded, and that nothing of it is ever lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tuner_stubs
from tuner_stubs import DEFAULT, FAST, FASTER, JOBS, SLOW, SLUG, TARGET, Silent, StubTools

from fastmixer import configs
from fastmixer.configs import Library, TileConfig, tables
from fastmixer.configs.tables import Entry, TableWarning
from fastmixer.tune.command import tune
from fastmixer.tune.jobs import Job, describe


@pytest.fixture(autouse=True)
def table_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No shipped table, and a user's folder of its own; the user's file."""
    with tuner_stubs.own_tables(tmp_path, monkeypatch) as path:
        yield path


def choices() -> dict:
    """What the user's table holds now."""
    return tables.choices(tables.load(tables.user_path(SLUG)), TARGET)[0]


def keys(todo=JOBS) -> list:
    return [job[:2] for job in todo]


# ---- the loop --------------------------------------------------------------------------------------------


def test_the_fastest_right_candidate_is_recorded_and_selected() -> None:
    tools, report = StubTools((DEFAULT, FAST, FASTER, SLOW)), Silent()
    summary = tune(JOBS, tools, report)
    assert summary.ok and len(summary.recorded) == len(JOBS) == 6
    assert choices() == dict.fromkeys(keys(), FASTER)
    for op, problem, _ in JOBS:
        assert configs.choose(op, problem, TARGET) == FASTER != configs.select(op, problem, TARGET)
        assert configs.choose(op, problem, replace(TARGET, name="another-gpu")) != FASTER
    entry = summary.recorded[0]
    assert (entry.ms, entry.default_ms, entry.parity, entry.timed) == (1.0, 2.0, 0.9, "kernel")
    assert entry.when.startswith("20") and entry.when.endswith("+00:00")
    assert [job for job, *_ in report.jobs] == JOBS
    assert report.bests[-1] == "16x64x16, 4 warps, 3 stages, 1.0000 ms, 2.00x the default"
    assert "6 choices recorded, 6 of them faster" in summary.lines()[0]


def test_each_choice_is_checked_before_it_is_timed() -> None:
    tools = StubTools((DEFAULT, FAST, SLOW))
    seen = []
    tools.on_race = lambda job: seen.append(len(tools.checked))
    tune(JOBS[:1], tools, Silent())
    assert [choice for _, choice in tools.checked] == [DEFAULT, FAST, SLOW]
    assert seen == [2, 3], "the default and one more, then the third"


def test_a_slower_candidate_keeps_the_default() -> None:
    summary = tune(JOBS[:1], StubTools((DEFAULT, SLOW)), Silent())
    assert choices() == {keys()[0]: DEFAULT}
    assert (summary.recorded[0].ms, summary.recorded[0].default_ms) == (2.0, 2.0)
    assert "0 of them faster" in summary.lines()[0]


def test_faster_within_the_spread_is_not_faster() -> None:
    near = {**tuner_stubs.MILLISECONDS, FAST: 1.97}
    tune(JOBS[:1], StubTools((DEFAULT, FAST), spread=0.01, milliseconds=near), Silent())
    tune(JOBS[1:2], StubTools((DEFAULT, FAST), spread=0.001, milliseconds=near), Silent())
    assert choices() == {keys()[0]: DEFAULT, keys()[1]: FAST}, "p20 is 3% below the median, then 0.3%"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda tools: tools.uncompilable.update({FASTER: "out of registers"}),
            "does not compile: out of reg",
        ),
        (lambda tools: tools.wrong.update({FASTER: "error 9 of 1"}), "fails parity: error 9 of 1"),
    ],
)
def test_a_candidate_that_does_not_compile_or_is_wrong_is_reported_and_never_timed(spoil, message) -> None:
    tools, report = StubTools((DEFAULT, FASTER, FAST)), Silent()
    spoil(tools)
    summary = tune(JOBS[:1], tools, report)
    assert summary.ok and choices() == {keys()[0]: FAST}
    assert FASTER not in [choice for _, choice, _ in tools.raced]
    assert [line for line in report.lines if message in line and describe(FASTER) in line]


def test_a_candidate_that_cannot_be_timed_is_reported() -> None:
    tools, report = StubTools((DEFAULT, FASTER, FAST)), Silent()
    tools.failing[FASTER] = RuntimeError("a launch failed\nmore")
    assert tune(JOBS[:1], tools, report).ok
    assert choices() == {keys()[0]: FAST}
    assert report.lines[0].endswith("cannot be timed: RuntimeError: a launch failed")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("no memory left\nmore"),
    RuntimeError("CUDA error: out of memory"),
    MemoryError("malloc"),
]


@pytest.mark.parametrize("choice", [DEFAULT, FASTER])
@pytest.mark.parametrize("where", ["race", "check", "compiled", "given up"])
def test_what_fails_for_a_reason_that_is_not_its_own_leaves_the_choice_to_the_next_run(where, choice) -> None:
    for i, error in enumerate(OUT_OF_MEMORY):
        tools, report = StubTools((DEFAULT, FAST, FASTER)), Silent()
        _fail_once(tools, where, choice, error)
        summary = tune(JOBS[2 * i : 2 * i + 2], tools, report)
        assert not summary.ok and not summary.failed, "the job after it is made"
        assert [entry.key for entry in summary.recorded] == [keys()[2 * i + 1]]
        assert str(JOBS[2 * i]) in report.lines[0] and "left for the next run" in report.lines[0]
        named = FAST if (where, choice) == ("race", DEFAULT) else choice
        assert f"NOT RECORDED {JOBS[2 * i]}: {describe(named)} " in summary.lines()[1]
        assert tune(JOBS[2 * i : 2 * i + 1], StubTools((DEFAULT, FAST, FASTER)), Silent()).ok
    assert choices() == dict.fromkeys(keys(), FASTER)


def _fail_once(tools: StubTools, where: str, choice, error: Exception) -> None:
    """In the first job that comes; a race fails with ``choice`` on either side."""
    first: list[Job] = []

    def failing(job, one, *against):
        first[:] = first or [job]
        if job == first[0] and choice in (one, *against):
            raise error
        return call(job, one, *against)

    def prepare(job):
        futures = call(job)
        first[:] = first or [job]
        future = tuner_stubs.given_up() if where == "given up" else tuner_stubs.raising(error)
        return {**futures, choice: future} if job == first[0] else futures

    name = where if where in ("race", "check") else "prepare"
    call = getattr(tools, name)
    setattr(tools, name, prepare if name == "prepare" else failing)


def test_when_no_candidate_is_left_the_default_is_recorded_untimed() -> None:
    tools = StubTools((DEFAULT, FAST))
    tools.wrong[FAST] = "far off"
    summary = tune(JOBS[:1], tools, Silent())
    assert summary.recorded[0].choice == DEFAULT and summary.recorded[0].ms is None
    assert choices() == {keys()[0]: DEFAULT}


def test_a_default_that_fails_is_a_failure_and_nothing_is_recorded_for_it() -> None:
    tools, report = StubTools(), Silent()
    tools.wrong[DEFAULT] = "far off"
    summary = tune(JOBS[:2], tools, report)
    assert not summary.ok and len(summary.failed) == 2 and tools.raced == []
    assert "the default, 16x16x16, 4 warps, 3 stages: fails parity: far off" in summary.failed[0]
    assert not tables.user_path(SLUG).exists()
    assert summary.lines()[1].startswith("FAILED channel_fc1 mixer_b16_224 batch 1 bfloat16")


def test_an_op_without_alternatives_is_skipped() -> None:
    tools = StubTools((DEFAULT,))
    summary = tune(JOBS[:1], tools, Silent())
    assert summary.ok and summary.skipped == 1 and tools.checked == []


def test_a_library_races_last_against_the_best_tiles() -> None:
    faster = {**tuner_stubs.MILLISECONDS, Library.ATEN: 1.2}
    tools, report = StubTools((DEFAULT, Library.ATEN, FAST), milliseconds=faster), Silent()
    summary = tune(JOBS[:1], tools, report)
    assert [(choice, against) for _, choice, against in tools.raced] == [
        (FAST, DEFAULT),
        (Library.ATEN, FAST),
        (Library.ATEN, DEFAULT),
    ]
    entry = summary.recorded[0]
    assert (entry.choice, entry.ms, entry.default_ms, entry.timed) == (Library.ATEN, 1.2, 2.0, "half")
    assert report.bests[-1] == "aten, 1.2000 ms, 1.67x the default"


def test_a_lost_device_ends_the_run_and_keeps_what_was_recorded() -> None:
    def lose(job) -> None:
        if job == JOBS[2]:
            tools.lost = True
            raise RuntimeError("illegal address")

    tools = StubTools(on_race=lose)
    summary = tune(JOBS, tools, Silent())
    assert not summary.ok and summary.left == 4 and list(choices()) == keys()[:2]
    assert (
        "the GPU is lost: illegal address" in summary.failed[0]
        and "stopped: 4 choices left" in summary.lines()[-1]
    )


def test_a_table_that_cannot_be_written_ends_the_run() -> None:
    tools = StubTools()
    tools.record = lambda entry: (_ for _ in ()).throw(OSError("disk full"))
    summary = tune(JOBS, tools, Silent())
    assert not summary.ok and "disk full" in summary.failed[0] and summary.recorded == []


# ---- resume, budget, interruption ------------------------------------------------------------------------


def test_recorded_choices_are_skipped_unless_forced() -> None:
    tune(JOBS[:2], StubTools(), Silent())
    again = StubTools((DEFAULT, FASTER))
    summary = tune(JOBS, again, Silent())
    assert summary.skipped == 2 and {job for job, *_ in again.raced} == set(JOBS[2:])
    assert [choices()[key] for key in keys()] == [FAST] * 2 + [FASTER] * 4
    forced = StubTools((DEFAULT, FASTER))
    assert tune(JOBS, forced, Silent(), force=True).skipped == 0
    assert set(choices().values()) == {FASTER}


def test_what_is_shipped_is_said_and_skipped() -> None:
    tune(JOBS[:1], StubTools(), Silent())
    os.replace(tables.user_path(SLUG), tables.shipped_path(SLUG))
    tables.table_of.cache_clear()
    report, tools = Silent(), StubTools()
    assert tune(JOBS[:1], tools, report).skipped == 1 and tools.raced == []
    assert "the shipped table has it; --force tunes it anyway" in report.lines[0]
    assert tune(JOBS[:1], tools, report, force=True).skipped == 0 and tools.raced
    assert "tuned because of --force; what is measured here goes before it" in report.lines[1]


def test_entries_of_other_code_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tables, "triton_version", lambda: "0.0.0")
        tables.record(SLUG, Entry(*JOBS[0][:2], FASTER))
    tools = StubTools()
    assert tune(JOBS[:1], tools, Silent()).skipped == 0 and tools.raced
    assert len(tables.load(tables.user_path(SLUG)).entries) == 2 and choices() == {keys()[0]: FAST}


def test_the_budget_ends_the_run_between_two_choices_and_drops_the_one_in_work() -> None:
    now = [100.0]

    def ten_seconds(job) -> None:
        now[0] += 10.0

    tools = StubTools((DEFAULT, SLOW, FAST), on_race=ten_seconds)
    summary = tune(JOBS, tools, Silent(), budget=50.0, clock=lambda: now[0])
    assert summary.ok, "a budget that ends is no fault"
    assert len(tools.raced) == 5, "two races for each of two choices, and one of the third"
    assert list(choices()) == keys()[:2] and summary.left == 4
    assert "out of budget: 4 choices left" in summary.lines()[-1]
    more = tune(JOBS, StubTools(), Silent(), budget=50.0, clock=lambda: now[0])
    assert more.skipped == 2 and more.left == 0 and list(choices()) == keys()


def test_ctrl_c_ends_with_a_summary_of_what_is_kept() -> None:
    def interrupt(job) -> None:
        if job == JOBS[3]:
            raise KeyboardInterrupt

    summary = tune(JOBS, StubTools(on_race=interrupt), Silent())
    assert summary.interrupted and not summary.ok and summary.left == 3
    assert list(choices()) == keys()[:3]
    assert summary.lines()[-1].startswith("interrupted: 3 choices left; what is recorded is kept")


def test_the_next_candidates_compile_while_these_are_timed_but_not_beside_a_half() -> None:
    half = Job("token_half", JOBS[0].problem)
    tools = StubTools()
    prepared_at: dict[Job, int] = {}
    tools.on_race = lambda job: prepared_at.setdefault(job, len(tools.prepared))
    tools.record = lambda entry: None
    tune([JOBS[0], half, JOBS[1]], tools, Silent())
    assert prepared_at == {JOBS[0]: 2, half: 2, JOBS[1]: 3} and len(tools.prepared) == 3


def started(order: str, hang_at: int = -1) -> subprocess.Popen:
    """The stub tuner in a process of its own; it has said that it starts."""
    process = subprocess.Popen(
        [sys.executable, tuner_stubs.__file__, order, str(hang_at)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "starts\n"
    return process


def test_a_killed_tuner_loses_nothing_and_is_resumed() -> None:
    process = started("forward", hang_at=2)
    try:
        assert process.stdout.readline() == "hangs\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
    finally:
        process.kill()
        process.stdout.close()
    assert choices() == dict.fromkeys(keys()[:2], FAST)
    tools = StubTools()
    summary = tune(JOBS, tools, Silent())
    assert summary.skipped == 2 and {job for job, *_ in tools.raced} == set(JOBS[2:])
    assert choices() == dict.fromkeys(keys(), FAST)


def test_two_tuners_at_once_lose_nothing() -> None:
    other = started("backward")  # and this process meanwhile:
    assert tune(JOBS, StubTools(), Silent()).ok
    assert other.wait(60) == 0
    other.stdout.close()
    assert choices() == dict.fromkeys(keys(), FAST)


@pytest.mark.parametrize("content", ["not JSON", '{"schema": 2, "device": "x"}', '{"mine": true}'])
def test_a_corrupt_table_is_set_aside_once_and_tuning_goes_on(content: str, table_path: Path) -> None:
    table_path.parent.mkdir(parents=True)
    table_path.write_text(content)
    with pytest.warns(TableWarning, match="corrupt-1") as warned:
        assert tune(JOBS, StubTools(), Silent()).ok
    assert sum("it is kept as" in str(one.message) for one in warned) == 1 and choices() == dict.fromkeys(
        keys(), FAST
    )
    assert table_path.with_name(f"{table_path.name}.corrupt-1").read_text() == content


def test_a_clock_that_drifts_between_two_races_decides_nothing() -> None:
    """In the second race everything takes twice as long; FASTER is still the fastest."""
    tools, slower = StubTools((DEFAULT, FAST, FASTER)), {FAST: 1.0, FASTER: 2.0}
    race = tools.race
    tools.race = lambda job, choice, against: [
        [ms * slower[choice] for ms in times] for times in race(job, choice, against)
    ]
    entry = tune(JOBS[:1], tools, Silent()).recorded[0]
    assert (entry.choice, entry.ms, entry.default_ms) == (FASTER, 2.0, 4.0)


@pytest.mark.parametrize(("candidate_ms", "expected"), [(1.99, FAST), (2.0, DEFAULT)])
def test_statistics_of_times(candidate_ms: float, expected: TileConfig) -> None:
    tools, baseline = StubTools((DEFAULT, FAST)), [*map(float, range(10)), 100.0]
    tools.race = lambda job, choice, against: ([0.0, candidate_ms, 9.0], baseline)
    entry = tune(JOBS[:1], tools, Silent()).recorded[0]
    assert entry.choice == expected, "the median against the quantile of 20%, which is 2.0"
    assert (entry.ms, entry.default_ms) == (candidate_ms if expected == FAST else 5.0, 5.0)

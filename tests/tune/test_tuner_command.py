"""What there is to tune, what the tuner shows, and its command."""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tuner_stubs
from tuner_stubs import DEFAULT, FAST, JOBS, SLOW, TARGET, StubTools

from fastmixer import cli, configs
from fastmixer.configs import INTERPRETER, TARGETS, Library, Problem, TileConfig, tables
from fastmixer.configs.designs import DESIGNS
from fastmixer.configs.ops import HALVES, WHOLE_HALVES
from fastmixer.tune import command, machine
from fastmixer.tune.command import Report, tune
from fastmixer.tune.jobs import ALL, BACKWARD, FORWARD, Job, jobs
from fastmixer.tune.machine import contenders
from fastmixer.tune.trial import Trial
from fastmixer.usage import UsageError, progress_bar


@pytest.fixture(autouse=True)
def table_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """No shipped table, and a user's folder of its own; the user's file."""
    with tuner_stubs.own_tables(tmp_path, monkeypatch) as path:
        yield path


# ---- what there is to tune -------------------------------------------------------------------------------


def test_jobs_come_by_importance_each_once() -> None:
    target = TARGETS["sm_90"]
    found = jobs(["B/16", "mixer_b16_224", "S/32"], [60, 64], ["bfloat16", "autocast"], target, backward=True)
    assert len({job[:2] for job in found}) == len(found), "60 and 64 are one bucket"
    groups = [
        next(i for i, ops in enumerate((FORWARD, WHOLE_HALVES, BACKWARD)) if j.op in ops) for j in found
    ]
    assert groups == sorted(groups) and set(groups) == {0, 1, 2}
    assert found[0] == ("channel_fc1", Problem(64, 196, 768, 3072, *[torch.bfloat16] * 2), "mixer_b16_224")
    dtypes = {job.problem[4:6] for job in found}
    assert dtypes == {(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)}
    forward = jobs(["B/16"], [1], ["float16"], target)
    assert [job.op for job in forward] == [*FORWARD[:3], *WHOLE_HALVES]


def test_ops_that_are_never_launched_are_no_jobs() -> None:
    together = jobs(["B/32"], [1], ["bfloat16"], TARGETS["sm_90"], backward=True)
    apart = jobs(["B/16"], [1], ["bfloat16"], TARGETS["sm_90"], backward=True)
    assert "token_wgrad_fc2" not in {job.op for job in together}
    assert "token_wgrad_fc2" in {job.op for job in apart}
    with pytest.raises(UsageError, match="--op: none of the models runs token_fc1"):
        jobs(["B/16"], [1], ["bfloat16"], TARGETS["sm_90"], ops=["token_fc1"])


def test_contenders_are_the_default_few_predicted_ones_and_pytorch() -> None:
    target = configs.DEVICES["nvidia-h200"].target
    for job in jobs(["B/16", "B/32"], [1, 256], ["bfloat16", "float32"], target, backward=True):
        found = contenders(job, target)
        assert found[0] == configs.select(job.op, job.problem, target)
        assert len(set(found)) == len(found) <= machine.MOST + 3
        if job.op in HALVES:
            assert set(found) == {None, Library.REFERENCE}
        assert (Library.ATEN in found) == (job.op in ("channel_fc1", "channel_fc2"))
        assert (Library.ADDMM in found) == (job.op == "channel_fc2") and Library.ATEN_GELU not in found


def test_tanhs_product_is_tried_for_tanh() -> None:
    target = configs.DEVICES["nvidia-h200"].target
    fc1 = jobs(["B/16"], [1], ["bfloat16"], target, gelu="tanh", ops=["channel_fc1"])[0]
    assert Library.ATEN_GELU in contenders(fc1, target) and str(fc1).endswith("bfloat16 tanh")


@pytest.mark.parametrize(
    "op, choice", [("channel_fc1", Library.ATEN_GELU), ("channel_fc2", Library.ADDMM), ("channel_fc2", FAST)]
)
def test_a_race_begins_with_the_same_inputs_every_time(op: str, choice) -> None:
    """Also where the residual is added in place."""
    problem = Problem(2, 18, 32, 64, *[torch.float16] * 2, "tanh")
    trial = Trial(op, problem, INTERPRETER, torch.device("cpu"), configs.select)
    x, before = trial.inputs[0][0], trial.inputs[0][0].clone()
    assert trial.check(choice) < 1.25
    first, again = (trial.calls(choice, "half")[0]()["output"] for _ in range(2))
    assert torch.equal(first, again) and torch.equal(x, before)


def test_what_is_predicted_far_slower_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = [TileConfig(16 << i, 64, 64) for i in range(12)]
    predicted = {t: SimpleNamespace(seconds=1.0 + 0.2 * i) for i, t in enumerate(tiles) if i != 1}
    monkeypatch.setattr(machine, "candidates", lambda *_: tiles[::-1])
    monkeypatch.setattr(configs, "select", lambda *_: DEFAULT)
    monkeypatch.setattr(machine.cost, "predict_launch", lambda op, problem, tile, _: predicted.get(tile))
    kept = contenders(Job("channel_fc1", JOBS[0].problem), TARGET)[1:-1]
    assert kept == [tiles[0], *tiles[2:6], tiles[1]], "up to twice the best, the unknown last"
    predicted.update(dict.fromkeys(tiles, SimpleNamespace(seconds=1.0)))
    assert len(contenders(Job("channel_fc1", JOBS[0].problem), TARGET)[1:-1]) == machine.MOST


# ---- what the user sees ----------------------------------------------------------------------------------


def test_nothing_is_tuned_while_designs_are_forced(capsys: pytest.CaptureFixture) -> None:
    """What is timed of a half would be recorded as what runs without."""
    with configs.forced(channel_fc1="aten"):
        assert cli.main(["tune"]) == 2
    assert "unset FASTMIXER_DESIGN" in capsys.readouterr().err


def test_every_design_is_tried() -> None:
    """Whatever is predicted of it."""
    for op in DESIGNS:
        sizes = (784, 768, 384) if op.startswith("token") else (196, 768, 3072)
        problem = Problem(64, *sizes, torch.bfloat16, torch.bfloat16)
        target = configs.DEVICES["nvidia-h200"].target
        tried = contenders(Job(op, problem), target)
        assert set(configs.designs_of(op, problem, target).values()) <= set(tried)


def test_without_a_terminal_there_are_plain_lines(capsys: pytest.CaptureFixture) -> None:
    with progress_bar("tuning") as bar:
        tune(JOBS[:1], StubTools((DEFAULT, FAST, SLOW)), Report(bar))
    assert capsys.readouterr().err.splitlines() == [
        "[1/6] channel_fc1 mixer_b16_224 batch 1 bfloat16".replace("/6", "/1"),
        "  best so far: 16x32x16, 4 warps, 3 stages, 1.5000 ms, 1.33x the default",
    ]


def test_on_a_terminal_there_is_a_bar_with_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    tools = StubTools((DEFAULT, FAST))
    tools.wrong[FAST] = "[far] off"
    with progress_bar("tuning") as bar:
        tune(JOBS[:1], tools, Report(bar))
        tune(JOBS[1:2], StubTools((DEFAULT, FAST)), Report(bar))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "[far] off" in shown, "a line to stay, its brackets no markup"
    assert str(JOBS[1]) in shown and "1.33x the default" in shown


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    calls = []
    monkeypatch.setattr(command, "run", lambda *args, **options: calls.append((args, options)) or 1)
    return calls


def test_tune_has_defaults_and_passes_its_exit_code_on(asked: list) -> None:
    assert cli.main(["tune"]) == 1
    options = dict(gelu="none", backward=False, ops=(), budget=120.0, workers=None, force=False)
    assert asked == [((["mixer_b16_224"], [64], ["bfloat16"]), options)]


def test_tune_gets_its_options(asked: list) -> None:
    line = "tune --model B/16 S/32 --batch 1 8 --batch 64 --dtype bf16 autocast --gelu tanh --backward"
    cli.main([*line.split(), "--op", "channel_fc1", "token_half", "--budget", "5m", "--jobs", "3", "--force"])
    ops = ["channel_fc1", "token_half"]
    options = dict(gelu="tanh", backward=True, ops=ops, budget=300.0, workers=3, force=True)
    assert asked == [((["B/16", "S/32"], [1, 8, 64], ["bfloat16", "autocast"]), options)]


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("120s", 120), ("5m", 300), ("1.5h", 5400), ("0.5S", 0.5)]
)
def test_budgets(text: str, expected: float, asked: list) -> None:
    cli.main(["tune", "--budget", text])
    assert asked[0][1]["budget"] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "soon"], "expected a time such as 90, 120s, 5m or 1h, got 'soon'"),
        (["--budget", "0"], "got '0'"),
        (["--budget=-5"], "got '-5'"),
        (["--budget", "5 minutes"], "got '5 minutes'"),
        (["--dtype", "int8"], "expected bf16, fp16, fp32 or autocast, got 'int8'"),
        (["--batch", "0"], "expected a whole number above 0, got '0'"),
        (["--jobs", "none"], "got 'none'"),
        (["--op"], "--op"),
    ],
)
def test_bad_values_are_named(arguments: list, message: str, asked: list, capsys) -> None:
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err and asked == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "B/17"], "unknown model 'B/17'; did you mean B/16"),
        (["--op", "channel_fc3"], "unknown op 'channel_fc3'; did you mean channel_fc"),
        ([], "tune needs a CUDA or ROCm GPU, and torch sees none: nothing was tuned"),
    ],
)
def test_what_cannot_be_tuned_exits_with_2(arguments: list, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1 and output.out == ""


@pytest.fixture
def run_on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, StubTools], int]:
    """Runs the command for one op on a GPU of an arch that is not there; the batch is the arch."""
    properties = type("Properties", (), {"name": "Sample GPU"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(command.dispatch, "why_not_triton", lambda *_: None)

    def run(arch: int, tools: StubTools) -> int:
        monkeypatch.setattr(command, "MachineTools", lambda *_: tools)
        monkeypatch.setattr(configs, "target_of", lambda device: replace(TARGET, arch=arch))
        return command.run(["B/16"], [arch], ["bfloat16"], ops=["channel_fc1"])

    return run


def test_an_arch_that_is_not_known_ahead_of_time_is_tuned_and_said(run_on: Callable, capsys) -> None:
    for arch, said in ((103, True), (90, False)):
        assert run_on(arch, StubTools((DEFAULT, FAST))) == 0
        output = capsys.readouterr()
        line = "arch 103: unknown ahead of time, so candidates compile when they first run"
        assert (line in output.out + output.err) == said


def test_the_exit_code_is_1_where_a_default_fails_a_choice_is_not_made_or_ctrl_c_ended_it(
    run_on: Callable, capsys
) -> None:
    def interrupt(job: Job) -> None:
        raise KeyboardInterrupt

    wrong, unfinished = StubTools((DEFAULT, FAST)), StubTools((DEFAULT, FAST))
    wrong.wrong[DEFAULT] = "error 9 of 1"
    unfinished.failing[FAST] = MemoryError("malloc")
    interrupted = StubTools((DEFAULT, FAST), on_race=interrupt)
    for tools, said in ((wrong, "FAILED"), (unfinished, "NOT RECORDED"), (interrupted, "interrupted")):
        assert run_on(90, tools) == 1
        assert said in capsys.readouterr().out
    assert run_on(90, StubTools((DEFAULT, FAST))) == 0


def test_the_help_says_what_autocast_means(capsys) -> None:
    with contextlib.suppress(SystemExit):
        cli.main(["tune", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "autocast: blocks whose input is fp32; inside timm's models autocast is bf16" in shown


@pytest.mark.gpu
def test_tuning_on_a_gpu_records_what_is_then_chosen(capsys: pytest.CaptureFixture) -> None:
    todo = ["token_mixing", "channel_fc1", "token_half", "token_dgrad"]
    assert command.run(["S/32"], [2], ["bfloat16"], ops=todo, budget=600) == 0
    target = configs.target_of(torch.device("cuda"))
    found, _ = tables.choices(tables.load(tables.user_path(target.name)), target)
    assert {op for op, _ in found} == set(todo) and set(todo) <= set(ALL)
    for (op, problem), choice in found.items():
        assert configs.choose(op, problem, target) == choice
    assert "choices recorded" in capsys.readouterr().out

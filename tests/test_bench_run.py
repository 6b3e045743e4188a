"""A run of the benchmark and its command: the file, kill and resume, the time limit, exit codes, a CPU."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from benchmark_stubs import CEILINGS, HEADER, TINY, StubTimer, no_inductor, run

from benchmarks import bench, cells, files, measure, opponents, runs, schema
from fastmixer import cli

__all__ = ["no_inductor"]
CASES = [TINY, replace(TINY, model="other")]


def test_a_run_writes_a_valid_report_and_leaves_no_partial_file(tmp_path):
    lines = []
    torch.manual_seed(0)
    output, measured = run(tmp_path, StubTimer(), log=lines.append, stage="block")
    report = measured()
    assert json.loads(output.read_text()) == report
    schema.validate(report)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert (report["complete"], report["stage"]) == (True, "block")
    assert report["environment"] == HEADER["environment"]
    assert set(report["footnotes"]) >= {"ms", "graph_ms", "flops", "bytes", "parity", "ratio_to_best"}
    assert len(lines) == 2
    assert lines[1].split()[:5] == ["block", "tiny", "2", "float32", "forward"]
    assert "1.0000" in lines[1] and "2.00x" in lines[1] and "eager 4.0000" in lines[1]


def test_the_line_of_a_cell_says_what_went_wrong():
    cell = cells.empty_cell(TINY, torch.device("cpu"))
    cell["parity"]["fused"] = {"ok": False, "failed": ["output"], "ratio": None}
    cell["errors"]["vit"] = "RuntimeError: out of memory"
    line = runs.table_row(cell)
    assert "PARITY FAILED, not timed: fused: output" in line
    assert "vit: RuntimeError: out of memory" in line


def test_a_killed_run_keeps_its_cells_and_the_last_report_and_can_be_resumed(tmp_path):
    output, complete = run(tmp_path, StubTimer(), CASES)
    before = complete()
    _, killed = run(tmp_path, StubTimer(interrupt_at=2), CASES)
    with pytest.raises(KeyboardInterrupt):
        killed()
    assert json.loads(output.read_text()) == before
    partial = json.loads(files.partial_path(output).read_text())
    schema.validate(partial)
    assert partial["complete"] is False
    assert [cell["model"] for cell in partial["cells"]] == ["tiny"]

    timer = StubTimer()
    _, resumed = run(tmp_path, timer, CASES, resume=True)
    report = resumed()
    assert len(timer.seen) == 1
    assert report["cells"][0] == partial["cells"][0]
    assert [cell["model"] for cell in report["cells"]] == ["tiny", "other"]
    assert report["started"] == partial["started"]
    assert not files.partial_path(output).exists()


def test_all_kernels_of_a_case_are_resumed_together(tmp_path):
    cases = [replace(case, level="kernel") for case in CASES]
    torch.manual_seed(0)
    _, killed = run(tmp_path, StubTimer(interrupt_at=5), cases, names=("fused",))
    with pytest.raises(KeyboardInterrupt):
        killed()
    timer = StubTimer()
    _, resumed = run(tmp_path, timer, cases, names=("fused",), resume=True)
    report = resumed()
    assert len(timer.seen) == 4
    assert [cell["op"] for cell in report["cells"]] == [
        "row_moments", "token_mixing", "channel_fc1", "channel_fc2",
    ] * 2  # fmt: skip


def test_what_failed_is_tried_again_after_what_was_never_tried(tmp_path, monkeypatch):
    made = cells.make_subject

    def fails_once(case, device):
        if case.model == "tiny" and not tried:
            tried.append(case)
            raise RuntimeError("sample failure")
        order.append(case.model)
        return made(case, device)

    tried, order = [], []
    monkeypatch.setattr(cells, "make_subject", fails_once)
    _, killed = run(tmp_path, StubTimer(interrupt_at=2), [*CASES, replace(TINY, model="third")])
    with pytest.raises(KeyboardInterrupt):
        killed()
    order.clear()
    _, resumed = run(tmp_path, StubTimer(), [*CASES, replace(TINY, model="third")], resume=True)
    report = resumed()
    assert order == ["third", "tiny"]
    assert sorted(cell["model"] for cell in report["cells"]) == ["other", "third", "tiny"]
    assert all(cell["ok"] for cell in report["cells"])


def test_the_time_limit_stops_before_a_case_that_would_end_after_it(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: clock[0])

    def takes_a_minute(case, bench):
        clock[0] += 60.0
        return [cells.empty_cell(case, bench.device)]

    monkeypatch.setattr(cells, "measure_case", takes_a_minute)
    cases = [replace(TINY, model=f"m{i}") for i in range(5)]
    lines = []
    output, limited = run(tmp_path, StubTimer(), cases, seconds=179.0, log=lines.append)
    report = limited()
    assert [cell["model"] for cell in report["cells"]] == ["m0", "m1"]
    assert report["complete"] is False and not output.exists()
    assert "3 of 5 cases left" in lines[-1]
    clock[0] = 0.0
    _, resumed = run(tmp_path, StubTimer(), cases, seconds=1e9, resume=True)
    assert resumed()["complete"] is True
    # A limit that is shorter than any case still gets one done.
    _, hurried = run(tmp_path / "hurried", StubTimer(), cases, seconds=1.0)
    assert len(hurried()["cells"]) == 1
    # What was spent before the run counts, and a final run says what it skipped.
    clock[0] = 100.0
    output, final = run(tmp_path / "final", StubTimer(), cases, seconds=200.0, began=0.0, final=True)
    report = final()
    assert report["complete"] is True and json.loads(output.read_text()) == report
    assert [cell["model"] for cell in report["cells"]] == ["m0"]
    assert report["protocol"]["skipped"] == [f"block m{i} 2 float32 forward" for i in range(1, 5)]


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as the command can tell; returns what a run was asked for."""
    asked = {}

    def fake_run(cases, bench, output, **options):
        asked.update(cases=cases, bench=bench, output=output, **options)
        return {"complete": asked.get("completes", True), "cells": asked.get("cells", [])}

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(files, "device_name", lambda device: "Sample GPU")
    monkeypatch.setattr(files, "environment", lambda device, commit: {"gpu": "Sample GPU", "commit": commit})
    monkeypatch.setattr(measure, "ceilings", lambda device, dtypes: {**CEILINGS, "dtypes": dtypes})
    monkeypatch.setattr(measure, "clocks", lambda device: None)
    monkeypatch.setattr(opponents, "left_out", lambda names, device: {"flax": "jax and flax not installed"})
    monkeypatch.setattr(files, "results_folder", lambda name: tmp_path / files.slug(name))
    monkeypatch.setattr(runs, "run", fake_run)
    return asked


def test_the_full_run_is_the_whole_grid(gpu):
    start = time.monotonic()
    assert bench.main([]) == 0
    assert start <= gpu["began"] <= time.monotonic() and gpu["final"] is False
    combinations = {case.key for case in gpu["cases"]}
    assert len(combinations) == len(gpu["cases"]) == 5 * 7 * 5 * 4 * 2
    assert gpu["seconds"] == float("inf") and gpu["stage"] is None
    assert "flax" not in gpu["bench"].names
    assert gpu["header"]["protocol"]["left_out"] == {"flax": "jax and flax not installed"}
    assert gpu["header"]["ceilings"]["dtypes"]["autocast"] == torch.bfloat16
    assert gpu["output"].parent.name == "sample-gpu"


def test_the_command_says_what_to_measure(gpu, tmp_path):
    arguments = "--stage token --models S/32 B/16 --batch 8 --dtype autocast bf16 --direction forward"
    arguments += " --opponents eager --time-limit 9m --commit f00 --output"
    assert bench.main([*arguments.split(), str(tmp_path / "r.json")]) == 0
    assert [case.key for case in gpu["cases"]] == [
        ("token", model, 8, dtype, "forward")
        for dtype in ("autocast", "bfloat16")
        for model in ("mixer_s32_224", "mixer_b16_224")
    ]
    assert gpu["bench"].names == ("fused", "eager")
    assert gpu["seconds"] == 540.0
    assert gpu["output"] == tmp_path / "r.json"
    assert gpu["header"]["environment"]["commit"] == "f00"


def test_quick_is_a_plan_of_every_level_that_fits_five_minutes(gpu):
    assert bench.main(["--quick"]) == 0
    assert {case.level for case in gpu["cases"]} == set(schema.LEVELS)
    assert {(case.model, case.dtype) for case in gpu["cases"]} == {("mixer_b16_224", "bfloat16")}
    assert gpu["seconds"] == 300.0 and gpu["final"] is True
    assert gpu["header"]["protocol"]["quick"] is True
    assert gpu["output"].name.startswith("bench-quick-")
    assert gpu["bench"].timer.seconds < measure.CudaTimer().seconds
    assert bench.main(["--quick", "--stage", "block", "--time-limit", "1h"]) == 0
    assert {case.level for case in gpu["cases"]} == {"block"}
    assert gpu["seconds"] == 3600.0


def test_every_run_has_a_file_of_its_own_and_resume_finds_the_last(gpu, tmp_path):
    folder = tmp_path / "sample-gpu"
    folder.mkdir()
    for name in ("bench-20260101T000000Z", "bench-20260102T000000Z", "bench-block-20260103T000000Z"):
        (folder / f"{name}.partial.json").write_text("{}")
    bench.main([])
    assert not gpu["output"].exists() and not files.partial_path(gpu["output"]).exists()
    bench.main(["--resume"])
    assert gpu["resume"] is True
    assert gpu["output"] == folder / "bench-20260102T000000Z.json"
    bench.main(["--resume", "--stage", "block"])
    assert gpu["output"] == folder / "bench-block-20260103T000000Z.json"
    bench.main(["--resume", "--quick"])
    assert gpu["output"].name > "bench-quick-2026"


@pytest.mark.parametrize(
    ("result", "code"),
    [
        ({"cells": [{"ok": True, "errors": {}}]}, 0),
        ({"cells": [{"ok": False, "errors": {}}]}, 1),
        ({"cells": [{"ok": True, "errors": {"compile": "x"}}]}, 1),
        ({"completes": False}, 3),
    ],
)
def test_exit_codes(gpu, result, code):
    gpu.update(result)
    assert bench.main(["--quick"]) == code


def test_an_interrupted_run_says_how_to_go_on(gpu, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "run", interrupted)
    assert bench.main(["--quick"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_an_unfinished_file_that_cannot_be_continued_is_refused(gpu, monkeypatch, capsys):
    def refuses(*args, **options):
        raise schema.PartialFileError("sample.partial.json cannot be continued")

    monkeypatch.setattr(runs, "run", refuses)
    assert bench.main(["--resume"]) == 2
    assert "sample.partial.json cannot be continued" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "B/17"], "unknown model 'B/17'"),
        (["--batch", "0"], "0"),
        (["--dtype", "int8"], "int8"),
        (["--stage", "blocks"], "blocks"),
        (["--time-limit", "9x"], "expected a time such as 90, 120s, 5m or 1h, got '9x'"),
        (["--opponents", "tensorflow"], "tensorflow"),
        (["--device", "cpu", "--stage", "token"], "--stage token times GPU kernels"),
        (["--device", "cpu", "--quick"], "--quick is a plan for a GPU"),
    ],
)
def test_bad_arguments_exit_with_2(gpu, arguments, message, capsys):
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert gpu == {}


def test_without_a_gpu_nothing_is_measured_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--quick", "--output", str(tmp_path / "r.json")]) == 2
    assert "needs a CUDA or ROCm GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "--device", "cpu"]])
def test_the_interpreter_is_refused_as_a_thing_to_time(arguments, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main(arguments) == 2
    assert "TRITON_INTERPRET=1 is set" in capsys.readouterr().err


def test_without_timm_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--device", "cpu"]) == 2
    assert 'pip install "fastmixer[demo]"' in capsys.readouterr().err


def test_help_needs_no_torch():
    code = (
        "import sys; from fastmixer import cli; code = cli.main(['bench', '--help']); "
        "print(code, *{'torch', 'triton', 'timm'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--time-limit" in result.stdout
    assert result.stdout.splitlines()[-1] == "0"


def test_on_a_cpu_block_and_model_are_timed_as_users_run_them(tmp_path):
    """In a Python without the interpreter: a real run of the command, with real times."""
    output = tmp_path / "r.json"
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TRITON_", "FASTMIXER_BACKEND", "FASTMIXER_MEMORY"))
    }
    arguments = (
        "--device cpu --models S/32 --batch 1 --dtype fp32 --direction forward --opponents eager fused"
    )
    # The smallest model made smaller.
    code = (
        "import dataclasses, sys\n"
        "from fastmixer.benchmarks import levels\n"
        "sizes = dict(channels=32, token_hidden=16, channel_hidden=64, blocks=1)\n"
        "shape_of = levels.shape_of\n"
        "levels.shape_of = lambda name: dataclasses.replace(shape_of(name), **sizes)\n"
    )
    code += "from fastmixer import cli\nsys.exit(cli.main(['bench', *sys.argv[1:]]))"
    command = [sys.executable, "-c", code, *arguments.split(), "--output", str(output)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    schema.validate(report)
    assert report["ceilings"] is None
    assert [cell["level"] for cell in report["cells"]] == ["block", "model"]
    for cell in report["cells"]:
        assert cell["device"] == "cpu" and cell["ok"] and set(cell["opponents"]) == {"fused", "eager"}
        assert cell["opponents"]["fused"]["ms"]["calls"] >= 25
        assert cell["best_opponent"] == "eager" and cell["ratio_to_best"] > 0


def test_every_reported_footnote_is_about_something_in_the_file():
    from benchmarks.footnotes import FOOTNOTES

    fields = set(schema.OPPONENT) | set(schema.CELL) | set(schema.OPPONENTS) | set(schema.LEVELS)
    assert set(FOOTNOTES) - fields == {"inputs", "rates"}

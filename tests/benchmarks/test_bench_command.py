"""The command: what it asks a run for, its exit codes, and a real run on a CPU, with and without git."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmark_stubs import CEILINGS

import fastmixer
from benchmarks import bench, files, measure, opponents, runs, schema
from fastmixer import cli
from fastmixer.usage import UsageError

ROOT = Path(__file__).parents[2]
HEADLINE = ("block", "mixer_b16_224", 256, "bfloat16", "forward")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as the command can tell; returns what the last run was asked for, and "all" of them."""
    asked = {}

    def fake_run(cases, bench, output, **options):
        run = {"cases": cases, "bench": bench, "output": output, **options}
        asked.setdefault("all", []).append(run)
        if not output.stem.endswith("-max-autotune"):
            asked.update(run)
        report = {"complete": True, "cells": [], "protocol": {}}
        return report | {name: asked[name] for name in report if name in asked}

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
    assert gpu["seconds"] == float("inf")
    assert "flax" not in gpu["bench"].names
    assert gpu["header"]["protocol"]["left_out"] == {"flax": "jax and flax not installed"}
    assert gpu["header"]["ceilings"]["dtypes"]["autocast"] == torch.bfloat16
    assert gpu["output"].parent.name == "sample-gpu"


def test_the_command_says_what_to_measure(gpu, tmp_path):
    arguments = "--levels token --models S/32 B/16 --batch 8 --dtype autocast bf16 --direction forward"
    arguments += " --opponents eager --time-limit 9m --final --commit f00 --output"
    assert bench.main([*arguments.split(), str(tmp_path / "r.json")]) == 0
    assert [case.key for case in gpu["cases"]] == [
        ("token", model, 8, dtype, "forward")
        for dtype in ("autocast", "bfloat16")
        for model in ("mixer_s32_224", "mixer_b16_224")
    ]
    assert gpu["bench"].names == ("fused", "eager")
    assert gpu["seconds"] == 540.0 and gpu["final"] is True
    assert gpu["output"] == tmp_path / "r.json"
    assert gpu["header"]["environment"]["commit"] == "f00"


def test_quick_is_a_plan_of_every_level_that_fits_five_minutes(gpu):
    assert bench.main(["--quick"]) == 0
    assert {case.level for case in gpu["cases"]} == set(schema.LEVELS)
    assert {(case.model, case.dtype) for case in gpu["cases"]} == {("mixer_b16_224", "bfloat16")}
    assert gpu["cases"][0].key == HEADLINE
    assert gpu["bench"].names == ("fused", "eager", "compile", "cublas", "copy")
    assert gpu["seconds"] == 300.0 and gpu["final"] is True
    assert gpu["header"]["protocol"]["quick"] is True
    assert gpu["output"].name.startswith("bench-quick-")
    assert gpu["bench"].timer.seconds < measure.CudaTimer().seconds
    assert bench.main(["--quick", "--opponents", "eager", "--levels", "block", "--time-limit", "1h"]) == 0
    assert {case.level for case in gpu["cases"]} == {"block"}
    assert gpu["bench"].names == ("fused", "eager")
    assert gpu["seconds"] == 3600.0


def test_max_autotune_is_last_and_in_a_file_of_its_own(gpu):
    assert bench.main(["--quick"]) == 0
    first, last = gpu["all"]
    assert "compile_max_autotune" not in first["bench"].names
    assert [case.key for case in last["cases"]] == [HEADLINE]
    assert last["bench"].names == ("fused", "eager", "compile", "compile_max_autotune", "cublas", "copy")
    assert last["header"]["protocol"]["opponents"] == list(last["bench"].names)
    assert last["output"].name == f"{first['output'].stem}-max-autotune.json"
    assert (last["began"], last["seconds"], last["final"]) == (first["began"], 300.0, True)
    # A failure in it is one of the command.
    gpu["cells"] = [{"ok": True, "errors": {"compile_max_autotune": "x"}}]
    assert bench.main(["--quick"]) == 1


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        (["--opponents", "eager"], {}),
        (["--levels", "kernel"], {}),  # where it does not race
        ([], {"protocol": {"skipped": ["a case"]}}),
        ([], {"complete": False}),
    ],
    ids=["others asked for", "kernels", "no time left", "no GPU left"],
)
def test_max_autotune_does_not_race_unless_all_else_is_done(gpu, arguments, first):
    gpu.update(first)
    bench.main(["--quick", *arguments])
    (only,) = gpu["all"]
    assert "compile_max_autotune" not in only["bench"].names


def test_levels_are_measured_in_the_order_in_which_they_are_given(gpu):
    few = ["--models", "B/16", "--dtype", "bf16", "--direction", "forward"]
    assert bench.main(["--levels", "block", "kernel", "block", "--batch", "8", "64", *few]) == 0
    order = [("block", 8), ("block", 64), ("kernel", 8), ("kernel", 64)]
    assert [(case.level, case.batch) for case in gpu["cases"]] == order
    assert bench.main(["--quick", "--levels", "model", "block", "--opponents", "eager"]) == 0
    assert [case.level for case in gpu["cases"]] == ["model", "block", "block", "block"]
    assert gpu["cases"][1].key == HEADLINE


def test_the_timers_seconds_can_be_set_and_are_recorded(gpu):
    for arguments, seconds, rounds in (
        ([], 10.0, 60),
        (["--seconds", "1.5"], 1.5, 60),
        (["--quick"], 2.0, 20),
        (["--quick", "--seconds", "0.5"], 0.5, 20),
    ):
        assert bench.main(arguments) == 0
        timer = gpu["bench"].timer
        assert (timer.seconds, timer.max_rounds) == (seconds, rounds)
        recorded = gpu["header"]["protocol"]["timer"]
        assert (recorded["seconds"], recorded["max_rounds"]) == (seconds, rounds)


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
    bench.main(["--resume", "--levels", "block"])
    assert gpu["output"] == folder / "bench-block-20260103T000000Z.json"
    bench.main(["--resume", "--quick"])
    assert gpu["output"].name > "bench-quick-2026"


@pytest.mark.parametrize(
    ("result", "code"),
    [
        ({"cells": [{"ok": True, "errors": {}}]}, 0),
        ({"cells": [{"ok": False, "errors": {}}]}, 1),
        ({"cells": [{"ok": True, "errors": {"compile": "x"}}]}, 1),
        ({"complete": False}, 3),
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
        raise UsageError("sample.partial.json cannot be continued")

    monkeypatch.setattr(runs, "run", refuses)
    assert bench.main(["--resume"]) == 2
    assert "sample.partial.json cannot be continued" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "B/17"], "unknown model 'B/17'"),
        (["--batch", "0"], "0"),
        (["--dtype", "int8"], "int8"),
        (["--levels", "blocks"], "blocks"),
        (["--seconds", "0"], "expected a time"),
        (["--time-limit", "9x"], "expected a time such as 90, 120s, 5m or 1h, got '9x'"),
        (["--opponents", "tensorflow"], "tensorflow"),
        (["--device", "cpu", "--levels", "block", "token"], "--levels token times GPU kernels"),
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


# ---- a real run, on a CPU --------------------------------------------------------------------------------

# The smallest model made smaller.
TINY_RUN = """
import dataclasses, sys
from fastmixer.benchmarks import levels
sizes = dict(channels=32, token_hidden=16, channel_hidden=64, blocks=1)
shape_of = levels.shape_of
levels.shape_of = lambda name: dataclasses.replace(shape_of(name), **sizes)
from fastmixer import cli
sys.exit(cli.main(["bench", *sys.argv[1:]]))
"""
ON_A_CPU = "--device cpu --models S/32 --batch 1 --dtype fp32 --direction forward --opponents eager fused"


def python(*arguments, cwd=ROOT, **environment) -> subprocess.CompletedProcess:
    """A Python without the interpreter, in which the checkout ``cwd`` is imported."""
    dropped = ("TRITON_", "FASTMIXER_BACKEND", "FASTMIXER_MEMORY", "PYTHON")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(dropped)}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=kept | environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )  # fmt: skip


def test_on_a_cpu_block_and_model_are_timed_as_users_run_them(tmp_path):
    """With real times."""
    output = tmp_path / "r.json"
    result = python("-c", TINY_RUN, *ON_A_CPU.split(), "--output", str(output))
    assert result.returncode == 0, result.stderr
    report = json.loads(output.read_text())
    schema.validate(report)
    assert report["ceilings"] is None
    assert report["environment"]["versions"]["fastmixer"] == fastmixer.__version__, "also of a checkout"
    assert [cell["level"] for cell in report["cells"]] == ["block", "model"]
    for cell in report["cells"]:
        assert cell["device"] == "cpu" and cell["ok"] and set(cell["opponents"]) == {"fused", "eager"}
        assert cell["opponents"]["fused"]["ms"]["calls"] >= 25
        assert cell["best_opponent"] == "eager" and cell["ratio_to_best"] > 0


def test_a_copy_without_git_measures_what_time_allows_and_the_report_takes_it(tmp_path):
    """No .git and no program of that name: ``--commit`` says which code it was."""
    copy, output = tmp_path / "copy", tmp_path / "results" / "r.json"
    for folder in ("fastmixer", "kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    (tmp_path / "empty").mkdir()
    without_git = {"cwd": copy, "PATH": str(tmp_path / "empty")}
    options = [*ON_A_CPU.split(), "--levels", "model", "block", "--seconds", "0.2", "--time-limit", "0.01s"]
    options += ["--output", str(output), "--commit", "0123456789ab"]

    result = python("-c", TINY_RUN, *options, **without_git)
    assert result.returncode == 3, result.stderr
    partial = files.partial_path(output)
    assert partial.exists() and not output.exists()
    partial.unlink()

    result = python("-c", TINY_RUN, *options, "--final", **without_git)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in output.parent.iterdir()] == ["r.json"]
    content = json.loads(output.read_text())
    assert (content["environment"]["commit"], content["environment"]["dirty"]) == ("0123456789ab", None)
    assert content["protocol"]["timer"]["seconds"] == 0.2
    assert [cell["level"] for cell in content["cells"]] == ["model"] and content["cells"][0]["ok"]
    assert content["protocol"]["skipped"] == ["block mixer_s32_224 1 float32 forward"]

    result = python("-m", "benchmarks.report", str(output.parent), **without_git)
    assert result.returncode == 0, result.stderr
    assert "commit 0123456789, " in result.stdout and "## Whole model" in result.stdout
    assert "skipped block mixer_s32_224 1 float32 forward" in result.stdout

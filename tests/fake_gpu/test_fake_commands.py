"""The commands run to their end on the fake device, where parity is always fine: kernels do nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import PROPERTIES, Gpu

import fastmixer
from fastmixer import cli, configs, parity, timing
from fastmixer.configs import TARGETS, Problem
from fastmixer.ops import launch, plan_recording

FINE = parity.Parity(0.0, 1e-3, 0.0, 1.0, 1.0, 1.0, 0)


@pytest.fixture(autouse=True)
def fine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parity, "compare", lambda *args, **kwargs: FINE)


@pytest.fixture
def bench(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs ``bench`` on S/32's block; the exit code and the report."""
    if gpu is None:
        return None
    from fastmixer.benchmarks import bench, measure

    def launches(call, item, device) -> int:
        gpu.launched()
        call(item)
        return len(gpu.launched())

    ceilings = {"copy_gb_per_s": 1.0, "bfloat16": {"product_tflop_per_s": 1.0}}
    timer = measure.CudaTimer(min_rounds=1, max_rounds=1, burst=1, warm_up=1, seconds=1.0)
    monkeypatch.setattr(bench, "_timer", lambda options, device: timer)
    monkeypatch.setattr(measure, "ceilings", lambda device, dtypes: ceilings)
    monkeypatch.setattr(timing, "cold_copies", lambda bytes_each, device: 2)
    monkeypatch.setattr(measure, "launches", launches)
    monkeypatch.setattr(measure, "GRAPH_MS", float("inf"))

    def run(*arguments: str) -> tuple[int, dict]:
        output = tmp_path / "bench.json"
        fixed = ["--models", "S/32", "--dtype", "bf16", "--direction", "forward", "--output", str(output)]
        code = bench.main([*fixed, "--opponents", "eager", "copy", "cublas", *arguments])
        return code, json.loads(output.read_text())

    return run


def test_bench_block(bench) -> None:
    code, report = bench("--levels", "block", "--batch", "1")
    (cell,) = report["cells"]
    assert (code, cell["errors"]) == (0, {}) and report["complete"] and cell["ok"]
    assert set(cell["parity"]) == {"eager", "fused", "fused_graph"}, "the graph was captured and judged"
    fused, eager = cell["opponents"]["fused"], cell["opponents"]["eager"]
    assert fused["launches"] == 5 and eager["launches"] == 0, "as the driver saw them"
    assert fused["graph_ms"] and eager["graph_ms"]
    assert report["environment"]["gpu"] == PROPERTIES.name


def test_bench_races_designs(bench) -> None:
    """Each was compiled before the race, passes the gate by itself, and launches what it says."""
    code, report = bench("--levels", "block", "--batch", "1", "--designs", "channel_fc2")
    (cell,) = report["cells"]
    assert (code, cell["errors"]) == (0, {}) and report["protocol"]["designs"] == ["channel_fc2"]
    problem = Problem(1, 49, 512, 2048, torch.bfloat16, torch.bfloat16)
    names = configs.designs_of("channel_fc2", problem, TARGETS["sm_90"])
    assert len(names) == 8
    assert set(cell["designs"]) == {f"channel_fc2={name}" for name in names} <= set(cell["parity"])
    # PyTorch's products have other launches.
    launches = {name: entry["launches"] for name, entry in cell["designs"].items()}
    assert launches["channel_fc2=tma_128x256"] == launches["channel_fc2=rule"] == 5
    assert (launches["channel_fc2=aten"], launches["channel_fc2=addmm"]) == (5, 4)
    assert set(cell["opponents"]) == {"fused", "eager"}


def test_bench_kernels(bench) -> None:
    code, report = bench("--levels", "kernel", "--batch", "1")
    cells = {cell["op"]: cell for cell in report["cells"]}
    assert (code, [cell["errors"] for cell in cells.values()]) == (0, [{}] * 5)
    assert set(cells) == {"pack_weights", "row_moments", "token_mixing", "channel_fc1", "channel_fc2"}
    assert all(cell["ok"] and cell["opponents"]["fused"]["launches"] == 1 for cell in cells.values())


def test_one_unexpected_exception_does_not_end_a_bench_run(bench, monkeypatch) -> None:
    record = plan_recording.record

    def failing(function, context, inputs):
        if inputs[0][0][0] == 2:
            raise ZeroDivisionError("out of a launch")
        return record(function, context, inputs)

    monkeypatch.setattr(plan_recording, "record", failing)
    code, report = bench("--levels", "block", "--batch", "2", "1")
    cells = {cell["batch"]: cell for cell in report["cells"]}
    assert code == 1 and report["complete"]
    assert not cells[2]["ok"]
    assert any(
        error.startswith("ZeroDivisionError: out of a launch") for error in cells[2]["errors"].values()
    )
    assert cells[1]["ok"] and cells[1]["opponents"]["fused"]["launches"] == 5


def test_tune(gpu: Gpu, monkeypatch, capsys) -> None:
    from fastmixer.configs import tables
    from fastmixer.tune import machine

    monkeypatch.setattr(machine, "MOST", 1)
    monkeypatch.setattr(machine, "cold_copies", lambda *args: 2)
    ops = ["channel_fc2", "channel_half"]
    options = ["--model", "S/32", "--batch", "1", "--jobs", "1", "--budget", "200", "--op", *ops]
    assert cli.main(["tune", *options]) == 0, capsys.readouterr()
    assert set(gpu.launched()) >= {"row_moments", "token_mixing", "fc1", "fc2"}
    table = tables.read("user", launch.configs.target_of(torch.device("cuda")).name)
    assert sorted(entry.op for entry in table.entries) == ops and table.device == PROPERTIES.name


@pytest.mark.slow
def test_verify_backward(gpu: Gpu, monkeypatch, capsys) -> None:
    from fastmixer.verify import measure

    monkeypatch.setattr(torch, "compile", lambda model: model)
    monkeypatch.setattr(measure, "judge", lambda *args: FINE)  # the truth need not be finite here
    monkeypatch.setattr(measure, "TIMED_RUNS", 1)
    monkeypatch.setattr(measure, "WARM_UP_RUNS", 1)
    code = cli.main(["verify", "mixer_s32_224", "--backward", "--blocks", "1"])
    said = capsys.readouterr().out
    assert code == 0, said
    assert PROPERTIES.name in said
    launched = gpu.launched()
    assert launched.count("token_wgrad") >= 1 and launched.count("mlp_hidden_bwd") >= 1
    assert launched.count("fc2") > launched.count("token_wgrad")


def test_a_fused_call_without_platformdirs(gpu: Gpu, tmp_path: Path, monkeypatch) -> None:
    """The first native choice looks for the user's table, wherever that is."""
    monkeypatch.setitem(sys.modules, "platformdirs", None)
    monkeypatch.delenv("FASTMIXER_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = fastmixer.MixerBlock(40, 21, device="cuda", dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model(torch.randn(2, 21, 40, device="cuda", dtype=torch.bfloat16))
    assert gpu.launched()[-1] == "fc2"

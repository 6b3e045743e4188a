"""The block benchmark: everything short of the GPU, with a stub for the timer, and a little with one."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch
from benchmark_stubs import CPU, HEADER, OPPONENTS, RACE, TINY, StubTimer, run, silent
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime.errors import OutOfResources

from benchmarks import blocks, measure, races
from benchmarks.races import BACKWARD, FORWARD, Case


def test_a_run_writes_the_report_and_leaves_no_partial_file(tmp_path):
    lines = []
    output, measured = run(tmp_path, StubTimer(), log=lines.append)
    report = measured()
    assert json.loads(output.read_text()) == report
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert report["complete"] is True
    assert report["schema"] == measure.SCHEMA
    assert report["environment"] == HEADER["environment"]
    assert set(report["formulas"]) >= {"flops", "bytes", "parity"}
    (cell,) = report["cells"]
    assert cell["ok"] is True
    assert cell["errors"] == {}
    assert cell["ms"]["eager"] == {
        "median": 4.0,
        "p20": pytest.approx(2.8),
        "p80": pytest.approx(5.2),
        "calls": 3,
    }
    assert cell["ratios"] == {"eager/fused": 4.0, "compile/fused": 2.0}
    assert cell["parity"]["fused"]["ok"] is True
    assert cell["parity"]["fused"]["error_fused"] > 0
    assert cell["floor_ms"] == pytest.approx(max(cell["flops"] / 1e11, cell["bytes"] / 1e9))
    assert cell["share_of_floor"] == cell["floor_ms"]
    assert len(lines) == 2
    assert lines[1].split()[:3] == ["tiny", "2", "float32"]
    assert "4.0000" in lines[1] and "2.00" in lines[1]


@pytest.mark.parametrize("damage", [1.0, float("nan")])
def test_a_red_gate_gets_no_times(tmp_path, damage):
    broken = {**OPPONENTS, "fused": lambda subject: lambda x: subject.fused(x) + damage}
    timer, lines = StubTimer(), []
    output, measured = run(tmp_path, timer, race=replace(RACE, opponents=broken), log=lines.append)
    (cell,) = measured()["cells"]
    assert timer.seen == []
    assert cell["ok"] is False
    assert cell["ms"] == {} == cell["ratios"]
    assert cell["parity"]["fused"]["ok"] is False
    assert "PARITY FAILED" in lines[1]
    assert json.loads(output.read_text())["cells"] == [cell]


def test_any_fused_variant_can_close_the_gate(tmp_path):
    variants = {**OPPONENTS, "fused_graph": lambda subject: lambda x: subject.fused(x) * 1.01}
    timer = StubTimer()
    _, measured = run(tmp_path, timer, race=replace(RACE, opponents=variants))
    assert measured()["cells"][0]["ok"] is False
    assert timer.seen == []


def test_an_opponent_that_fails_is_named_and_the_others_are_timed(tmp_path):
    def no_compiler(subject):
        raise RuntimeError("no C compiler\nmore lines")

    timer, lines = StubTimer(), []
    race = replace(RACE, opponents={**OPPONENTS, "compile": no_compiler})
    _, measured = run(tmp_path, timer, race=race, log=lines.append)
    (cell,) = measured()["cells"]
    assert timer.seen == [("eager", "fused")]
    assert cell["ok"] is True
    assert cell["errors"] == {"compile": "RuntimeError: no C compiler"}
    assert cell["ratios"] == {"eager/fused": 4.0}
    assert "no C compiler" in lines[1]


@pytest.mark.parametrize(
    "error",
    [torch.cuda.OutOfMemoryError("CUDA out of memory"), OutOfResources(300_000, 232_448, "shared memory")],
    ids=["torch", "triton"],
)
def test_no_times_without_the_fused_block(error, tmp_path):
    def out_of_memory(subject):
        raise error

    timer = StubTimer()
    _, measured = run(tmp_path, timer, race=replace(RACE, opponents={**OPPONENTS, "fused": out_of_memory}))
    (cell,) = measured()["cells"]
    assert timer.seen == []
    assert cell["ok"] is False
    assert "out of" in cell["errors"]["fused"]


def test_a_killed_run_keeps_its_cells_and_the_last_report_and_can_be_resumed(tmp_path):
    cases = [TINY, Case(**{**vars(TINY), "model": "other"})]
    output, complete = run(tmp_path, StubTimer(), cases)
    before = complete()
    _, killed = run(tmp_path, StubTimer(interrupt_at=2), cases)
    with pytest.raises(KeyboardInterrupt):
        killed()
    assert json.loads(output.read_text()) == before
    partial = json.loads(blocks.partial_path(output).read_text())
    assert partial["complete"] is False
    assert [cell["model"] for cell in partial["cells"]] == ["tiny"]

    timer = StubTimer()
    _, resumed = run(tmp_path, timer, cases, resume=True)
    report = resumed()
    assert len(timer.seen) == 1
    assert report["cells"][0] == partial["cells"][0]
    assert [cell["model"] for cell in report["cells"]] == ["tiny", "other"]
    assert report["started"] == partial["started"]
    assert not blocks.partial_path(output).exists()


@pytest.mark.parametrize(
    "environment", [{"gpu": "another"}, {"gpu": "stub", "commit": "abc", "dirty": True}], ids=["gpu", "dirty"]
)
def test_cells_of_other_code_or_another_gpu_are_not_taken_over(tmp_path, environment):
    cases, header = [TINY, TINY], {**HEADER, "environment": environment}
    _, killed = run(
        tmp_path, StubTimer(interrupt_at=2), cases, header=header if "dirty" in environment else HEADER
    )
    with pytest.raises(KeyboardInterrupt):
        killed()
    timer = StubTimer()
    _, resumed = run(tmp_path, timer, [TINY], header=header, resume=True)
    resumed()
    assert len(timer.seen) == 1


def test_the_default_cases_are_the_papers_seven_blocks_at_three_batches():
    cases = races.make_cases(races.MODELS, blocks.BATCHES, "bfloat16")
    assert len(cases) == 21
    shapes = {
        case.model: (case.tokens, case.channels, case.token_hidden, case.channel_hidden) for case in cases
    }
    assert shapes["mixer_s32_224"] == (49, 512, 256, 2048)
    assert shapes["mixer_b16_224"] == (196, 768, 384, 3072)
    assert shapes["mixer_h14_224"] == (256, 1280, 640, 5120)
    assert {case.batch for case in cases} == {1, 64, 256}
    assert races.make_cases(["B/16"], [1], "bfloat16")[0].model == "mixer_b16_224"
    with pytest.raises(ValueError, match=r"unknown model 'B/17'; did you mean .*B/16"):
        races.make_cases(["B/17"], [1], "bfloat16")


@pytest.mark.parametrize("race", [FORWARD, BACKWARD], ids=lambda race: race.kind)
def test_flops_and_bytes_are_those_of_the_block(race):
    (case,) = races.make_cases(["S/32"], [3], "float32")
    subject = races.make_subject(case, race, CPU)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(race.trains):
        race.call(subject.eager)(subject.inputs[0])
    assert counter.get_total_flops() == race.flops(case)
    x = 3 * 49 * 512
    assert subject.inputs.numel() == x * (2 if race.trains else 1)
    parameters = sum(p.numel() for p in subject.eager.parameters())
    assert race.bytes(case) == 4 * (5 * x + 3 * parameters if race.trains else 2 * x + parameters)
    assert all(p.ndim > 1 or p.std() > 0.1 for p in subject.eager.parameters())
    assert subject.eager.training is subject.fused.training is race.trains


# ---- statistics, files, timer, command -------------------------------------------------------------------


def test_statistics():
    assert measure.summarise([3.0, 1.0, 2.0]) == measure.Stats(2.0, pytest.approx(1.4), pytest.approx(2.6), 3)
    assert measure.summarise([5.0]) == measure.Stats(5.0, 5.0, 5.0, 1)
    with pytest.raises(ValueError, match="milliseconds"):
        measure.summarise([])


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "new" / "report.json"
    measure.write_atomically(path, {"a": 1})
    for unwritable in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            measure.write_atomically(path, unwritable)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_names_of_folders():
    assert measure.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert measure.slug("AMD Instinct™ MI300X") == "amd-instinct-mi300x"
    assert measure.slug("—") == "unknown"


def test_the_environment_names_versions_and_commit(tmp_path):
    found = measure.environment(CPU)
    assert found["gpu"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {"torch", "triton", "timm", "fastmixer"}
    assert {"commit", "dirty"} <= set(found)
    assert measure.git_state(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    assert measure.git_state(tmp_path)["dirty"] is False
    assert len(measure.git_state(tmp_path)["commit"]) == 40
    (tmp_path / "file").write_text("two")
    assert measure.git_state(tmp_path)["dirty"] is True


@pytest.fixture
def fake_events(monkeypatch):
    """CUDA events without CUDA: a clock that counts the calls made, a millisecond each."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, end):
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return clock


def test_opponents_take_turns_in_bursts_and_inputs_rotate(fake_events):
    calls, inputs_seen = [], []

    def opponent(name, cost):
        def call(x):
            fake_events[0] += cost
            calls.append(name)
            inputs_seen.append(int(x[0]))
            return x

        return call

    timer = measure.CudaTimer(rounds=2, burst=3, warm_up=1)
    times = timer({"a": opponent("a", 1.0), "b": opponent("b", 2.5)}, torch.arange(5.0).unsqueeze(1))
    assert times == {"a": [1.0] * 6, "b": [2.5] * 6}
    assert "".join(calls) == "ab" + "aaabbb" + "bbbaaa"
    assert inputs_seen == [i % 5 for i in range(14)]


@pytest.mark.parametrize(
    ("cell_ok", "errors", "code"), [(True, {}, 0), (False, {}, 1), (True, {"compile": "x"}, 1)]
)
def test_the_command_describes_the_gpu_and_the_protocol(cell_ok, errors, code, monkeypatch, tmp_path):
    asked = {}

    def fake_run(cases, timer, device, output, **options):
        asked.update(cases=cases, timer=timer, device=device, output=output, **options)
        return {"cells": [{"ok": cell_ok, "errors": errors}]}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(measure, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(measure, "environment", lambda device: {"gpu": "H100", "commit": None, "dirty": None})
    monkeypatch.setattr(measure, "ceilings", lambda device, dtype: HEADER["ceilings"])
    monkeypatch.setattr(blocks, "RESULTS", tmp_path)
    monkeypatch.setattr(blocks, "run", fake_run)
    assert blocks.main(["--quick", "--commit", "f00", "--dtype", "fp16"]) == code
    assert asked["output"] == tmp_path / "nvidia-h100-80gb-hbm3" / "blocks-forward-quick.json"
    assert {(case.model, case.batch, case.dtype) for case in asked["cases"]} == {
        ("mixer_b16_224", 1, "float16"),
        ("mixer_b16_224", 64, "float16"),
    }
    assert asked["header"]["environment"]["commit"] == "f00"
    assert asked["header"]["protocol"]["rounds"] == asked["timer"].rounds
    assert "max-autotune" in asked["header"]["protocol"]["compile"]
    assert asked["race"] is FORWARD
    blocks.main(["--backward", "--quick"])
    assert asked["race"] is BACKWARD
    assert asked["output"].name == "blocks-forward-backward-quick.json"
    blocks.main(["--backward"])
    assert asked["output"].name == "blocks-forward-backward.json"
    blocks.main([])
    assert asked["output"].name == "blocks-forward.json"
    assert len(asked["cases"]) == 21


def test_without_a_gpu_nothing_is_measured_and_the_exit_code_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    output = tmp_path / "blocks.json"
    assert blocks.main(["--quick", "--output", str(output)]) == 2
    assert "needs a CUDA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["--models", "B/17"], ["--batch", "0"], ["--dtype", "int8"]])
def test_bad_arguments_exit_with_2(arguments, capsys):
    try:
        code = blocks.main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert arguments[1] in capsys.readouterr().err


@pytest.mark.gpu
def test_a_cell_on_the_gpu(tmp_path):
    device = torch.device("cuda", 0)
    opponents = {name: FORWARD.opponents[name] for name in ("eager", "fused", "fused_graph")}
    case = races.make_cases(["S/32"], [4], "bfloat16")[0]
    timer = measure.CudaTimer(rounds=2, burst=3, warm_up=2)
    race = replace(FORWARD, opponents=opponents)
    report = blocks.run([case], timer, device, tmp_path / "r.json", race=race, log=silent)
    (cell,) = report["cells"]
    assert cell["errors"] == {}
    assert cell["ok"] is True
    assert all(cell["ms"][name]["calls"] == 6 and cell["ms"][name]["median"] > 0 for name in opponents)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    assert measure.cold_copies(cache, device) * cache >= 2 * cache

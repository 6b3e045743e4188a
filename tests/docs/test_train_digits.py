"""The example ``examples/train_digits.py``: its pieces, and as a slow test the whole of it."""

import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch.nn import functional as F

import fastmixer

SCRIPT = Path(__file__).parents[2] / "examples" / "train_digits.py"


def _example():
    spec = importlib.util.spec_from_file_location("train_digits", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_digits"] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


example = _example()
Run = example.Run
PLAN = replace(example.INTERPRETED, embed_dim=32, steps=6, batch=16)
WHERE = {"device": "CPU in Triton's interpreter", "fastmixer": "1", "torch": "2", "triton": "3"}


@pytest.fixture(scope="module")
def digits():
    return example.load(torch.device("cpu"))


def trained(digits, backend="torch", plan=PLAN, seen=None) -> Run:
    with fastmixer.backend(backend):
        return example.train(digits, plan, [].append if seen is None else seen.append)


def runs_of(*, accuracies=(97.0, 97.0), losses=((2.0, 1.0), (2.0, 1.0))) -> dict[str, Run]:
    return {
        backend: Run(list(losses[i]), [(1, 50.0), (2, accuracies[i])], 0.5)
        for i, backend in enumerate(example.BACKENDS)
    }


# ---- the digits ------------------------------------------------------------------------------------------


def test_the_split_is_fixed_and_stratified(digits):
    assert digits.train_images.shape == (1437, 1, 32, 32)
    assert digits.test_images.shape == (360, 1, 32, 32)
    assert digits.test_images.dtype == torch.float32
    counts = torch.bincount(digits.test_labels)
    assert counts.max() - counts.min() <= 3
    assert torch.equal(digits.test_images, example.load(torch.device("cpu")).test_images)


def test_every_patch_is_a_view_of_the_whole_digit():
    digit = torch.rand(2, 1, 8, 8)
    large = F.interpolate(digit, scale_factor=4, mode="bilinear", align_corners=False)
    dealt = example.deal_out(digit)
    for i in range(4):
        for j in range(4):
            patch = dealt[..., 8 * i : 8 * i + 8, 8 * j : 8 * j + 8]
            assert torch.equal(patch, large[..., i::4, j::4])


def test_batches_go_through_one_epoch_after_the_other():
    plan = replace(PLAN, steps=5, batch=4)
    batches = example.draw_batches(10, plan)
    assert batches.shape == (5, 4)
    assert sorted(batches.flatten()[:10].tolist()) == sorted(batches.flatten()[10:].tolist()) == [*range(10)]
    assert torch.equal(batches, example.draw_batches(10, plan))
    assert not torch.equal(batches, example.draw_batches(10, replace(plan, seed=1)))


# ---- training --------------------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_falls():
    rates = [example.rate(step, replace(PLAN, steps=100)) for step in range(101)]
    peak = rates.index(max(rates))
    assert peak == 15 and rates[peak] == 1.0 and rates[0] > 0 and rates[-1] == 0
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


def test_only_weights_decay():
    model = example.build_model(PLAN)
    decaying, others = example.build_optimizer(model, PLAN).param_groups
    assert decaying["weight_decay"] > 0 == others["weight_decay"]
    assert all(p.ndim > 1 for p in decaying["params"])
    assert len(decaying["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_two_runs_from_one_seed_are_the_same(drop_path, digits):
    plan = replace(PLAN, drop_path=drop_path)
    seen = []
    first, second = trained(digits, plan=plan, seen=seen), trained(digits, plan=plan)
    assert first.losses == second.losses == seen
    assert first.accuracies == second.accuracies
    assert [step for step, _ in first.accuracies] == [2, 4, 6]
    assert trained(digits, plan=replace(plan, seed=1)).losses != first.losses


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bits_train_too(dtype, digits):
    single, half = trained(digits), trained(digits, plan=replace(PLAN, dtype=dtype))
    assert half.losses != single.losses
    assert all(map(math.isfinite, half.losses))
    assert half.losses[-1] < half.losses[0]


def test_the_reference_learns(digits):
    assert trained(digits, plan=replace(PLAN, steps=60, batch=24)).accuracy > 80


def test_a_single_step_is_a_run(digits):
    run = trained(digits, plan=replace(PLAN, steps=1, batch=2))
    assert len(run.losses) == 1 and [step for step, _ in run.accuracies] == [1]


def test_a_fused_step_is_the_reference_s(digits):
    few = example.Digits(*(tensor[:8] for tensor in digits))
    plan = replace(PLAN, steps=3, batch=4, evaluations=1)
    runs = example.train_both(few, plan)
    assert example.largest_difference(runs) <= example.LOSS_TOLERANCE
    assert runs["torch"].losses[2] != runs["torch"].losses[0]


def test_a_fused_run_that_falls_back_is_an_error(digits, monkeypatch):
    def warn(*args):
        fastmixer.dispatch.fall_back("a test says so")

    monkeypatch.setattr(example, "train", warn)
    with pytest.raises(fastmixer.FallbackWarning, match="a test says so"):
        example.train_both(digits, PLAN)


# ---- the comparison --------------------------------------------------------------------------------------


def test_good_runs_give_no_complaint():
    assert example.complaints(runs_of(accuracies=(95.0, 96.0)), PLAN) == []


@pytest.mark.parametrize(
    ("runs", "complaint"),
    [
        (runs_of(accuracies=(94.9, 95.5)), "the reference run reaches 94.9%"),
        (runs_of(accuracies=(95.5, 94.9)), "the fused run reaches 94.9%"),
        (runs_of(accuracies=(96.0, 97.1)), "1.10 points apart"),
        (runs_of(losses=((2.0, 1.0), (2.0, 1.002))), "differ by 2.0e-03"),
        (runs_of(losses=((2.0, 1.0), (2.0, math.nan))), "differ by nan"),
        (runs_of(losses=((math.nan, 1.0), (2.0, 1.0))), "differ by nan"),
    ],
)
def test_what_is_wrong_is_said(runs, complaint):
    (found,) = example.complaints(runs, PLAN)
    assert complaint in found


def test_only_the_first_fifty_losses_and_only_in_fp32_must_agree():
    late = runs_of(losses=([1.0] * 60, [1.0] * 50 + [2.0] * 10))
    assert example.largest_difference(late) == 0
    early = runs_of(losses=([1.0] * 60, [1.0] * 49 + [2.0] * 11))
    assert example.largest_difference(early) == 1
    assert example.complaints(early, replace(PLAN, dtype="bf16")) == []


# ---- options and what comes out --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--batch", "-3"], "--batch must be at least 1, got -3"),
        (["--batch", "many"], "'many'"),
        (["--dtype", "int8"], "'int8'"),
        (["--memory", "none"], "'none'"),
        (["--drop-path", "1"], "below 1, got 1.0"),
        (["--drop-path", "nan"], "got nan"),
        (["--output", "no/such/folder/a.png"], "--output: cannot write no/such/folder/a.png"),
        (["--json", "."], "--json: cannot write ."),
    ],
)
def test_bad_options_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        example.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_without_triton_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(example.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        example.main([])
    assert stop.value.code == 2
    assert "needs triton" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "capability", "setting", "device"),
    [(0, None, "", "cpu"), (1, (7, 5), "", "cpu"), (1, (8, 0), "", "cuda"), (1, (9, 0), "1", "cpu")],
)
def test_the_interpreter_runs_where_no_gpu_can(gpus, capability, setting, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("TRITON_INTERPRET", setting)
    assert example.choose_device().type == device
    assert os.environ["TRITON_INTERPRET"] == ("1" if device == "cpu" else "")


def test_options_reach_the_plan_and_results_come_out(tmp_path, monkeypatch, capsys):
    plans = []
    runs = runs_of(accuracies=(97.0, 94.0))
    monkeypatch.setattr(example, "train_both", lambda digits, plan: plans.append(plan) or runs)
    monkeypatch.setattr(example, "choose_device", lambda: torch.device("cpu"))
    picture, file = tmp_path / "digits.png", tmp_path / "digits.json"
    options = ["--steps", "7", "--dtype", "bf16", "--seed", "3", "--memory", "lean", "--drop-path", "0.1"]
    assert example.main([*options, "--output", str(picture), "--json", str(file)]) == 1
    expected = {"steps": 7, "dtype": "bf16", "seed": 3, "memory": "lean", "drop_path": 0.1}
    assert plans == [replace(example.INTERPRETED, **expected)]
    pixels = imread(picture)
    assert pixels.shape[1] > 1000 and len(set(pixels[..., :3].reshape(-1).tolist())) > 50
    content = json.loads(file.read_text())
    assert content["plan"]["batch"] == example.INTERPRETED.batch
    assert content["runs"]["fused"] == {
        "losses": [2.0, 1.0],
        "accuracies": [[1, 50.0], [2, 94.0]],
        "seconds": 0.5,
    }
    assert content["environment"]["torch"] == torch.__version__
    assert content["largest_relative_loss_difference"] == 0
    assert len(content["complaints"]) == 2
    printed = capsys.readouterr()
    assert "97.00%" in printed.out and "94.00%" in printed.out
    assert "say nothing about speed" in printed.out
    assert "FAILED: the fused run reaches 94.0%" in printed.err


def test_the_picture_names_the_gpu_and_the_table_leaves_out_the_interpreter(tmp_path, capsys):
    where = {**WHERE, "device": "Some GPU"}
    example.plot(runs_of(), PLAN, where, tmp_path / "a.png")
    example.print_table(runs_of(), PLAN, where)
    printed = capsys.readouterr().out
    assert "Some GPU, fp32, 6 steps of 16" in printed
    assert "interpreter" not in printed


@pytest.mark.slow
def test_the_whole_example(tmp_path):
    file = tmp_path / "digits.json"
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "digits.png"), "--json", str(file)]
    variables = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("TRITON_", "FASTMIXER_BACKEND", "FASTMIXER_MEMORY"))
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Of two cores it needs one: what runs beside it must not make it wait for the other's threads.
    result = subprocess.run(
        command, capture_output=True, text=True, env={**variables, "OMP_NUM_THREADS": "1"}, timeout=900
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(file.read_text())
    reference, fused = (content["runs"][name]["accuracies"][-1][1] for name in ("reference", "fused"))
    assert min(reference, fused) >= 95 and abs(reference - fused) <= 1
    assert content["complaints"] == []
    assert content["largest_relative_loss_difference"] <= 1e-3
    assert len(content["runs"]["fused"]["losses"]) >= 50
    # Processor time: on a machine with nothing else to do, three minutes at most.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 180

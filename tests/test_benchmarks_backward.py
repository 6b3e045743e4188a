"""``benchmarks.blocks --backward``: the step that is timed, the gate on every gradient, and the memory."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmark_stubs import CPU, RACE, TINY, TRAINING, StubTimer, run, silent

import fastmixer
from benchmarks import blocks, measure, races
from benchmarks.races import BACKWARD, FORWARD
from fastmixer import functional


def parameter_names() -> set[str]:
    subject = races.make_subject(TINY, BACKWARD, CPU)
    return {name for name, _ in subject.eager.named_parameters()}


def test_a_backward_run_judges_every_gradient_and_reports_times_and_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "peak_bytes", lambda call, example: len(call(example)) * 10**6)
    lines = []
    _, measured = run(tmp_path, StubTimer(), race=TRAINING, log=lines.append)
    report = measured()
    assert report["kind"] == "blocks-forward-backward"
    assert set(report["formulas"]) == {"flops", "bytes", "floor_ms", "ratios", "parity", "peak_bytes"}
    (cell,) = report["cells"]
    assert cell["errors"] == {}
    assert cell["ok"] is True
    for name in TRAINING.opponents:
        assert set(cell["parity"][name]["ratios"]) == {"output", "x"} | parameter_names()
    assert cell["parity"]["fused"]["error_fused"] > 0
    assert cell["ratios"] == {
        "eager/fused": 4.0,
        "compile/fused": 2.0,
        "eager/fused_lean": 3.2,
        "compile/fused_lean": 1.6,
    }
    assert cell["peak_bytes"] == {name: 14 * 10**6 for name in ("eager", "fused", "fused_lean")}
    assert cell["flops"] == 3 * FORWARD.flops(TINY)
    titles, figures = (line.split() for line in lines)
    assert titles[-6:] == ["eager", "MB", "fused", "MB", "lean", "MB"]
    assert figures[-3:] == ["14.0"] * 3
    assert [len(line) for line in lines] == [len(lines[0])] * 2


class Damage(torch.autograd.Function):
    """The identity with a gradient that is a hundredth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * 1.01


def test_one_wrong_gradient_closes_the_gate(tmp_path, monkeypatch):
    right = functional.mixer_block

    def wrong(x, token, channel, **options):
        return right(x, token._replace(fc2_bias=Damage.apply(token.fc2_bias)), channel, **options)

    monkeypatch.setattr(functional, "mixer_block", wrong)
    timer, lines = StubTimer(), []
    _, measured = run(tmp_path, timer, race=TRAINING, log=lines.append)
    (cell,) = measured()["cells"]
    assert timer.seen == []
    assert cell["ok"] is False
    assert cell["ms"] == {} == cell["peak_bytes"]
    assert cell["parity"]["fused"]["failed"] == ["mlp_tokens.fc2.bias"]
    assert cell["parity"]["fused"]["tensor"] == "mlp_tokens.fc2.bias"
    assert "PARITY FAILED, not timed: fused: mlp_tokens.fc2.bias" in lines[1]


@pytest.mark.parametrize("race", [RACE, TRAINING], ids=["forward", "backward"])
def test_a_fused_block_that_quietly_runs_unfused_is_not_timed(race, tmp_path, monkeypatch):
    make = races.make_subject

    def hooked(*arguments):
        subject = make(*arguments)
        subject.fused.mlp_tokens.fc1.register_forward_hook(lambda *args: None)
        return subject

    monkeypatch.setattr(blocks, "make_subject", hooked)
    timer = StubTimer()
    _, measured = run(tmp_path, timer, race=race)
    (cell,) = measured()["cells"]
    assert timer.seen == []
    assert cell["ok"] is False
    assert "runs unfused" in cell["errors"]["fused"]


def test_who_cannot_be_weighed_is_named_and_keeps_its_times(tmp_path, monkeypatch):
    def out_of_memory(call, example):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "peak_bytes", out_of_memory)
    _, measured = run(tmp_path, StubTimer(), race=TRAINING)
    (cell,) = measured()["cells"]
    assert set(cell["errors"]) == {"eager memory", "fused memory", "fused_lean memory"}
    assert cell["ms"]["fused"]["median"] == 1.0


def test_a_training_step_gives_all_gradients_and_leaves_none():
    subject = races.make_subject(replace(TINY, dtype="float64"), BACKWARD, CPU)
    block, (x, given) = subject.eager, subject.inputs[0]
    step = races.training_step(block)
    first, second = step(subject.inputs[0]), step(subject.inputs[0])
    assert all(p.grad is None for p in block.parameters())
    assert not x.requires_grad
    x = x.clone().requires_grad_()
    output = block(x)
    (output * given).sum().backward()
    expected = {"output": output, "x": x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    assert set(expected) == {"output", "x"} | parameter_names()
    for answers in (first, second):
        for name, tensor in expected.items():
            torch.testing.assert_close(answers[name], tensor, msg=name)


def test_memory_is_chosen_around_forward_and_backward(monkeypatch):
    chosen, seen = [], []

    @contextlib.contextmanager
    def memory(name):
        chosen.append(name)
        yield
        chosen.pop()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(("forward", *chosen))
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            seen.append(("backward", *chosen))
            return g

    monkeypatch.setattr(fastmixer, "memory", memory)
    subject = races.make_subject(TINY, BACKWARD, CPU)
    cleared = []
    fused = torch.nn.Identity()
    fused.forward = SimpleNamespace(clear=lambda: cleared.append(True))
    fused.__class__ = type("Watching", (torch.nn.Identity,), {"__call__": lambda self, x: Watched.apply(x)})
    subject = replace(subject, fused=fused)
    for name, setting in (("fused", "balanced"), ("fused_lean", "lean")):
        BACKWARD.opponents[name](subject)(subject.inputs[0])
        assert seen == [("forward", setting), ("backward", setting)]
        assert chosen == [] and cleared.pop(), "every step packs its weights anew"
        seen.clear()


def test_the_truth_of_a_batch_is_that_of_its_parts(monkeypatch):
    subject = races.make_subject(replace(TINY, batch=5, dtype="float64"), BACKWARD, CPU)
    step, pair = races.training_step(subject.eager), subject.inputs[0]
    whole = step(pair)
    monkeypatch.setattr(races, "TRUTH_SAMPLES", 2)
    parts = races._truth(step, pair)
    assert set(parts) == set(whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=name)


def test_cells_of_the_other_direction_are_not_taken_over(tmp_path):
    _, killed = run(tmp_path, StubTimer(interrupt_at=2), [TINY, TINY])
    with pytest.raises(KeyboardInterrupt):
        killed()
    timer = StubTimer()
    _, resumed = run(tmp_path, timer, [TINY], race=TRAINING, resume=True)
    resumed()
    assert len(timer.seen) == 1


def test_the_peak_is_that_of_one_warm_call_beyond_what_was_there(monkeypatch):
    state = {"allocated": 100, "peak": 0, "calls": 0}

    def call(example):
        state["calls"] += 1
        if state["calls"] == 1:
            state["allocated"] += 50  # a workspace, for good
        state["peak"] = max(state["peak"], state["allocated"] + 1000 * (2 if state["calls"] == 1 else 1))

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: state["allocated"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(peak=0))
    assert measure.peak_bytes(call, SimpleNamespace(device=torch.device("cuda", 0))) == 1000
    assert measure.peak_bytes(call, torch.zeros(1)) is None


@pytest.mark.gpu
def test_a_backward_cell_on_the_gpu(tmp_path):
    device = torch.device("cuda", 0)
    names = ("eager", "fused", "fused_lean", "fused_graph")
    race = replace(
        BACKWARD,
        opponents={name: BACKWARD.opponents[name] for name in names},
        weigh={name: BACKWARD.weigh[name] for name in names[:3]},
    )
    case = races.make_cases(["S/32"], [64], "bfloat16")[0]
    timer = measure.CudaTimer(rounds=2, burst=3, warm_up=2)
    (cell,) = blocks.run([case], timer, device, tmp_path / "r.json", race=race, log=silent)["cells"]
    assert cell["errors"] == {}
    assert cell["ok"] is True
    assert set(cell["ms"]) == set(names)
    assert cell["peak_bytes"]["fused_lean"] < cell["peak_bytes"]["fused"] < cell["peak_bytes"]["eager"]

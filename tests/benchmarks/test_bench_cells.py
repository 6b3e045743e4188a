"""A cell of the benchmark: the gate before any time, opponents that fail, and the figures of those timed."""

import contextlib
import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from benchmark_stubs import (
    CEILINGS,
    CPU,
    TINY,
    TRAINING,
    StubTimer,
    bench,
    measure_one,
    no_inductor,
    replaced,
)
from fused_calls import replace_calls

import fastmixer
from benchmarks import cells, levels, measure, opponents
from benchmarks.levels import make_call, make_subject
from benchmarks.opponents import OPPONENTS

__all__ = ["no_inductor"]
CUDA = torch.device("cuda", 0)


def parameter_names() -> set[str]:
    return {name for name, _ in levels.timm_block(TINY.shape).named_parameters()}


def test_a_green_cell_has_times_rates_and_the_ratio_to_the_best():
    cell = measure_one()
    assert cell["ok"] is True
    assert cell["errors"] == {}
    assert set(cell["parity"]) == set(cell["opponents"]) == {"eager", "compile", "fused"}
    assert cell["parity"]["fused"]["ok"] is True
    assert cell["parity"]["fused"]["error_fused"] > 0
    eager, fused = cell["opponents"]["eager"], cell["opponents"]["fused"]
    assert eager["ms"] == {"median": 4.0, "p20": pytest.approx(2.8), "p80": pytest.approx(5.2), "calls": 3}
    assert (cell["best_opponent"], cell["ratio_to_best"]) == ("compile", 2.0)
    assert fused["tflop_per_s"] == cell["flops"] / 1e9
    assert fused["gb_per_s"] == cell["bytes"] / 1e6
    floor = max(cell["flops"] / CEILINGS["float32"]["product_tflop_per_s"] / 1e9, cell["bytes"] / 1e9)
    assert fused["share_of_roofline"] == pytest.approx(floor)
    assert eager["share_of_roofline"] == pytest.approx(floor / 4)
    # What only a GPU can tell.
    assert fused["graph_ms"] is fused["peak_bytes"] is fused["launches"] is fused["images_per_s"] is None
    assert cell["predicted_ms"] == {} and cell["clocks"] is None


def test_of_products_and_bytes_the_slower_is_the_roofline():
    for tflop_per_s, gb_per_s, floor in (
        (1e-3, 1000.0, TINY.flops / 1e-3 / 1e9),
        (100.0, 1e-3, TINY.bytes / 1e-3 / 1e6),
    ):
        ceilings = {"float32": {"product_tflop_per_s": tflop_per_s}, "copy_gb_per_s": gb_per_s}
        fused = measure_one(ceilings=ceilings)["opponents"]["fused"]
        assert fused["share_of_roofline"] == pytest.approx(floor / fused["ms"]["median"])


def test_without_ceilings_there_is_no_share_of_the_roofline():
    for ceilings in (None, {"copy_gb_per_s": 1.0}):
        assert measure_one(ceilings=ceilings)["opponents"]["fused"]["share_of_roofline"] is None


@pytest.mark.parametrize(("level", "name"), [("token", "copy"), ("channel", "cublas")])
def test_ceilings_have_the_rates_of_what_they_do_themselves(level, name):
    cell = measure_one(replace(TINY, level=level), names=("fused", name))
    found = cell["opponents"][name]
    assert found["share_of_roofline"] is None
    assert found["tflop_per_s"] == (None if name == "copy" else cell["flops"] / found["ms"]["median"] / 1e9)
    assert found["gb_per_s"] == (None if name == "cublas" else cell["bytes"] / found["ms"]["median"] / 1e6)
    assert None not in (cell["opponents"]["fused"][rate] for rate in ("tflop_per_s", "share_of_roofline"))


@pytest.mark.parametrize("damage", [1.0, float("nan")])
def test_a_red_gate_gets_no_times(monkeypatch, damage):
    replaced(monkeypatch, "fused", lambda subject: lambda x: subject.fused(x) + damage)
    timer = StubTimer()
    cell = measure_one(timer=timer)
    assert timer.seen == []
    assert cell["ok"] is False
    assert cell["opponents"] == {} and cell["ratio_to_best"] is None
    assert cell["parity"]["fused"]["ok"] is False
    assert cell["parity"]["fused"]["failed"] == ["output"]


def test_any_fused_variant_can_close_the_gate(monkeypatch):
    def damaged(subject):
        def call(item):
            answers = make_call(subject.fused, subject.case)(item)
            return answers | {"output": answers["output"] * 1.01}

        return call

    replaced(monkeypatch, "fused_lean", damaged)
    timer = StubTimer()
    cell = measure_one(TRAINING, timer=timer)
    assert cell["ok"] is False
    assert cell["parity"]["fused_lean"]["failed"] == ["output"]
    assert timer.seen == []


class DamagedReplay:
    """A CUDA graph whose answers are a hundredth too large."""

    calls = 1

    def __init__(self, call, items):
        self.call = call

    def __call__(self, item):
        """As a timer calls it."""

    def answer(self, item):
        return self.call(item) * 1.01


def test_a_fused_graph_can_close_the_gate(monkeypatch):
    monkeypatch.setattr(measure, "Replay", DamagedReplay)
    with torch.no_grad(), fastmixer.backend("triton"):
        subject = make_subject(TINY, CPU)
        cell = cells.empty_cell(TINY, CPU)
        found = cells._capture(cell, {"fused": make_call(subject.fused, TINY)}, subject)
    assert set(found) == {"fused"}
    assert not cells.green(cell)
    assert cell["parity"]["fused_graph"]["failed"] == ["output"]


def test_where_the_fused_graph_is_red_the_cell_has_no_times_of_anyone(monkeypatch):
    monkeypatch.setattr(measure, "Replay", DamagedReplay)
    monkeypatch.setattr(measure, "clocks", lambda device: None)
    for weight in ("peak_bytes", "launches"):
        monkeypatch.setattr(measure, weight, lambda call, item, device: 0)
    timer = StubTimer()
    with torch.no_grad(), fastmixer.backend("triton"):
        subject = make_subject(TINY, CPU)
        calls = {name: make_call(subject.fused, TINY) for name in ("eager", "fused")}
        racers = {name: cells.Racer(call, call, opponents.SAME_COUNTS) for name, call in calls.items()}
        cell = cells.empty_cell(TINY, CUDA)
        cells._time(cell, racers, subject, replace(bench(timer), device=CUDA))
    assert timer.seen == [("eager", "fused")], "the calls, before the graphs were there to be judged"
    assert cell["parity"]["fused_graph"]["ok"] is False
    assert cell["ok"] is False and cell["opponents"] == {} and cell["ratio_to_best"] is None
    assert cell["errors"] == {}


@pytest.mark.parametrize("case", [TINY, TRAINING], ids=["forward", "backward"])
@pytest.mark.parametrize("backend", ["triton", "auto"])
def test_a_fused_block_that_quietly_runs_unfused_is_not_timed(case, backend, monkeypatch):
    make = cells.make_subject

    def hooked(*arguments):
        subject = make(*arguments)
        subject.fused.mlp_tokens.fc1.register_forward_hook(lambda *args: None)
        return subject

    monkeypatch.setattr(cells, "make_subject", hooked)
    timer = StubTimer()
    cell = measure_one(case, timer=timer, backend=backend)
    assert timer.seen == []
    assert cell["ok"] is False
    assert "runs unfused" in cell["errors"]["fused"]


def test_on_a_cpu_the_reference_is_timed_as_what_users_get():
    cell = measure_one(backend="auto")
    assert cell["errors"] == {}
    assert cell["ok"] is True
    assert cell["parity"]["fused"]["ratio"] == 1.0  # the reference is eager's own arithmetic


# ---- forward and backward --------------------------------------------------------------------------------


def test_a_backward_cell_judges_every_gradient_and_reports_memory_and_launches(monkeypatch):
    monkeypatch.setattr(measure, "peak_bytes", lambda call, item, device: len(call(item)) * 10**6)
    monkeypatch.setattr(measure, "launches", lambda call, item, device: 7)
    cell = measure_one(TRAINING)
    assert cell["errors"] == {}
    assert cell["ok"] is True
    for name in ("eager", "compile", "fused", "fused_lean"):
        assert set(cell["parity"][name]["ratios"]) == {"output", "x"} | parameter_names()
        assert cell["opponents"][name]["peak_bytes"] == 14 * 10**6
        assert cell["opponents"][name]["launches"] == 7
    assert cell["opponents"]["fused_lean"]["ms"]["median"] == 1.25
    assert cell["flops"] == 3 * TINY.flops


class Damage(torch.autograd.Function):
    """The identity with a gradient that is a hundredth too large."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g * 1.01


def test_one_wrong_gradient_closes_the_gate(monkeypatch):
    def wrong(run, x, halves):
        token = halves["token"]
        return run(x, halves | {"token": token._replace(fc2_bias=Damage.apply(token.fc2_bias))})

    replace_calls(monkeypatch, wrong)
    timer = StubTimer()
    cell = measure_one(TRAINING, timer=timer)
    assert timer.seen == []
    assert cell["ok"] is False
    assert cell["parity"]["fused"]["failed"] == ["mlp_tokens.fc2.bias"]
    assert cell["parity"]["fused"]["tensor"] == "mlp_tokens.fc2.bias"


def test_a_training_step_gives_all_gradients_and_leaves_none():
    subject = make_subject(replace(TRAINING, dtype="float64"), CPU)
    block, (x, given) = subject.eager, subject.items[0]
    step = make_call(block, subject.case)
    first, second = step(subject.items[0]), step(subject.items[0])
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

    class WatchedModule(torch.nn.Module):
        def forward(self, x):
            return Watched.apply(x)

    monkeypatch.setattr(fastmixer, "memory", memory)
    fused = SimpleNamespace(fused=WatchedModule(), case=TRAINING)
    item = make_subject(TRAINING, CPU).items[0]
    for name, setting in (("fused", "balanced"), ("fused_lean", "lean")):
        OPPONENTS[name].make(fused)(item)
        assert seen == [("forward", setting), ("backward", setting)]
        assert chosen == []
        seen.clear()


def test_every_check_of_the_gate_has_an_input_of_its_own_and_keeps_the_answers():
    """As a CUDA graph's, the answers lie in memory that the next call writes."""
    subject, seen, memory = make_subject(TRAINING, CPU), [], {}
    step = make_call(subject.eager, TRAINING)

    def replay(item):
        seen.append(item[0])
        for name, tensor in step(item).items():
            memory.setdefault(name, torch.empty_like(tensor)).copy_(tensor)
        return memory

    assert all(verdict.ok for verdict in cells.gate(subject, replay).values())
    assert len(seen) > 1
    given = [*seen, *(x for x, _ in subject.items)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(given, 2))


def test_the_truth_of_a_batch_is_that_of_its_parts(monkeypatch):
    with torch.enable_grad():
        subject = make_subject(replace(TRAINING, batch=5, dtype="float64"), CPU)
        whole = make_call(subject.eager, subject.case)(subject.items[0])
        monkeypatch.setattr(cells, "TRUTH_SAMPLES", 2)
        parts = cells.true_answers(subject, subject.items[0])
    assert set(parts) == set(whole)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, msg=name)


def test_of_a_large_batch_of_a_model_samples_from_end_to_end_are_judged(monkeypatch):
    monkeypatch.setattr(cells, "JUDGED_SAMPLES", 3)
    case = replace(TINY, level="model", batch=7)
    subject = make_subject(case, CPU)
    with torch.no_grad():
        eager = make_call(subject.eager, case)
        for sample, red in ((0, True), (3, True), (6, True), (2, False)):

            def damaged(x, sample=sample):
                return eager(x).index_fill(0, torch.tensor(sample), 0.0)

            verdicts = cells.gate(subject, damaged)
            assert set(verdicts) == {"output"}
            assert verdicts["output"].ok is not red, sample
    # Eager itself runs on these samples alone: it may not have the memory for the whole batch.
    batches = []
    subject.eager.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    fused = make_call(subject.fused, case)
    with torch.no_grad():
        assert cells.gate(subject, fused)["output"].ok
    assert batches and max(batches) == 3
    assert cells.spread_samples(2, subject.items[0]).tolist() == [0, 1]


@pytest.mark.gpu
@pytest.mark.parametrize("level", ["kernel", "token", "channel", "block", "model"])
@pytest.mark.parametrize("direction", ["forward", "forward_backward"])
def test_a_case_on_the_gpu(level, direction):
    device = torch.device("cuda", 0)
    (case,) = levels.make_cases([level], ["S/32"], [64], ["bfloat16"], [direction])
    timer = measure.CudaTimer(min_rounds=2, max_rounds=2, burst=3, warm_up=2)
    names = ("fused", "fused_lean", "eager", "cublas", "copy")
    found = cells.measure_case(case, replace(bench(timer, names), device=device, backend="auto"))
    for cell in found:
        assert cell["errors"] == {} and cell["ok"] is True
        fused = cell["opponents"]["fused"]
        assert fused["graph_ms"]["median"] > 0 and fused["launches"] > 0
        if direction == "forward_backward" and level in ("block", "model"):
            eager = cell["opponents"]["eager"]
            assert cell["opponents"]["fused_lean"]["peak_bytes"] < fused["peak_bytes"] < eager["peak_bytes"]


def test_every_opponent_has_its_name_in_the_schema():
    from benchmarks.schema import OPPONENTS as NAMES

    assert set(opponents.OPPONENTS) == set(NAMES)


@pytest.mark.parametrize("level", ["token", "channel", "block", "model"])
def test_predictions_are_the_cost_models_of_what_the_level_launches(level, monkeypatch):
    """As if this were an H100: nothing is launched."""
    from fastmixer import configs
    from fastmixer.configs import targets

    h100 = next(device for device in targets.DEVICES.values() if "H100" in device.name)
    monkeypatch.setattr(configs, "target_of", lambda device: h100.target)
    case = replace(levels.make_cases([level], ["B/16"], [64], ["bfloat16"], ["forward"])[0])
    found = cells.predicted(case, torch.device("cuda"))
    total = found.pop("fused")
    assert total > 0 and sum(found.values()) == pytest.approx(total)
    assert "row_moments" in found
    assert any(name.startswith("token_") for name in found) == (level != "channel")
    assert any(name.startswith("channel_") for name in found) == (level != "token")
    if level == "model":
        block = cells.predicted(replace(case, level="block"), torch.device("cuda"))
        assert total == pytest.approx(12 * block["fused"])

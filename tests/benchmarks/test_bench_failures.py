"""What fails in a cell: it is named there, with where it was raised, and everything else goes on."""

import linecache
import re
from dataclasses import replace

import pytest
import torch
from benchmark_stubs import TINY, StubTimer, bench, measure_one, no_inductor, replaced, run
from triton.runtime.errors import OutOfResources

import fastmixer
from benchmarks import cells, launches, levels, measure

__all__ = ["no_inductor"]
CASES = [TINY, replace(TINY, model="other")]
UNEXPECTED = ModuleNotFoundError("No module named 'sample'")


@pytest.mark.parametrize("error", [RuntimeError("no C compiler\nmore lines"), KeyError("no C compiler")])
def test_an_opponent_that_fails_is_named_and_the_others_are_timed(monkeypatch, error):
    """In whatever way a foreign one fails."""

    def no_compiler(subject):
        raise error

    replaced(monkeypatch, "compile", no_compiler)
    timer = StubTimer()
    cell = measure_one(timer=timer)
    assert timer.seen == [("fused", "eager")]
    assert cell["ok"] is True
    assert cell["errors"].keys() == {"compile"}
    assert "no C compiler" in cell["errors"]["compile"] and "\n" not in cell["errors"]["compile"]
    assert cell["best_opponent"] == "eager"


def test_an_opponent_that_fails_when_called_is_found_before_the_timer(monkeypatch):
    def fails(item):
        raise RuntimeError("sample failure")

    case = replace(TINY, level="token")
    replaced(monkeypatch, "copy", lambda subject: fails)
    timer = StubTimer()
    cell = measure_one(case, timer=timer, names=("fused", "copy"))
    assert timer.seen == [("fused",)]
    assert cell["errors"].keys() == {"copy"}
    assert cell["errors"]["copy"].startswith("RuntimeError: sample failure")


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        OutOfResources(300_000, 232_448, "shared memory"),
        UNEXPECTED,
    ],
    ids=["torch", "triton", "unexpected"],
)
@pytest.mark.parametrize("where", ["fused", "case", "timer"])
def test_no_times_without_the_fused_block(monkeypatch, error, where):
    def fails(*arguments):
        raise error

    timer = StubTimer(error=error if where == "timer" else None)
    if where == "fused":
        replaced(monkeypatch, "fused", fails)
    elif where == "case":
        monkeypatch.setattr(cells, "make_subject", fails)
    cell = measure_one(timer=timer)
    assert (timer.seen == []) == (where != "timer")
    assert cell["ok"] is False
    assert cell["opponents"] == {}
    assert str(error).splitlines()[0] in cell["errors"][where]


def test_who_cannot_be_weighed_is_named_and_keeps_its_times(monkeypatch):
    def out_of_memory(call, item, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measure, "peak_bytes", out_of_memory)
    cell = measure_one()
    assert set(cell["errors"]) == {"eager peak_bytes", "fused peak_bytes", "compile peak_bytes"}
    assert cell["opponents"]["fused"]["ms"]["median"] == 1.0
    assert cell["opponents"]["fused"]["peak_bytes"] is None


# ---- whatever it is --------------------------------------------------------------------------------------


def failing_once(monkeypatch, module, name, error):
    """Makes the first call of the function raise the error."""
    right, errors = getattr(module, name), [error]

    def call(*args, **options):
        if errors:
            raise errors.pop()
        return right(*args, **options)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(
    ("module", "name", "named"),
    [
        (cells, "predicted", "predicted_ms"),
        (torch._dynamo, "reset", "case"),
        (cells, "make_subject", "case"),
        (cells, "_fill", "case"),
        (cells, "gate", "fused"),
        (measure, "clocks", "case"),
        (measure, "graph_times", "timer"),
        (cells, "_figures", "case"),
        (measure, "launches", "fused launches"),
    ],
)
def test_a_run_goes_on_after_any_exception_of_a_case(tmp_path, monkeypatch, module, name, named):
    failing_once(monkeypatch, module, name, UNEXPECTED)
    _, measured = run(tmp_path, StubTimer(), CASES)
    report = measured()
    assert report["complete"] is True
    first, second = report["cells"]
    assert first["errors"].keys() == {named}
    assert first["errors"][named].startswith("ModuleNotFoundError: No module named 'sample' (benchmarks/")
    assert first["ok"] is (named in ("predicted_ms", "fused launches"))
    assert second["ok"] is True and second["errors"] == {}


def test_a_kernel_that_fails_costs_no_other_its_time(monkeypatch):
    failing_once(monkeypatch, launches, "ceiling", UNEXPECTED)
    first, *others = cells.measure_case(replace(TINY, level="kernel"), bench(names=("fused", "copy")))
    assert first["op"] == "pack_weights" and first["ok"] is False and first["errors"].keys() == {"case"}
    assert len(others) == 4 and all(cell["ok"] for cell in others)
    failing_once(monkeypatch, launches, "record", UNEXPECTED)
    (whole,) = cells.measure_case(replace(TINY, level="kernel"), bench())
    assert whole["op"] is None and whole["ok"] is False and whole["errors"].keys() == {"case"}


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_who_stops_the_run_stops_it(tmp_path, monkeypatch, stop):
    failing_once(monkeypatch, cells, "make_subject", stop())
    timer = StubTimer()
    _, measured = run(tmp_path, timer, CASES)
    with pytest.raises(stop):
        measured()
    assert timer.seen == []


def raised(call, *arguments) -> str:
    with pytest.raises(Exception) as caught:
        call(*arguments)
    return cells.described(caught.value)


def test_an_error_says_what_it_is_and_the_last_line_of_this_project_that_led_to_it(tmp_path):
    said = raised(levels.shape_of, "B/17")
    found = re.fullmatch(r"UsageError: models: unknown model .* \(benchmarks/levels\.py:(\d+)\)", said)
    assert "raise UsageError" in linecache.getline(levels.__file__, int(found[1]))
    # Raised in PyTorch, by a call of ours.
    x, fc1, fc2 = torch.ones(2, 7, 3), torch.ones(4, 5), torch.ones(3, 4)
    said = raised(fastmixer.reference.channel_mixing, x, None, None, fc1, None, fc2, None)
    found = re.fullmatch(r"RuntimeError: .* \(fastmixer/reference\.py:(\d+)\)", said)
    assert "F.linear(n, params.fc1_weight" in linecache.getline(fastmixer.reference.__file__, int(found[1]))
    # Not through this project at all, without a text, and with several lines.
    assert raised((tmp_path / "none").read_bytes).startswith("FileNotFoundError: [Errno 2]")
    assert "(" not in raised((tmp_path / "none").read_bytes)
    assert cells.described(ValueError()) == "ValueError: "
    assert cells.described(RuntimeError("\nfirst\nsecond")) == "RuntimeError: first"

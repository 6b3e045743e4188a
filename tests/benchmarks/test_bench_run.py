"""A run of the benchmark: the file, its lines on the screen, kill and resume, the time limit."""

import json
from dataclasses import replace

import pytest
import sample_results as sample
import torch
from benchmark_stubs import HEADER, TINY, StubTimer, no_inductor, run

from benchmarks import cells, files, runs, schema
from fastmixer import timing

__all__ = ["no_inductor"]
CASES = [TINY, replace(TINY, model="other")]


def test_a_run_writes_a_valid_report_and_leaves_no_partial_file(tmp_path):
    lines = []
    output, measured = run(tmp_path, StubTimer(), log=lines.append)
    report = measured()
    assert json.loads(output.read_text()) == report
    schema.validate(report)
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    assert report["complete"] is True
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
    assert "fused: parity failed in output; not timed" in line
    assert "vit: RuntimeError: out of memory" in line


def test_the_line_of_a_cell_shows_host_time_beside_that_of_the_graph_and_their_ratio():
    cell = sample.cell()
    for name, ms, graph in (("fused", 0.6, 0.1), ("eager", 0.25, 0.2)):
        cell["opponents"][name] |= {"ms": sample.stats(ms), "graph_ms": sample.stats(graph)}
    cell["opponents"]["flax"] = sample.opponent(0.7, cell, graph_ms=None)
    line = runs.table_row(sample.judged(cell))
    assert "fused 0.6000 / 0.1000 = 6.00x, eager 0.2500 / 0.2000 = 1.25x, " in line
    assert line.endswith("flax 0.7000")
    assert "as called, host included / in a CUDA graph" in runs.table_head()


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
    _, killed = run(tmp_path, StubTimer(interrupt_at=6), cases, names=("fused",))
    with pytest.raises(KeyboardInterrupt):
        killed()
    timer = StubTimer()
    _, resumed = run(tmp_path, timer, cases, names=("fused",), resume=True)
    report = resumed()
    assert len(timer.seen) == 5
    assert [cell["op"] for cell in report["cells"]] == [
        "pack_weights", "row_moments", "token_mixing", "channel_fc1", "channel_fc2",
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
    monkeypatch.setattr(timing.time, "monotonic", lambda: clock[0])

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


def test_every_reported_footnote_is_about_something_in_the_file():
    fields = set(schema.OPPONENT) | set(schema.OPPONENTS) | set(schema.LEVELS)
    fields |= {name.removesuffix("?") for name in schema.CELL}
    assert set(schema.FOOTNOTES) - fields == {"inputs", "rates"}

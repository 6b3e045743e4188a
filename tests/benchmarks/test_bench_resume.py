"""What a benchmark that was stopped leaves, what --resume makes of it, and what it never overwrites."""

import json
from dataclasses import replace

import pytest
import torch
from benchmark_stubs import CEILINGS, CPU, HEADER, TINY, StubTimer, bench, no_inductor, run, silent

from benchmarks import cells, files, runs, schema
from fastmixer.usage import UsageError

__all__ = ["no_inductor"]
CASES = [TINY, replace(TINY, model="other")]


def stopped(tmp_path, **options):
    """The partial file of a run of two cases that was interrupted in the second."""
    output, killed = run(tmp_path, StubTimer(interrupt_at=2), CASES, **options)
    with pytest.raises(KeyboardInterrupt):
        killed()
    return files.partial_path(output)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("environment", "environment.gpu was 'Sample GPU', is 'another'"),
        ("dirty", "changes that are not committed"),
        ("protocol", "protocol.rounds was 1, is 2"),
        ("narrower", "protocol.cases.model was .'other', 'tiny'., is .'tiny'."),
        ("rubbish", "not valid: report.schema must be 3, got 1"),
        ("not resumed", "--resume continues it"),
    ],
)
def test_a_file_of_another_run_is_refused_and_left_as_it_is(tmp_path, damage, reason):
    header, options = HEADER, {"resume": damage != "not resumed"}
    if damage in ("environment", "dirty"):
        change = {"gpu": "another"} if damage == "environment" else {"dirty": True}
        header = {**HEADER, "environment": {**HEADER["environment"], **change}}
    partial = stopped(tmp_path, header=header if damage == "dirty" else HEADER)
    if damage == "protocol":
        header = {**HEADER, "protocol": {"rounds": 2}}
    if damage == "rubbish":
        partial.write_text('{"schema": 1}')
    before, timer = partial.read_bytes(), StubTimer()
    cases = [TINY] if damage == "narrower" else CASES
    output, resumed = run(tmp_path, timer, cases, header=header, **options)
    with pytest.raises(UsageError, match=reason) as error:
        resumed()
    assert str(partial) in str(error.value)
    assert timer.seen == [] and partial.read_bytes() == before and not output.exists()


def test_all_shares_of_a_file_refer_to_its_ceilings(tmp_path):
    output = stopped(tmp_path).with_name("bench.json")
    other = {"float32": {"product_tflop_per_s": 1.0}, "copy_gb_per_s": 1.0}
    header = {**HEADER, "ceilings": other}
    report = runs.run(CASES, bench(ceilings=other), output, header=header, resume=True, log=silent)
    assert report["ceilings"] == CEILINGS
    first, second = (cell["opponents"]["fused"]["share_of_roofline"] for cell in report["cells"])
    assert first == second


def test_a_case_that_always_fails_is_tried_twice_and_last(tmp_path, monkeypatch):
    tried, clock = [], [0.0]
    monkeypatch.setattr(runs.time, "monotonic", lambda: clock[0])

    def measured(case, bench):
        tried.append(case.model)
        clock[0] += 60.0
        errors = {"case": "OutOfMemoryError: sample"} if case.model == "tiny" else {}
        return [cells.empty_cell(case, bench.device) | {"errors": errors, "ok": False}]

    monkeypatch.setattr(cells, "measure_case", measured)
    # No piece is long enough for two cases.
    report = {"complete": False}
    while not report["complete"] and len(tried) < 9:
        _, piece = run(tmp_path, StubTimer(), CASES, seconds=1.0, resume=True, began=clock[0])
        report = piece()
    assert tried == ["tiny", "other", "tiny", "other"]
    assert [cell["attempts"] for cell in report["cells"]] == [2, 2]


def test_a_case_that_kills_the_process_is_known_and_not_tried_first(tmp_path, monkeypatch):
    tried = []

    class Killed(BaseException):
        pass

    def measured(case, bench):
        partial = json.loads(files.partial_path(output).read_text())
        schema.validate(partial)
        assert partial["cells"][-1]["model"] == case.model
        assert partial["cells"][-1]["errors"] == {"case": "begun, not finished"}
        tried.append(case.model)
        if case.model == "tiny":
            raise Killed
        return [cells.empty_cell(case, CPU)]

    monkeypatch.setattr(cells, "measure_case", measured)
    for _ in range(2):
        output, piece = run(tmp_path, StubTimer(), CASES, resume=True)
        with pytest.raises(Killed):
            piece()
    assert tried == ["tiny", "other", "tiny"]
    _, last = run(tmp_path, StubTimer(), CASES, resume=True)
    report = last()
    assert report["complete"] is True
    assert {cell["model"]: cell["attempts"] for cell in report["cells"]} == {"tiny": 2, "other": 2}


def test_an_interruption_is_no_attempt(tmp_path):
    partial = json.loads(stopped(tmp_path).read_text())
    assert [(cell["model"], cell["attempts"]) for cell in partial["cells"]] == [("tiny", 1)]


def test_files_without_attempts_are_valid_and_other_absent_fields_are_not():
    cell = cells.empty_cell(TINY, CPU)
    report = runs.new_report(HEADER)
    for attempts in ({}, {"attempts": 1}):
        schema.validate({**report, "cells": [cell | attempts]})
    with pytest.raises(schema.SchemaError, match="attempts must be a whole number"):
        schema.validate({**report, "cells": [cell | {"attempts": -1}]})


def test_a_gpu_that_fails_for_good_stops_the_run_incomplete(tmp_path, monkeypatch):
    def fails():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fails)
    monkeypatch.setattr(cells, "measure_case", lambda case, bench: [cells.empty_cell(case, bench.device)])
    lines = []
    output, _ = run(tmp_path, StubTimer())
    on_gpu = cells.Bench(torch.device("cuda", 0), StubTimer(), ("fused",))
    report = runs.run(CASES, on_gpu, output, header=HEADER, log=lines.append)
    assert report["complete"] is False and not output.exists()
    assert len(json.loads(files.partial_path(output).read_text())["cells"]) == 1
    assert "illegal memory access" in lines[-1] and "--resume" in lines[-1]

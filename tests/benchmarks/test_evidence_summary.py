"""What ``evidence`` makes of the files that its stages leave, whole, broken or missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sample_results

from benchmarks.evidence import summary
from benchmarks.evidence.plan import Stage

HEAD = {"plan": "first", "dry run": False, "gpu": "Sample GPU", "commit": "abc", "seconds": 12.5}
PLANNED = [Stage(name, 30.0, ()) for name in ("environment", "smoke", "batch-256", "hang")]
NCU_LOG = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","_fc1_kernel(int)","Duration","us","12.5"
"0","_fc1_kernel(int)","Block Size","","256"
"0","_fc1_kernel(int)","L2 Hit Rate","%","80"
==PROF== Disconnected from process 1
"""
FINE = {"state": "ok", "seconds": 3.0, "limit": 30.0, "tail": "no matter"}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path


def put(out: Path, name: str, *rows: object) -> None:
    (out / "results" / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def written(out: Path, outcomes: dict | None = None, planned: list[Stage] = PLANNED, **head: object) -> str:
    """summary.txt, once both files are written."""
    summary.write(out, {**HEAD, **head}, planned, {} if outcomes is None else outcomes)
    assert json.loads((out / "summary.json").read_text())["plan"] == "first"
    assert not list(out.glob(".*")), "a temporary file is left"
    return (out / "summary.txt").read_text()


def test_before_anything_is_there(out: Path) -> None:
    text = written(out)
    assert "plan first, gpu Sample GPU, seconds 12.5, commit abc" in text
    assert "not begun" in text and "cannot" not in text and "DRY RUN" not in text
    assert "A DRY RUN ON A CPU" in written(out, **{"dry run": True})
    assert "INTERRUPTED" in written(out, interrupted=True)


def test_stages_and_the_last_lines_of_those_that_failed(out: Path) -> None:
    died = {"state": "exit 1", "seconds": 7.0, "limit": 30.0, "tail": "first\n" * 20 + "the very reason\n"}
    hung = {"state": "timed out", "seconds": 31.0, "limit": 30.0, "tail": "still waiting\n"}
    planned = [*PLANNED[:3], Stage("hang", 30.0, (), expected="timed out")]
    text = written(out, {"environment": FINE, "smoke": died, "batch-256": hung, "hang": hung}, planned)
    assert "smoke: exit 1; the end of logs/smoke.log:" in text and "    the very reason" in text
    assert "batch-256: timed out; the end of" in text and "no matter" not in text
    assert "hang: timed out;" not in text and "timed out, as planned" in text
    assert text.count("    first\n") == summary.LOG_LINES - 1


def test_parity_right_and_wrong(out: Path) -> None:
    right = {"what": "B/16 bfloat16 forward", "ok": True, "worst": "output", "ratio": 0.876, "failed": {}}
    wrong = {
        "what": "odd bfloat16 lean",
        "ok": False,
        "worst": "x",
        "ratio": 9.0,
        "failed": {"x": "FAILED: e"},
    }
    died = {"what": "H/14 bfloat16 forward", "ok": False, "error": "its process ended with -11"}
    put(out, "smoke.jsonl", right, wrong, died)
    text = written(out)
    assert "smoke: 3 rows, 2 WRONG OR FAILED" in text
    assert "    B/16 bfloat16 forward: worst output, ratio 0.876\n" in text
    assert "NOT OK  odd bfloat16 lean: worst x, ratio 9.0\n      x: FAILED: e" in text
    assert "NOT OK  H/14 bfloat16 forward: error its process ended with -11" in text


def test_times_with_ratios_and_losses(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sample_results.write(out / "bench", sample_results.run(), "won.json")
    text = written(out)
    assert "none among what was timed" in text and "won.json" in text
    rows = [[entry.strip() for entry in line.split("|")] for line in text.splitlines() if line[:1] == "|"]
    titles, _, *timed = rows
    fused, eager = (dict(zip(titles, row, strict=True)) for row in timed[:2])
    assert fused["Who"] == "fused" and fused["error / eager's"] == "0.9" and fused["of roofline"] == "22%"
    assert eager["Who"] == "eager" and eager["ms / fused ms"] == "2"
    assert eager["peak MB"] == "800" and eager["launches"] == "12"
    assert "vs best: " in text and "ceiling copy_gb_per_s: 4000.0" in text
    (cell,) = json.loads((out / "summary.json").read_text())["bench"]["won.json"]["cells"]
    assert cell["times_fused"]["eager"] == 2 and cell["what"] == "block B/16 x100 bfloat16 forward cuda"
    assert cell["opponents"]["eager"]["launches"] == 12
    monkeypatch.setitem(sample_results.SLOWER, "compile", 0.8)
    sample_results.write(out / "bench", sample_results.run(), "lost.json")
    text = written(out)
    assert "compile takes 0.80 of fused's time: block B/16 x100 bfloat16 forward cuda (lost.json)" in text
    assert "none among" not in text


def test_a_red_gate_and_an_unfinished_run_are_said(out: Path) -> None:
    report = sample_results.run([sample_results.red()], complete=False)
    sample_results.write(out / "bench", report, "red.partial.json")
    text = written(out)
    assert "red.partial.json, UNFINISHED" in text and "parity failed, not timed" in text
    assert "fused: parity failed in output; not timed" in text and "timer: not asked: the gate is red" in text


def test_other_rows_and_the_tuned_table(out: Path) -> None:
    put(
        out,
        "api.jsonl",
        {"what": "host", "ok": True, "fused_us": 1.5},
        {"what": "graph", "ok": False, "error": "E"},
    )
    (out / "logs").mkdir()
    (out / "logs" / "ncu.log").write_text(NCU_LOG)
    (out / "results" / "environment.json").write_text('{"gpu": "G", "versions": {"torch": "9"}, "cpus": 4}')
    table = out / "tuned" / "configs" / "gpu.json"
    table.parent.mkdir(parents=True)
    entry = {"op": "channel_fc1", "ms": 0.25, "default_ms": 0.5, "tiles": {"block_m": 128}}
    table.write_text(json.dumps({"entries": [entry]}))
    text = written(out)
    assert "host: fused_us 1.5" in text and "NOT OK  graph: error E" in text
    assert "ncu: 1 rows, 0 WRONG" in text and "    _fc1_kernel: Duration 12.5 us, L2 Hit Rate 80 %" in text
    assert "ID 0" not in text
    assert "  torch: 9" in text and "  cpus: 4" in text
    assert "channel_fc1: 0.25 of 0.5: {'block_m': 128}" in text


def test_what_cannot_be_read_is_named_and_hides_nothing(out: Path) -> None:
    right = {"what": "B/16 bfloat16 forward", "ok": True, "worst": "output", "ratio": 0.5, "failed": {}}
    put(out, "smoke.jsonl", right)
    with open(out / "results" / "smoke.jsonl", "a") as file:
        file.write('{"what": "half a li')  # a process died while it wrote
    put(out, "api.jsonl", ["no object"])
    put(out, "ncu.jsonl", {"no": "what"})
    (out / "results" / "environment.json").write_text("[1]")
    sample_results.write(out / "bench", sample_results.run(), "good.json")
    (out / "bench" / sample_results.SLUG / "bad.json").write_text('{"schema": 1}')
    (out / "bench" / sample_results.SLUG / "worse.json").write_bytes(b"\xff{")
    (out / "tuned" / "configs").mkdir(parents=True)
    (out / "tuned" / "configs" / "gpu.json").write_text("{}")
    (out / "tuned" / "configs" / "other.json").write_text('{"entries": [1]}')
    text = written(out, {"smoke": {**FINE, "state": "exit 9", "tail": "why"}})
    names = "results/api.jsonl", "results/ncu.jsonl", "results/environment.json", "tuned/configs/gpu.json"
    for path in names:
        assert f"cannot be read: {path}: " in text
    for name in ("bad.json", "worse.json"):
        assert f"cannot be read: bench/{sample_results.SLUG}/{name}: " in text
    assert "1 rows, 0 WRONG" in text and "good.json" in text and "| 1.25 (max-autotune) |" in text
    assert "(tuned cannot be shown: TypeError: " in text and "smoke: exit 9" in text

"""Cases, opponents and a timer for the tests of the benchmark, all tiny and without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import cells, opponents, runs
from benchmarks.levels import Case, Shape

REAL = dict(opponents.OPPONENTS)
CPU = torch.device("cpu")
SHAPE = Shape(tokens=9, channels=16, token_hidden=8, channel_hidden=64, blocks=2, patch=2)
TINY = Case("block", "tiny", 2, "float32", "forward", SHAPE)
TRAINING = replace(TINY, direction="forward_backward")
NAMES = ("fused", "fused_lean", "eager", "compile")
CEILINGS = {"float32": {"product_tflop_per_s": 100.0}, "copy_gb_per_s": 1000.0}
HEADER = {
    "environment": {
        "gpu": "Sample GPU", "nvidia_smi": None, "cuda": None, "hip": None, "versions": {"torch": "0"},
        "commit": "abc", "dirty": False,
    },
    "protocol": {"rounds": 1},
    "ceilings": CEILINGS,
    "clocks": None,
}  # fmt: skip
BASE = {"eager": 4.0, "compile": 2.0, "fused": 1.0, "fused_lean": 1.25}


class StubTimer:
    """Milliseconds that are known, 4, 2 and 1 for eager, compile and fused; fails on request.

    Every call is made once, as a timer would.
    """

    def __init__(self, interrupt_at: int | None = None, error: Exception | None = None) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.interrupt_at, self.error = interrupt_at, error

    def __call__(self, calls, items):
        self.seen.append(tuple(calls))
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        if self.error:
            raise self.error
        for call in calls.values():
            call(items[0])
        return {name: [BASE.get(name, 8.0) * factor for factor in (0.5, 1.0, 1.5)] for name in calls}


@pytest.fixture(autouse=True)
def no_inductor(monkeypatch):
    """What compiles is eager here."""
    eager = opponents.OPPONENTS["eager"]
    for name in ("compile", "compile_max_autotune"):
        monkeypatch.setitem(opponents.OPPONENTS, name, eager)


def bench(timer=None, names=NAMES, **options) -> cells.Bench:
    """A bench on which the kernels run, in the interpreter, instead of the reference."""
    options = {"ceilings": CEILINGS, "backend": "triton", **options}
    return cells.Bench(CPU, timer or StubTimer(), tuple(names), **options)


def replaced(monkeypatch, name, make) -> None:
    """Another call for an opponent."""
    monkeypatch.setitem(opponents.OPPONENTS, name, replace(opponents.OPPONENTS[name], make=make))


def measure_one(case=TINY, **options) -> dict:
    """The only cell of a case."""
    (cell,) = cells.measure_case(case, bench(**options))
    return cell


def silent(line: str) -> None:
    pass


def run(tmp_path, timer, cases=(TINY,), header=HEADER, names=NAMES, **options):
    """The file a run will write, and the function that runs it."""
    output = tmp_path / "gpu" / "bench.json"
    options = {"log": silent, **options}
    return output, lambda: runs.run(list(cases), bench(timer, names), output, header=header, **options)

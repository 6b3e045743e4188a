"""A case, races and a timer for the tests of the benchmark, all without a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch

from benchmarks import blocks
from benchmarks.races import BACKWARD, FORWARD, Case

CPU = torch.device("cpu")
TINY = Case("tiny", 2, "float32", tokens=9, channels=16, token_hidden=8, channel_hidden=64)
OPPONENTS = {
    "eager": lambda subject: subject.eager,
    "compile": lambda subject: subject.eager,
    "fused": lambda subject: subject.fused,
}
RACE = replace(FORWARD, opponents=OPPONENTS)
TRAINING = replace(
    BACKWARD,
    opponents={
        "eager": BACKWARD.opponents["eager"],
        "compile": BACKWARD.opponents["eager"],
        "fused": BACKWARD.opponents["fused"],
        "fused_lean": BACKWARD.opponents["fused_lean"],
    },
    weigh={name: BACKWARD.weigh[name] for name in ("eager", "fused", "fused_lean")},
)
HEADER = {
    "environment": {"gpu": "stub", "commit": "abc", "dirty": False},
    "protocol": {"rounds": 1},
    "ceilings": {"copy_gb_per_s": 1000.0, "product_tflop_per_s": 100.0},
}


class StubTimer:
    """Milliseconds that are known: 4, 2 and 1 for eager, compile and fused. Fails on request."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.seen: list[tuple[str, ...]] = []
        self.interrupt_at = interrupt_at

    def __call__(self, opponents, inputs):
        self.seen.append(tuple(opponents))
        if len(self.seen) == self.interrupt_at:
            raise KeyboardInterrupt
        assert inputs.shape[-3:] == (2, 9, 16)
        base = {"eager": 4.0, "compile": 2.0, "fused": 1.0, "fused_lean": 1.25}
        return {name: [base[name] * f for f in (0.5, 1.0, 1.5)] for name in opponents}


def silent(line: str) -> None:
    pass


def run(tmp_path, timer, cases=(TINY,), **options):
    output = tmp_path / "gpu" / "blocks-forward.json"
    options = {"race": RACE, "header": HEADER, "log": silent, **options}
    return output, lambda: blocks.run(cases, timer, CPU, output, **options)

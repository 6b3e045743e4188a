"""The stage "smoke": are the kernels right here? A block's output and every gradient against fp64.

Groups of cases run beside each other, each in a process of its own, because compiling is what takes the time.
A case that kills its process, hangs, or leaves the GPU unusable costs only itself.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from .plan import STAGES
from .task import Task, judged

CASE_SECONDS, DRY_CASE_SECONDS = 90, 500  # for one case, its compilation included
MOST_GROUPS = 8  # at once


# B, S, C, D, E.
SHAPES = {
    "B/16": (4, 196, 768, 384, 3072),
    "S/32": (4, 49, 512, 256, 2048),
    "odd": (3, 50, 99, 75, 201),
    "B/16 at 448 px": (2, 784, 768, 384, 3072),  # beyond 256 tokens: the two-pass design
    "H/14": (2, 256, 1280, 640, 5120),
    "tiny": (2, 21, 40, 20, 80),  # of a dry run
}


class Smoke(NamedTuple):
    """A case: name of the shape; dtype as of bench; what runs: forward, backward or lean."""

    shape: str
    dtype: str
    way: str

    def __str__(self) -> str:
        return " ".join(self)


def groups(dry: bool) -> list[list[Smoke]]:
    """The cases; those of a group run one after the other, the most telling groups first."""

    def group(shape: str, dtype: str = "bfloat16") -> list[Smoke]:
        return [Smoke(shape, dtype, way) for way in ("forward", "backward", "lean")]

    if dry:
        return [group("tiny")]
    alone = [[case] for case in group("B/16")]
    others = [group(shape) for shape in ("S/32", "odd", "B/16 at 448 px", "H/14")]
    return alone + others + [group("B/16", dtype) for dtype in ("float16", "autocast", "float32")]


def run(task: Task) -> int:
    """Checks all groups; the exit code says whether all is right."""
    planned = groups(task.dry)
    with ThreadPoolExecutor(min(MOST_GROUPS, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda index: _supervise(task, index, planned[index]), range(len(planned))))
    rows = task.rows()
    return 0 if len(rows) == sum(map(len, planned)) and all(row["ok"] for row in rows) else 1


def _supervise(task: Task, index: int, group: list[Smoke]) -> None:
    """Runs the group in processes until each case has its row: who dies in one goes on behind it."""

    def answered(case: str) -> bool:
        return any(row["what"] == case for row in task.rows())

    command = [sys.executable, "-u", *STAGES, "smoke", str(task.out), *["--dry-run"] * task.dry, "--group"]
    for position, case in enumerate(map(str, group)):
        if not answered(case):
            ended = subprocess.run([*command, str(index), str(position)], stderr=subprocess.PIPE, text=True)
            if not answered(case):
                error = f"its process ended with {ended.returncode}: {_told(ended.stderr)}"
                task.note(case, ok=False, error=error)


def _told(stderr: str) -> str:
    """The end of what a process said, or where it hung, with the innermost call first."""
    hung = stderr.rfind("Timeout (")
    return " / ".join(stderr[hung:].splitlines()[:6] if hung >= 0 else stderr.splitlines()[-4:])[-400:]


def run_group(task: Task, index: int, position: int) -> int:
    """In a group's process: its cases from ``position`` on, until one of them leaves the GPU in doubt."""
    for case in groups(task.dry)[index][position:]:
        faulthandler.dump_traceback_later(DRY_CASE_SECONDS if task.dry else CASE_SECONDS, exit=True)
        if not task.attempt(str(case), lambda case=case: check(task, case)):
            return 1  # another process goes on
    return 0


def check(task: Task, case: Smoke) -> dict:
    """The case's parity: the worst tensor, and all that failed."""
    import torch
    from fastmixer.benchmarks import cells, levels

    import fastmixer

    B, S, C, D, E = SHAPES[case.shape]
    direction = "forward" if case.way == "forward" else "forward_backward"
    asked = levels.Case("block", case.shape, B, case.dtype, direction, levels.Shape(S, C, D, E, 1, 16))
    with torch.set_grad_enabled(asked.trains), fastmixer.backend("triton"):
        subject = levels.make_subject(asked, task.device)
        memory = "lean" if case.way == "lean" else "balanced"
        return judged(cells.gate(subject, levels.make_call(subject.fused, asked, memory=memory)))

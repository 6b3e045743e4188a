"""What the stages run that are no other command: ``python -m fastmixer.benchmarks.evidence.stages NAME DIR``.

In Triton's interpreter all is on a CPU and as small as can be: a dry run.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from fastmixer.benchmarks import cells, files, levels, measure

import fastmixer
from fastmixer import info, interpreter, timing, versions

from .plan import STAGES

GPU_FIELDS = (
    "clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "persistence_mode", "ecc.mode.current",
)  # fmt: skip
CASE_SECONDS, DRY_CASE_SECONDS = 90, 500  # for a case of smoke, its compilation included
MOST_CASES = 8  # at once
WAYS = ("forward", "backward", "lean")
# Of a block: S, C, D, E.
SIZES = {
    "B/16": (196, 768, 384, 3072),
    "S/32": (49, 512, 256, 2048),
    "odd": (50, 99, 75, 201),
    "B/16 at 448 px": (784, 768, 384, 3072),  # beyond 256 tokens: the two-pass design
    "H/14": (256, 1280, 640, 5120),
    "tiny": (4, 40, 20, 80),  # of a dry run
}


@dataclass(frozen=True)
class Task:
    """name: of the stage. out: the folder of all results. dry: on a CPU, as small as can be."""

    name: str
    out: Path
    dry: bool

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def subject(
        self, level: str, batch: int, direction: str, dtype: str = "bfloat16", sizes: str = "B/16"
    ) -> levels.Subject:
        """A block or model with these of ``SIZES``; in a dry run a tiny one, in fp32 at batch 2."""
        if self.dry:
            batch, dtype, sizes = 2, "float32", "tiny"
        shape = levels.Shape(*SIZES[sizes], blocks=2 if self.dry else 12, patch=16)
        case = levels.Case(level, sizes, batch, dtype, direction, shape)
        with torch.set_grad_enabled(case.trains):
            return levels.make_subject(case, self.device)

    @property
    def results(self) -> Path:
        """The stage's file: one object per line."""
        return self.out / "results" / f"{self.name}.jsonl"

    def note(self, what: str, *, ok: bool = True, **figures: object) -> None:
        """Adds a row, at once."""
        row = json.dumps({"what": what, "ok": ok, **figures}, default=str)
        with open(self.results, "a", encoding="utf-8") as file:
            file.write(row + "\n")
        print(row, flush=True)

    def rows(self) -> list[dict]:
        """What has been noted so far, by whichever process."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        return [json.loads(line) for line in lines]

    def attempt(self, what: str, check: Callable[[], dict]) -> bool:
        """Notes what ``check`` returns, or its exception; whether all was well."""
        try:
            row = {"ok": True, **check()}
        except Exception as error:  # whatever it is: the next attempt may still tell something
            row = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:400]}"}
        self.note(what, **row)
        return row["ok"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one stage, or with ``--case`` one case of "smoke", and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m fastmixer.benchmarks.evidence.stages")
    parser.add_argument("name", choices=RUN)
    parser.add_argument("out", type=Path)
    parser.add_argument("--case")
    options = parser.parse_args(argv)
    task = Task(options.name, options.out, dry=interpreter.is_interpreted())
    return run_case(task, options.case) if options.case else RUN[options.name](task)


def environment(task: Task) -> int:
    """Versions, the GPU with its clocks and limits, the machine: read, never set."""
    facts = files.environment(task.device) | {"now": files.nvidia_smi(task.device, *GPU_FIELDS)}
    facts |= {"python": platform.python_version(), "machine": platform.platform(), "cpus": os.cpu_count()}
    if not task.dry:
        gpu = torch.cuda.get_device_properties(task.device)
        facts |= {"multiprocessors": gpu.multi_processor_count, "memory_bytes": gpu.total_memory}
        facts |= {"l2_bytes": gpu.L2_cache_size}
    files.write_atomically(task.out / "results" / "environment.json", facts)
    print("\n".join(info.lines()), flush=True)
    if versions.nvidia_smi("name"):
        subprocess.call(["nvidia-smi"])
    return 0


def gate(
    subject: levels.Subject, *, backend: str = "triton", memory: str = "balanced", graph: bool = False
) -> dict:
    """The parity of the fused module, or of its CUDA graph's replay: the worst tensor, and what failed."""
    call = levels.make_call(subject.fused, subject.case, memory)
    with torch.set_grad_enabled(subject.case.trains), fastmixer.backend(backend):
        verdicts = cells.gate(subject, measure.Replay(call, subject.items).answer if graph else call)
    worst = max(verdicts, key=lambda name: verdicts[name].share_of_bound)
    failed = {name: str(verdict) for name, verdict in verdicts.items() if not verdict.ok}
    return {"ok": not failed, "worst": worst, "ratio": round(verdicts[worst].ratio, 3), "failed": failed}


# ---- smoke: a block's output and every gradient against fp64 ---------------------------------------------


def smoke_cases(dry: bool) -> list[str]:
    """Sizes, dtype and way of each case; a later way is spared what an earlier one compiled."""
    kinds = [f"{name} bfloat16" for name in SIZES if name != "tiny"]
    kinds += [f"B/16 {dtype}" for dtype in ("float16", "autocast", "float32")]
    return [f"{kind} {way}" for way in WAYS for kind in (["tiny float32"] if dry else kinds)]


def smoke(task: Task) -> int:
    """Each case in a process of its own: who dies, hangs, or leaves the GPU unusable costs only itself.

    Several run beside each other, because compiling is what takes the time.
    """
    with ThreadPoolExecutor(min(MOST_CASES, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda case: _supervise(task, case), smoke_cases(task.dry)))
    return 0 if all(row["ok"] for row in task.rows()) else 1


def _supervise(task: Task, case: str) -> None:
    """Runs the case's process, and notes how that ended if it has left no row."""
    command = [sys.executable, "-u", *STAGES, task.name, str(task.out), "--case", case]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if not any(row["what"] == case for row in task.rows()):
        task.note(case, ok=False, error=f"its process ended with {ended.returncode}: {_told(ended.stderr)}")


def _told(stderr: str) -> str:
    """The end of what a process said, or where it hung, with the innermost call first."""
    hung = stderr.rfind("Timeout (")
    return " / ".join(stderr[hung:].splitlines()[:6] if hung >= 0 else stderr.splitlines()[-4:])[-400:]


def run_case(task: Task, case: str) -> int:
    """In a case's process."""
    faulthandler.dump_traceback_later(DRY_CASE_SECONDS if task.dry else CASE_SECONDS, exit=True)
    return 0 if task.attempt(case, lambda: check(task, case)) else 1


def check(task: Task, case: str) -> dict:
    sizes, dtype, way = case.rsplit(" ", 2)
    direction = "forward" if way == "forward" else "forward_backward"
    subject = task.subject("block", 3, direction, dtype, sizes)
    return gate(subject, memory="lean" if way == "lean" else "balanced")


# ---- api: what a user does with a fused model, each by itself --------------------------------------------


def api(task: Task) -> int:
    warnings.simplefilter("error", fastmixer.FallbackWarning)  # what quietly ran unfused would pass
    forward, step = (task.subject("model", 8, direction) for direction in ("forward", "forward_backward"))
    checks: dict[str, Callable[[], dict]] = {
        "inference, triton": lambda: gate(forward),
        "gradients, triton": lambda: gate(step),
        "gradients, triton, lean": lambda: gate(step, memory="lean"),
        "host time of a block's call": lambda: _host_time(task),
    }
    if not task.dry:
        checks |= {
            "inference, auto": lambda: gate(forward, backend="auto"),
            "gradients, auto": lambda: gate(step, backend="auto"),
            "CUDA graph": lambda: gate(forward, graph=True),
        }
    compiler = "aot_eager" if task.dry else "inductor"  # which cannot compile what the interpreter runs
    compiled = torch.compile(forward.fused, fullgraph=True, backend=compiler)
    checks |= {
        "torch.compile": lambda: gate(replace(forward, fused=compiled)),
        "changed weights are seen": lambda: _after_a_change(step),
        "unfuse gives eager's bits": lambda: _unfused(forward),
    }
    return 0 if all([task.attempt(what, check) for what, check in checks.items()]) else 1


def _after_a_change(subject: levels.Subject) -> dict:
    """The same after all weights changed in place, as an optimizer changes them: no packed copy is stale."""
    with torch.no_grad():
        for parameter in (*subject.eager.parameters(), *subject.fused.parameters()):
            parameter.mul_(1.25)
    return gate(subject)


def _unfused(subject: levels.Subject) -> dict:
    """Whether the model is what it was: its keys, and its answer to the bit."""
    x = subject.items[0]
    keys = list(subject.fused.state_dict()) == list(subject.eager.state_dict())
    fastmixer.unfuse(subject.fused)
    with torch.no_grad():
        same = torch.equal(subject.fused(x), subject.eager(x))
    return {"ok": keys and same, "keys": keys, "bits": same}


def _host_time(task: Task) -> dict:
    """Microseconds that a call of a B/16 block keeps the host, fused and eager; batch 1."""
    subject = task.subject("block", 1, "forward")
    timer = measure.CpuTimer(max_rounds=1, min_rounds=1, burst=2 if task.dry else 200)
    with torch.no_grad(), fastmixer.backend("triton"):
        times = timer({"fused_us": subject.fused, "eager_us": subject.eager}, subject.items)
    return {name: round(timing.summarise(ms).median * 1e3, 1) for name, ms in times.items()}


def block(task: Task) -> int:
    """A block, three times."""
    subject = task.subject("block", 256, "forward")
    with torch.no_grad(), fastmixer.backend("triton"):
        for _ in range(3):
            y = subject.fused(subject.items[0])
    return 0 if bool(y.isfinite().all()) else 1


def every_kernel(task: Task) -> int:
    """The script of tests/every_kernel.py: alone, which fills Triton's cache, and under the tools.

    memcheck: no access outside of any tensor; racecheck: no race in shared memory.
    """
    sys.path.insert(0, "tests")  # stages run in the checkout
    from every_kernel import EVERY_KERNEL

    sys.argv[1:] = [task.device.type]
    exec(EVERY_KERNEL, {})
    return 0


RUN = {
    "environment": environment,
    "smoke": smoke,
    "api": api,
    "ncu": block,
    **dict.fromkeys(("sanitizer", "memcheck", "racecheck"), every_kernel),
}

if __name__ == "__main__":
    sys.exit(main())

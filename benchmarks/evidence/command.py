"""The command: refuses what cannot be done, runs the plan, and keeps the summary current."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fastmixer.usage import UsageError, did_you_mean

from . import plan, summary
from .runner import CUT, NO_TIME, NOT_HERE, Runner

ROOT = Path(__file__).resolve().parent.parent.parent  # of the checkout, where there is one
IN_CHECKOUT = (ROOT / "setup.py").is_file()  # and not in an installed package, which has no tests
# Asked in a process that ends: this one shall hold no GPU memory. The GPU's name, and that of its folder.
PROBE = """
import torch
from fastmixer.benchmarks import files
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), files.slug(torch.cuda.get_device_name()), sep="\\n")
"""
GRACE, DRY_GRACE = 20.0, 300.0  # seconds that the background gets before something is timed
NO_FAULT = (CUT, NO_TIME, NOT_HERE)  # of the stage
# The user's own settings, which would be measured.
SETTINGS = ("TRITON_INTERPRET", "FASTMIXER_BACKEND", "FASTMIXER_MEMORY")
# Of FASTMIXER_CACHE_DIR an empty one: no user's table steers the figures.
CACHES = (
    "FASTMIXER_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME",
    "HYPOTHESIS_STORAGE_DIRECTORY", "MPLCONFIGDIR",
)  # fmt: skip
# Where NVIDIA's tools are when the PATH does not say.
TOOLS = (Path("/usr/local/cuda/bin"), *Path("/opt/nvidia/nsight-compute").glob("*"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a plan, and returns an exit code.

    0: every stage that found time did what it should; 1: one did not; 2: it cannot be done here;
    130: interrupted. The summary says what was done in each case but 2.
    """
    began = time.monotonic()
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or its complaint
        return int(stop.code or 0)
    options.out = options.out.resolve()
    with tempfile.TemporaryDirectory(prefix="fastmixer-evidence-", ignore_cleanup_errors=True) as work:
        environment = child_environment(Path(work))
        try:
            head, planned = _planned(options, environment)
        except UsageError as error:
            print(f"evidence: {error}", file=sys.stderr)
            return 2
        return _run(planned, options, head, environment, began)


def _planned(options: argparse.Namespace, environment: dict[str, str]) -> tuple[dict, list[plan.Stage]]:
    """What the summary says of the run as a whole, and the stages; UsageError for what cannot be done."""
    if (options.out / "summary.json").exists():
        raise UsageError(f"--out: {options.out} holds the results of an earlier run; name another folder")
    if importlib.util.find_spec("timm") is None:
        raise UsageError('needs timm, whose models it measures: pip install "fastmixer[demo]"')
    gpu = ["the CPU", "cpu"]
    if not options.dry_run:
        probe = [sys.executable, "-c", PROBE]
        told = subprocess.run(probe, env=environment, stdout=subprocess.PIPE, text=True).stdout
        gpu = told.splitlines()[-2:]
    if len(gpu) < 2:
        raise UsageError("needs a CUDA or ROCm GPU, and torch sees none; --dry-run shows the plumbing")
    name = "dry run" if options.dry_run else options.plan
    planned = plan.stages(name, options.out, gpu[-1], options.commit)
    names = [stage.name for stage in planned]
    wanted = options.only.split(",") if options.only else names
    for word in wanted:
        if word not in names:
            raise UsageError(f"--only: unknown stage {word!r}; {did_you_mean(word, names)}")
    head = {"plan": name, "dry run": options.dry_run, "gpu": gpu[0], "commit": options.commit}
    return head, [stage for stage in planned if stage.name in wanted]


def _run(
    planned: list[plan.Stage],
    options: argparse.Namespace,
    head: dict,
    environment: dict[str, str],
    began: float,
) -> int:
    """Runs the stages in their time, with a summary that is current; SIGINT and SIGTERM end them earlier."""

    def report() -> None:
        head["seconds"] = round(time.monotonic() - began, 1)
        summary.write(options.out, head, planned, runner.outcomes)

    for folder in ("logs", "results"):
        (options.out / folder).mkdir(parents=True, exist_ok=True)
    place = ROOT if IN_CHECKOUT else options.out
    end = began + 60 * options.minutes - plan.RESERVE
    grace = DRY_GRACE if options.dry_run else GRACE
    runner = Runner(options.out / "logs", place, environment, end, grace, report)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        report()
        runner.run(planned)
    except KeyboardInterrupt:
        head["interrupted"] = True
    report()
    print((options.out / "summary.txt").read_text(encoding="utf-8"), flush=True)
    if head.get("interrupted"):
        return 130
    return 0 if all(runner.outcomes[s.name]["state"] in (s.expected, *NO_FAULT) for s in planned) else 1


def _interrupt(*_: object) -> None:
    """The first signal ends the run, and no second one the ending."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def child_environment(work: Path) -> dict[str, str]:
    """What stages see: caches below ``work``, no settings of the user's, the checkout importable."""
    env = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    for name in CACHES:
        (work / name).mkdir()
        env[name] = str(work / name)
    env.setdefault("HOME", str(work))
    env["PATH"] = os.pathsep.join([env.get("PATH", os.defpath), *map(str, TOOLS)])
    env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # tests against JAX share the GPU with others
    if IN_CHECKOUT:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
    return env


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmixer evidence",
        description="Proves and measures the library on this GPU within minutes: parity, times against "
        "PyTorch, memory, the tuner; with --plan second NVIDIA's tools, the tests, more models. Each stage "
        "is a process of its own, and all that it finds is in the folder at once; summary.txt is to read. "
        "Clocks and settings are only read. Exit codes: 0 every stage that found time did what it should; 1 "
        "one did not; 2 no GPU, or bad usage; 130 interrupted.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="the folder of the results")
    add("--minutes", type=_minutes, default=plan.MINUTES, metavar="N", help="for all; default: 9")
    add("--plan", choices=plan.PLANS, default="first", help="default: first")
    add("--commit", metavar="HASH", help="recorded where git cannot say which commit this is")
    add("--only", metavar="NAMES", help="only these stages, as smoke,api")
    dry_run = "the plans' plumbing on a CPU: every stage, nothing measured"
    add("--dry-run", action="store_true", help=dry_run)
    return parser


def _minutes(text: str) -> float:
    """At least 1; argparse.ArgumentTypeError otherwise."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 1 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of minutes, 1 or more, got {text!r}")
    return number

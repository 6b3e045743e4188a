"""``python -m fastmixer bench``: fastmixer against PyTorch and others, from single kernels to whole models.

Every cell is a level, a model, a batch, a dtype and a direction. The fused side must first pass the parity
criterion on fresh random inputs, or nothing in the cell is timed; then the opponents take turns. The file is
rewritten after every case, so a killed run keeps what it measured, and ``--resume`` continues it.

Nothing heavy is imported before the arguments are read.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fastmixer.usage import DTYPES, UsageError, positive, seconds

from .schema import DESIGNED, DIRECTIONS, LEVELS, OPPONENTS, RACED_AT

if TYPE_CHECKING:
    import torch

    from .levels import Case

BATCHES = {"cuda": (1, 8, 64, 256, 1024), "cpu": (1, 8)}
DTYPE_NAMES = ("bf16", "fp16", "fp32", "autocast")
ON_CPU = {
    "levels": ("block", "model"),
    "dtypes": ("bf16", "fp32"),
    "opponents": ("eager", "compile", "fused"),
}
# What --quick measures, all of B/16 in bf16, the most telling first: level, direction, batch.
QUICK = (
    ("block", "forward", 256), ("kernel", "forward", 256), ("token", "forward", 256),
    ("channel", "forward", 256), ("block", "forward_backward", 64), ("block", "forward", 1),
    ("model", "forward", 256),
)  # fmt: skip
QUICK_OPPONENTS = ("fused", "eager", "compile", "cublas", "copy")
QUICK_SECONDS = 300.0
SLOWEST = "compile_max_autotune"
DONE, FAILED, MISUSED, TIME_IS_UP = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and returns an exit code, which ``--help`` explains; 130: interrupted."""
    began = time.monotonic()
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or its complaint
        return int(stop.code or 0)
    try:
        if reason := _why_not(options):
            raise UsageError(reason)
        reports = _measure(options, cases_of(options), began)
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, --resume continues", file=sys.stderr)
        return 130
    if not all(report["complete"] for report in reports):
        return TIME_IS_UP
    cells = [cell for report in reports for cell in report["cells"]]
    return DONE if all(cell["ok"] and not cell["errors"] for cell in cells) else FAILED


def _why_not(options: argparse.Namespace) -> str | None:
    """Why nothing can be timed as asked, before anything heavy is imported or measured."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return (
            "TRITON_INTERPRET=1 is set: Triton's interpreter shows that kernels are right, its times mean "
            "nothing; unset it, and use --device cpu to time what runs on a CPU"
        )
    if importlib.util.find_spec("timm") is None:
        return 'needs timm, whose models it times: pip install "fastmixer[demo]"'
    if options.device == "cpu":
        if options.designs:
            return "--designs races GPU kernels: there are none with --device cpu"
        for level in options.levels or ():
            if level not in ON_CPU["levels"]:
                return f"--levels {level} times GPU kernels; with --device cpu there are block and model"
        return "--quick is a plan for a GPU" if options.quick else None
    if options.designs and not set(RACED_AT).intersection(options.levels or RACED_AT):
        return "--designs races at levels channel and block, and --levels has neither"
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA or ROCm GPU, and torch sees none: nothing was measured; there is --device cpu"
    return None


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases in the order in which they are measured; UsageError for an unknown model."""
    from fastmixer.blocks.model import ALIASES

    from .levels import make_case, make_cases

    cpu = options.device == "cpu"
    levels = options.levels or (ON_CPU["levels"] if cpu else LEVELS)
    if options.quick:
        plan = [entry for entry in QUICK if entry[0] in levels]
        if options.levels:
            plan.sort(key=lambda entry: levels.index(entry[0]))
        return [make_case(level, "B/16", batch, "bfloat16", direction) for level, direction, batch in plan]
    dtypes = options.dtype or (ON_CPU["dtypes"] if cpu else DTYPE_NAMES)
    return make_cases(
        levels,
        options.models or ALIASES,
        options.batch or BATCHES[options.device],
        [DTYPES.get(dtype, dtype) for dtype in dtypes],
        options.direction or DIRECTIONS,
    )


def _measure(options: argparse.Namespace, cases: list[Case], began: float) -> list[dict]:
    """The reports: one, and of --quick, where no time ran out, a second with max-autotune.

    Its tuning can take longer than all the rest. So it comes last, on the first case that it races in once
    more, and has a file of its own: it costs no other case its time.
    """
    import torch

    from fastmixer.configs import target_of
    from fastmixer.configs.designs import forced_names

    from . import files, measure, opponents, runs
    from .cells import Bench

    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    timer = _timer(options, device)
    if options.designs:
        from .designs import compile_ahead

        for reason in compile_ahead(cases, options.designs, target_of(device)):
            print(f"bench: does not compile: {reason}", file=sys.stderr)
    dtypes = {case.dtype: case.product_dtype for case in cases}
    header = {
        "environment": files.environment(device, options.commit),
        "ceilings": measure.ceilings(device, dtypes),
        "clocks": {"before": measure.clocks(device), "after": None},
    }
    limit = options.time_limit or (QUICK_SECONDS if options.quick else float("inf"))

    def measured(cases: list[Case], asked: Sequence[str], output: Path) -> dict:
        left_out = opponents.left_out(asked, device)
        # In the schema's order, so that a run may be resumed with the same names in another.
        names = tuple(name for name in OPPONENTS if name in {*asked, "fused"} and name not in left_out)
        protocol = {
            "timer": {"kind": type(timer).__name__, **asdict(timer)},
            "opponents": list(names),
            "left_out": left_out,
            "compile": "torch.compile(mode=..., dynamic=False)",
            "autocast": "bfloat16",
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "quick": options.quick,
            "designs": options.designs or [],
            "forced": dict(forced_names()),
        }
        bench = Bench(device, timer, names, header["ceilings"], designs=tuple(options.designs or ()))
        report = runs.run(
            cases, bench, output,
            header={**header, "protocol": protocol}, resume=options.resume, seconds=limit, began=began,
            final=options.quick or options.final,
        )  # fmt: skip
        print(f"written to {output if report['complete'] else files.partial_path(output)}")
        return report

    standard = ON_CPU["opponents"] if device.type == "cpu" else OPPONENTS
    asked = options.opponents or (QUICK_OPPONENTS if options.quick else standard)
    output = options.output or _output(options, files.results_folder(files.device_name(device)))
    reports = [measured(cases, asked, output)]
    in_time = reports[0]["complete"] and "skipped" not in reports[0]["protocol"]
    if options.quick and not options.opponents and in_time:
        first = [case for case in cases if opponents.choose(case, [SLOWEST])][:1]
        beside = output.with_name(f"{output.stem}-max-autotune.json")
        reports += [measured(first, (*QUICK_OPPONENTS, SLOWEST), beside)] if first else []
    return reports


def _timer(options: argparse.Namespace, device: torch.device) -> object:
    from . import measure

    kind = measure.CpuTimer if device.type == "cpu" else measure.CudaTimer
    asked = {"seconds": options.seconds} if options.seconds else {}
    return kind(**({"max_rounds": 20, "seconds": 2.0} if options.quick else {}) | asked)


def _output(options: argparse.Namespace, folder: Path) -> Path:
    """A new file of its own for every run; with --resume the one whose partial file is the newest."""
    from . import files

    prefix = "-".join(["bench", *(options.levels or []), *["quick"] * options.quick])
    unfinished = sorted(folder.glob(f"{prefix}-[0-9]*Z.partial.json"))
    if options.resume and unfinished:
        return unfinished[-1].with_name(unfinished[-1].name.replace(".partial.json", ".json"))
    stamp = files.now().removesuffix("+00:00").replace("-", "").replace(":", "") + "Z"
    return folder / f"{prefix}-{stamp}.json"


def _design(text: str) -> str:
    """An op that has designs, or a combination of designs."""
    if text not in DESIGNED:
        from fastmixer.configs.designs import parsed

        try:
            if not parsed(text):
                raise ValueError("no op")
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmixer bench",
        description="Times fastmixer against PyTorch eager and compiled, other implementations and ceilings "
        "measured in the same run. Exit codes: 0 all measured, of --quick and --final what fitted; 1 a red "
        "parity gate or a failure; 2 bad usage, an unfinished file not to be continued, or nothing to time "
        "on; 3 the time limit or a GPU that fails for good came first, --resume continues.",
    )
    add, several = parser.add_argument, {"nargs": "+"}
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    ordered = "these, one after the other as they are given; default: all, kernel first"
    add("--levels", **several, choices=LEVELS, help=ordered)
    add("--models", **several, metavar="NAME", help="as B/16; default: the paper's seven")
    add("--batch", **several, type=positive, metavar="N", help="default: 1 8 64 256 1024")
    add("--dtype", **several, choices=DTYPE_NAMES, help="default: all four")
    add("--direction", **several, choices=DIRECTIONS, help="default: both")
    add("--opponents", **several, choices=OPPONENTS, help="default: all that can race")
    race = "race every design of these ops besides, and combinations as op=design,op=design; default: none"
    add("--designs", nargs="*", type=_design, metavar="OP", help=f"of {', '.join(DESIGNED)}: {race}")
    quick = (
        "B/16 in bf16, the block at batch 256 first, against eager, torch.compile and ceilings, "
        "max-autotune last and in a file of its own; planned for 5 minutes on an H200: after them, unless "
        "--time-limit says otherwise, the rest is skipped, and the file lists it"
    )
    add("--quick", action="store_true", help=quick)
    timed = "of timing a case at most, and as many again in CUDA graphs; default: 10, with --quick 2"
    add("--seconds", type=seconds, metavar="S", help=timed)
    begun = "as 90s, 9m or 1h: begin no case that would end later"
    add("--time-limit", type=seconds, metavar="TIME", help=begun)
    final = "what the time limit ends is complete: the file lists what it skipped, and the report takes it"
    add("--final", action="store_true", help=final)
    add("--resume", action="store_true", help="continue the last unfinished run of this code")
    add("--output", type=Path, metavar="FILE", help="default: a new file in results/<gpu>/")
    add("--commit", metavar="HASH", help="recorded where git cannot say which commit this is")
    return parser


if __name__ == "__main__":
    sys.exit(main())

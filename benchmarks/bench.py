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
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastmixer.cli import DTYPES, positive, seconds

from .schema import DIRECTIONS, LEVELS, OPPONENTS, PartialFileError

if TYPE_CHECKING:
    import torch

    from .levels import Case

MODELS = ("S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14")
BATCHES = {"cuda": (1, 8, 64, 256, 1024), "cpu": (1, 8)}
ON_CPU = {
    "levels": ("block", "model"),
    "dtypes": ("bf16", "fp32"),
    "opponents": ("eager", "compile", "fused"),
}
# What --quick measures, all of B/16 in bf16, the most telling first: level, direction, batch.
# Estimated, not measured: under half a minute of timing; compiling takes the rest, some 40 s a case of which
# most is max-autotune's, less where an earlier case has tuned the same products.
QUICK = (
    ("block", "forward", 256), ("kernel", "forward", 256), ("token", "forward", 256),
    ("channel", "forward", 256), ("block", "forward_backward", 64), ("block", "forward", 1),
    ("model", "forward", 256),
)  # fmt: skip
QUICK_SECONDS = 300.0
DONE, FAILED, MISUSED, TIME_IS_UP = 0, 1, 2, 3


def main(argv: Sequence[str] | None = None) -> int:
    """Measures, and returns an exit code.

    0: all cells measured, of --quick those that fitted; 1: a red gate or a failed opponent; 2: bad usage, an
    unfinished file that cannot be continued, or nothing here to time on; 3: the time limit or a GPU that
    fails for good came first, and --resume continues.
    """
    began = time.monotonic()
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed help or its complaint
        return int(stop.code or 0)
    refusal = _why_not(options)
    if refusal:
        return _refuse(refusal)
    try:
        cases = cases_of(options)
    except ValueError as error:
        return _refuse(str(error))
    try:
        report = _measure(options, cases, began)
    except PartialFileError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("interrupted: what was measured is kept, --resume continues", file=sys.stderr)
        return 130
    if not report["complete"]:
        return TIME_IS_UP
    return DONE if all(cell["ok"] and not cell["errors"] for cell in report["cells"]) else FAILED


def _refuse(message: str) -> int:
    print(f"bench: {message}", file=sys.stderr)
    return MISUSED


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
        asked = {options.stage} if options.stage else set()
        if asked - set(ON_CPU["levels"]):
            return f"--stage {options.stage} times GPU kernels; with --device cpu there are block and model"
        return "--quick is a plan for a GPU" if options.quick else None
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA or ROCm GPU, and torch sees none: nothing was measured; there is --device cpu"
    return None


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The cases in the order in which they are measured; ValueError for an unknown model."""
    from .levels import make_cases

    cpu = options.device == "cpu"
    levels = (options.stage,) if options.stage else ON_CPU["levels"] if cpu else LEVELS
    if options.quick:
        plan = [(level, direction, batch) for level, direction, batch in QUICK if level in levels]
        return [
            case
            for level, direction, batch in plan
            for case in make_cases([level], ["B/16"], [batch], ["bfloat16"], [direction])
        ]
    dtypes = options.dtype or (ON_CPU["dtypes"] if cpu else ("bf16", "fp16", "fp32", "autocast"))
    return make_cases(
        levels,
        options.models or MODELS,
        options.batch or BATCHES[options.device],
        dict.fromkeys(DTYPES.get(dtype, dtype) for dtype in dtypes),
        options.direction or DIRECTIONS,
    )


def _measure(options: argparse.Namespace, cases: list[Case], began: float) -> dict:
    import torch

    from . import files, measure, opponents, runs
    from .cells import Bench
    from .levels import product_dtype

    device = torch.device("cpu")
    if options.device == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    asked = options.opponents or (ON_CPU["opponents"] if device.type == "cpu" else OPPONENTS)
    left_out = opponents.left_out(asked, device)
    # In the schema's order, so that a run may be resumed with the same names in another.
    names = tuple(name for name in OPPONENTS if name in {*asked, "fused"} and name not in left_out)
    timer = _timer(options, device)
    dtypes = {case.dtype: product_dtype(case.dtype) for case in cases}
    header = {
        "environment": files.environment(device, options.commit),
        "protocol": {**protocol(timer, names, left_out, device), "quick": options.quick},
        "ceilings": measure.ceilings(device, dtypes),
        "clocks": {"before": measure.clocks(device), "after": None},
    }
    output = options.output or _output(options, files.results_folder(files.device_name(device)))
    limit = options.time_limit or (QUICK_SECONDS if options.quick else float("inf"))
    bench = Bench(device, timer, names, header["ceilings"])
    report = runs.run(
        cases, bench, output, header=header, stage=options.stage, resume=options.resume, seconds=limit,
        began=began, final=options.quick,
    )  # fmt: skip
    print(f"written to {output if report['complete'] else files.partial_path(output)}")
    return report


def _timer(options: argparse.Namespace, device: torch.device) -> object:
    from . import measure

    kind = measure.CpuTimer if device.type == "cpu" else measure.CudaTimer
    return kind(max_rounds=20, seconds=2.0) if options.quick else kind()


def protocol(timer: object, names: tuple[str, ...], left_out: dict[str, str], device: torch.device) -> dict:
    """How it was measured, for the file."""
    from dataclasses import asdict

    import torch

    return {
        "timer": {"kind": type(timer).__name__, **asdict(timer)},
        "opponents": list(names),
        "left_out": left_out,
        "compile": "torch.compile(mode=..., dynamic=False)",
        "autocast": "bfloat16",
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
    }


def _output(options: argparse.Namespace, folder: Path) -> Path:
    """A new file of its own for every run; with --resume the one whose partial file is the newest."""
    from . import files

    prefix = "-".join(["bench", *([options.stage] if options.stage else []), *["quick"] * options.quick])
    if options.resume:
        stamp = r"-\d{8}T\d{6}Z\.partial\.json"
        found = [path for path in folder.glob("*.json") if re.fullmatch(re.escape(prefix) + stamp, path.name)]
        if found:
            newest = max(found, key=lambda path: path.name)
            return newest.with_name(newest.name.replace(".partial.json", ".json"))
    stamp = files.now().removesuffix("+00:00").replace("-", "").replace(":", "") + "Z"
    return folder / f"{prefix}-{stamp}.json"


# ---- arguments -------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmixer bench",
        description="Times fastmixer against PyTorch eager and compiled, other implementations and ceilings "
        "measured in the same run. Exit codes: 0 all measured, of --quick what fitted; 1 a red parity gate "
        "or a failed opponent; 2 bad usage, an unfinished file not to be continued, or nothing to time on; "
        "3 the time limit or a GPU that fails for good came first, --resume continues.",
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    parser.add_argument("--stage", choices=LEVELS, help="only this level; default: all, one after the other")
    parser.add_argument("--models", nargs="+", metavar="NAME", help="as B/16; default: the paper's seven")
    parser.add_argument("--batch", nargs="+", type=positive, metavar="N", help="default: 1 8 64 256 1024")
    parser.add_argument(
        "--dtype", nargs="+", choices=("bf16", "fp16", "fp32", "autocast"), help="default: all four"
    )
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, help="default: both")
    parser.add_argument("--opponents", nargs="+", choices=OPPONENTS, help="default: all that can race")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="B/16 in bf16, each level once, planned for 5 minutes on an H200, most of it torch.compile's; "
        "after 5 minutes, unless --time-limit says otherwise, the rest is skipped, and the file lists it",
    )
    parser.add_argument(
        "--time-limit",
        type=seconds,
        metavar="TIME",
        help="as 90s, 9m or 1h: begin no case that would end later",
    )
    parser.add_argument("--resume", action="store_true", help="continue the last unfinished run of this code")
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: a new file in results/<gpu>/")
    parser.add_argument("--commit", metavar="HASH", help="recorded where git cannot say which commit this is")
    return parser


if __name__ == "__main__":
    sys.exit(main())

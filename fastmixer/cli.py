"""The command line: ``python -m fastmixer info | verify | compile | bench | tune | evidence``.

Exit codes: 0 all is well; 1 the thing asked about is not (parity fails, a kernel does not compile); 2 the
question could not be asked (unknown command or model, unreadable checkpoint, missing package).

Each command imports what it needs itself: ``--help`` costs no torch, and ``verify`` must decide about
Triton's interpreter before anything imports triton.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fastmixer import usage
from fastmixer.usage import DEFAULT_MODEL, UsageError

# Commands that read their own arguments, by module.
OWN_PARSERS = {"bench": "fastmixer.benchmarks.bench", "evidence": "fastmixer.benchmarks.evidence.command"}

# Kinds of options.
FLAG = {"action": "store_true"}
LIST = {"nargs": "+", "action": "extend"}
NUMBER = {"type": usage.positive, "metavar": "N"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code; ``argv`` defaults to the process's own arguments."""
    argv = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    name = argv[0]
    if name in OWN_PARSERS:
        return importlib.import_module(OWN_PARSERS[name]).main(argv[1:])
    try:
        if not name.startswith("-") and name not in COMMANDS:
            known = (*COMMANDS, *OWN_PARSERS)
            raise UsageError(f"unknown command {name!r}; {usage.did_you_mean(name, known)}")
        options = _parser().parse_args(argv)
        return COMMANDS[options.command](options)
    except SystemExit as stop:  # argparse has printed help or its complaint
        return int(stop.code or 0)
    except UsageError as error:
        print(f"fastmixer: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastmixer", description="Fused Triton kernels for MLP-Mixer models."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    commands.add_parser("info", help="versions, devices, and which backend would run on each and why")
    _add_verify(commands)
    compile_ = commands.add_parser(
        "compile",
        help="compile every kernel ahead of time, without a GPU, and table what the compiler made of it",
    )
    compile_.add_argument("--arch", **LIST, default=[], help="for example sm_90 gfx942; default: all known")
    compile_.add_argument("--json", **FLAG, help="print JSON instead of tables")
    compile_.add_argument("--jobs", **NUMBER, help="worker processes; default: one per CPU")
    commands.add_parser(
        "bench", help="time kernels, halves, blocks and models against PyTorch and others, into a JSON file"
    )
    _add_tune(commands)
    commands.add_parser(
        "evidence", help="prove and measure the library on this GPU within minutes, into a folder to send"
    )
    return parser


def _add_verify(commands: argparse._SubParsersAction) -> None:
    verify = commands.add_parser(
        "verify",
        help="check a model's fused blocks against eager PyTorch and an fp64 truth, on real photographs",
        description="Runs a timm model three ways (fp64 truth, eager in the dtype, fused) on the photographs "
        "that scikit-learn ships, and compares block by block. Without a GPU the same kernels run in "
        "Triton's interpreter. Exits with 1 when parity fails.",
    )
    add = verify.add_argument
    add("model", nargs="?", default=DEFAULT_MODEL, help=f"default: {DEFAULT_MODEL}")
    add("--dtype", type=usage.dtype_argument, default="bfloat16", help="bf16 (default), fp16 or fp32")
    add("--batch", **NUMBER, default=1, help="number of images, default 1")
    add("--checkpoint", metavar="FILE", help="weights to load; otherwise they are random")
    add("--freeze", **FLAG, help="freeze the fused model first, as for serving: see fastmixer.freeze")
    add("--backward", **FLAG, help="compare the gradients too, every single one")
    blocks_help = (
        "with --backward: of how many blocks, spread evenly, or all, which adds the model end to end; "
        "default: all on a GPU, 3 in the interpreter"
    )
    add("--blocks", type=usage.positive_or_all, metavar="N", help=blocks_help)


def _add_tune(commands: argparse._SubParsersAction) -> None:
    tune = commands.add_parser(
        "tune",
        help="find this GPU's fastest tiles for given models and keep them for every later run",
        description="Compiles, checks and times candidates for every kernel and half of the models' blocks, "
        "and writes what is faster than the default into the user's table. What a table has is skipped; a "
        "run that is stopped loses nothing but the kernel it was at. Exits with 1 when it was interrupted, a "
        "default fails or a choice could not be made, with 2 where there is no GPU.",
    )
    add = tune.add_argument
    add("--model", **LIST, metavar="NAME", help=f"default: {DEFAULT_MODEL}")
    add("--batch", **LIST, **NUMBER, help="default: 64")
    dtype_help = (
        "bf16 (default), fp16, fp32, autocast: blocks whose input is fp32; inside timm's models "
        "autocast is bf16"
    )
    add("--dtype", **LIST, type=usage.dtype_or_autocast, metavar="D", help=dtype_help)
    add("--gelu", choices=("none", "tanh"), default="none", help="the models' own; default: none (erf)")
    add("--backward", **FLAG, help="the backward's kernels too")
    add("--op", **LIST, metavar="OP", help="only these, for example channel_fc1 token_half")
    add("--budget", type=usage.seconds, default=120.0, metavar="TIME", help="90, 120s (default), 5m or 1h")
    add("--jobs", **NUMBER, help="compiler processes; default: one per CPU")
    add("--force", **FLAG, help="measure again what a table has")


def _info(options: argparse.Namespace) -> int:
    from fastmixer import info

    print("\n".join(info.lines()))
    return 0


def _verify(options: argparse.Namespace) -> int:
    if options.blocks and not options.backward:
        raise UsageError("--blocks chooses whose gradients to compare: give --backward too")
    if options.freeze and options.backward:
        raise UsageError("--freeze and --backward exclude each other: a frozen block gives no gradients")
    import torch

    # As dispatch.why_not_triton. Must stand before that, timm or anything else imports triton.
    has_gpu = torch.cuda.is_available()
    if not has_gpu or not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        os.environ["TRITON_INTERPRET"] = "1"
    from fastmixer.verify import run as verify

    return verify.run(
        options.model,
        options.dtype,
        options.batch,
        options.checkpoint,
        gradients=(options.blocks or "auto") if options.backward else None,
        freeze=options.freeze,
    )


def _compile(options: argparse.Namespace) -> int:
    from fastmixer.aot import report

    try:
        return report.run(options.arch, options.json, options.jobs)
    except (ValueError, RuntimeError) as error:  # an unknown arch; triton or rich missing
        raise UsageError(str(error)) from error


def _tune(options: argparse.Namespace) -> int:
    from fastmixer.tune import command

    return command.run(
        options.model or [DEFAULT_MODEL],
        options.batch or [64],
        options.dtype or ["bfloat16"],
        gelu=options.gelu,
        backward=options.backward,
        ops=options.op or (),
        budget=options.budget,
        workers=options.jobs,
        force=options.force,
    )


COMMANDS = {"info": _info, "verify": _verify, "compile": _compile, "tune": _tune}

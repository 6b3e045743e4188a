"""``python -m fastmixer.configs.compile_candidates``: records what the candidates' compiled code needs.

Compiles every candidate of every op for each arch with the installed Triton, no GPU needed, and writes
``compiled/triton-<version>/<arch>.json`` beside this file. To be run again when a kernel or a candidate
changes, with ``--op`` for what one kernel's change touches, and with a new Triton; Triton's cache makes what
did not change cheap. Forward and backward launches are recorded from ``launch`` itself on meta tensors.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import resources
from .candidates import candidates
from .device_code import kernels_hash
from .targets import TARGETS, Target
from .tiles import ONE_PASS, Problem, TileConfig, rule, wgrad_in_one_launch

if TYPE_CHECKING:
    from fastmixer.launch import Launch

BATCH = 64  # no candidate's code depends on it
# Tokens whose pieces the paper's models have at 224 pixels, with one model's channels and hidden units each;
# and tokens that take two passes.
TOKEN_SHAPES = ((49, 768, 384), (196, 768, 384), (256, 1280, 640))
TWO_PASS_SHAPE = (784, 768, 384)
CHANNEL_SHAPE = (196, 768, 3072)
BF16, FP32 = torch.bfloat16, torch.float32
OPS = (
    "token_mixing",
    "channel_fc1",
    "channel_fc2",
    "channel_mlp_hidden_bwd",
    "channel_mlp_hidden_bwd_recompute",
    "token_dgrad",
    "token_wgrad_fc1",
    "token_wgrad_fc2",
    "token_fc1",
    "token_fc2",
    "token_mlp_hidden_bwd_recompute",
)


def jobs(target: Target, ops: Sequence[str] = OPS) -> Iterator[tuple[str, Problem, TileConfig]]:
    """What to compile: op, problem and tile; one problem for each key of a record.

    bfloat16 stands for both 16-bit types: float16 has two more terms in GELU's polynomial.
    """
    for op in ops:
        shapes = (CHANNEL_SHAPE,) if op.startswith("channel") else (TWO_PASS_SHAPE,)
        for shape in TOKEN_SHAPES if op in ONE_PASS else shapes:
            for x_dtype, dtype in ((BF16, BF16), (FP32, BF16), (FP32, FP32)):
                if x_dtype != dtype and op not in resources.READS_X:
                    continue
                problem = Problem(BATCH, *shape, x_dtype, dtype)
                if op == "token_wgrad_fc2" and wgrad_in_one_launch(problem, target):
                    continue  # never launched
                for tiles in candidates(op, problem, target):
                    yield op, problem, tiles


def recorded_launch(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Launch:
    """The launch of ``op`` with ``tiles``, on meta tensors; the other ops have the rule's tiles."""
    from fastmixer import launch, launch_backward, launch_forward

    launches: list[launch.Launch] = []

    def chosen(name: str, problem: Problem, target: Target) -> TileConfig | None:
        return tiles if name == op else None if name.endswith("_half") else rule(name, problem, target)

    context = launch.Context(target, select=chosen, execute=launches.append)
    B, S, C, hidden, x_dtype, dtype = problem
    x = torch.empty((B, S, C), dtype=x_dtype, device="meta")
    of = "token" if op.startswith("token") else "channel"
    half = _half(problem, S if of == "token" else C)
    blocks = -(-C // 64) if of == "channel" else 1
    moments = launch.Moments(torch.empty((blocks, 2, B * S), device="meta"), C // blocks)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        if "bwd" not in op and "grad" not in op:
            run = launch_forward.token_mixing if of == "token" else launch_forward.channel_mixing
            run(x, half, dtype, context, moments)
        elif of == "token":
            needs = launch_backward.Needs(*[True] * 7)
            launch_backward.token_mixing(x, x, moments, half, dtype, context, needs)
        else:
            needs = launch_backward.Needs(*[True] * 7)
            p = None if op.endswith("recompute") else launch.empty_hidden(B * S, hidden, dtype, x.device)
            launch_backward.channel_mixing(x, x, moments, half, dtype, context, needs, p=p)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    kernel = kernel_of(op)
    mine = [item for item in launches if item.kernel is kernel]
    return mine[-1] if op == "token_wgrad_fc2" else mine[0]


KERNELS = {  # op: its kernel in launch.kernels(), where the names differ
    "channel_fc1": "fc1",
    "channel_fc2": "fc2",
    "token_fc1": "fc1",
    "token_fc2": "fc2",
    "channel_mlp_hidden_bwd": "mlp_hidden_bwd",
    "channel_mlp_hidden_bwd_recompute": "mlp_hidden_bwd",
    "token_mlp_hidden_bwd_recompute": "mlp_hidden_bwd",
    "token_wgrad_fc1": "token_wgrad",
    "token_wgrad_fc2": "token_wgrad",
}


def kernel_of(op: str):
    """The jitted function of an op."""
    from fastmixer import launch

    return getattr(launch.kernels(), KERNELS.get(op, op))


def code_of(op: str) -> str:
    """Identifies the device code that an op is compiled from."""
    return kernels_hash(kernel_of(op).fn.__module__.rpartition(".")[2])


def _half(problem: Problem, width: int):
    from fastmixer.half import Half

    def tensor(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    norm = problem.x_dtype
    return Half(
        tensor(problem.channels, dtype=norm),
        tensor(problem.channels, dtype=norm),
        tensor(problem.hidden, width),
        tensor(problem.hidden),
        tensor(width, problem.hidden),
        tensor(width),
    )


def compile_one(op: str, problem: Problem, tiles: TileConfig, arch: str) -> list[int] | None:
    """The row of a record; None if Triton cannot compile it. In a process without TRITON_INTERPRET."""
    from fastmixer.aot import compile_launch

    target = TARGETS[arch]
    try:
        compiled = compile_launch(recorded_launch(op, problem, tiles, target), target)
    except Exception as error:  # whatever the compiler says: this tile is no choice
        print(f"{arch} {resources.key_of(op, problem, tiles)}: {error!r:.200}", file=sys.stderr)
        return None
    counts = compiled.counts
    return [
        compiled.registers, compiled.shared_memory, compiled.tensor_memory, counts.spills, counts.loop_spills,
        counts.instructions, counts.loop_instructions, int(counts.hgmma > 0), int(counts.serialised),
    ]  # fmt: skip


def _start_worker() -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())


def record(arch: str, pool: ProcessPoolExecutor, ops: Sequence[str] = OPS) -> dict:
    """The content of an arch's file: entries of ``ops`` new, those of other ops as they were.

    Other ops are left out where they were compiled from other device code, or by another build of Triton.
    """
    import triton

    path = path_of(arch, triton.__version__)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("triton") != triton.__version__:
        before = {"kernels": {}, "entries": {}}
    code = {op: code_of(op) for op in OPS}
    wanted = {resources.key_of(*job): job for job in jobs(TARGETS[arch])}
    rows = {key: pool.submit(compile_one, *job, arch) for key, job in wanted.items() if job[0] in ops}
    entries = {}
    for key, (op, *_) in wanted.items():
        if key in rows:
            entries[key] = rows[key].result()
        elif key in before["entries"] and before["kernels"].get(op) == code[op]:
            entries[key] = before["entries"][key]
    return {
        "schema": resources.SCHEMA,
        "arch": arch,
        "triton": triton.__version__,
        "kernels": code,
        "columns": list(resources.Resources._fields),
        "entries": entries,
    }


def path_of(arch: str, triton: str) -> Path:
    """The file of an arch for a version of Triton; a build's own suffix does not count."""
    version = ".".join(map(str, resources.release(triton)))
    return Path(__file__).parent / "compiled" / f"triton-{version}" / f"{arch}.json"


def write(arch: str, content: dict) -> None:
    """One entry a line, so that a change can be read in a diff."""
    head = {key: value for key, value in content.items() if key != "entries"}
    lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in content["entries"].items()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "entries": {\n' + ",\n".join(lines) + "\n }\n}\n"
    path = path_of(arch, content["triton"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastmixer.configs.compile_candidates", description=__doc__)
    parser.add_argument("archs", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--op", action="append", choices=OPS, help="compile only these")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="worker processes")
    options = parser.parse_args(arguments)
    for arch in options.archs:
        if arch not in TARGETS:
            parser.error(f"archs: expected some of {', '.join(TARGETS)}, got {arch!r}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_start_worker) as pool:
        for arch in options.archs:
            start = time.perf_counter()
            content = record(arch, pool, options.op or OPS)
            write(arch, content)
            missing = sum(row is None for row in content["entries"].values())
            seconds = time.perf_counter() - start
            print(f"{arch}: {len(content['entries'])} candidates, {missing} do not compile, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

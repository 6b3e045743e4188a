"""``python -m fastmixer.aot.record``: records what the candidates' compiled code needs.

Compiles every candidate of every op for each arch with the installed Triton, no GPU needed, and writes
``configs/compiled/triton-<version>/<arch>.json``. To be run again when a kernel or a candidate
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

from fastmixer.configs import resources
from fastmixer.configs.candidates import candidates
from fastmixer.configs.device_code import kernels_hash
from fastmixer.configs.ops import HALVES, OPS, TUNED
from fastmixer.configs.problem import Problem, TileConfig, cdiv
from fastmixer.configs.targets import TARGETS, Target
from fastmixer.configs.tiles import rule, wgrad_in_one_launch

if TYPE_CHECKING:
    from fastmixer.ops.launch import Launch

BATCH = 64  # no candidate's code depends on it
# Tokens whose pieces the paper's models have at 224 pixels, with one model's channels and hidden units each;
# and tokens that take two passes.
TOKEN_SHAPES = ((49, 768, 384), (196, 768, 384), (256, 1280, 640))
TWO_PASS_SHAPE = (784, 768, 384)
CHANNEL_SHAPE = (196, 768, 3072)
BF16, FP32 = torch.bfloat16, torch.float32


def jobs(target: Target, ops: Sequence[str] = TUNED) -> Iterator[tuple[str, Problem, TileConfig]]:
    """What to compile: op, problem and tile; one problem for each key of a record.

    bfloat16 stands for both 16-bit types: float16 has two more terms in GELU's polynomial.
    """
    for op in ops:
        shapes = (CHANNEL_SHAPE,) if OPS[op].half == "channel" else (TWO_PASS_SHAPE,)
        for shape in TOKEN_SHAPES if OPS[op].one_pass else shapes:
            for x_dtype, dtype in ((BF16, BF16), (FP32, BF16), (FP32, FP32)):
                if x_dtype != dtype and not OPS[op].reads_x:
                    continue
                problem = Problem(BATCH, *shape, x_dtype, dtype)
                if op == "token_wgrad_fc2" and wgrad_in_one_launch(problem, target):
                    continue  # never launched
                for tiles in candidates(op, problem, target):
                    yield op, problem, tiles


def recorded_launch(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Launch:
    """The launch of ``op`` with ``tiles``, on meta tensors; the other ops have the rule's tiles."""
    from fastmixer.ops import channel_mixing, launch, token_mixing
    from fastmixer.params import Needs

    launches: list[launch.Launch] = []

    def chosen(name: str, problem: Problem, target: Target) -> TileConfig | None:
        return tiles if name == op else None if name in HALVES else rule(name, problem, target)

    context = launch.Context(target, select=chosen, execute=launches.append)
    B, S, C, hidden, x_dtype, dtype = problem
    x = torch.empty((B, S, C), dtype=x_dtype, device="meta")
    token = OPS[op].half == "token"
    params = _params(problem, S if token else C)
    moments = torch.empty((1 if token else cdiv(C, 64), 2, B * S), device="meta")
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        if OPS[op].direction == "forward":
            (token_mixing if token else channel_mixing).forward(x, params, dtype, context, moments)
        elif token:
            token_mixing.backward(x, x, moments, params, dtype, context, Needs(*[True] * 7))
        else:
            p = None if OPS[op].products == 2 else launch.empty_hidden(B * S, hidden, dtype, x.device)
            channel_mixing.backward(x, x, moments, params, dtype, context, Needs(*[True] * 7), p=p)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision
    kernel = kernel_of(op)
    of_op = [item for item in launches if item.kernel is kernel]
    return of_op[-1] if op == "token_wgrad_fc2" else of_op[0]


def kernel_of(op: str):
    """The jitted function of an op."""
    from fastmixer.ops import launch

    return getattr(launch.kernels(), OPS[op].kernel)


def code_of(op: str) -> str:
    """Identifies the device code that an op is compiled from."""
    return kernels_hash(kernel_of(op).fn.__module__.rpartition(".")[2])


def _params(problem: Problem, width: int):
    from fastmixer.params import MixingParams

    def tensor(*shape: int, dtype: torch.dtype = problem.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    norm = problem.x_dtype
    return MixingParams(
        tensor(problem.channels, dtype=norm),
        tensor(problem.channels, dtype=norm),
        tensor(problem.hidden, width),
        tensor(problem.hidden),
        tensor(width, problem.hidden),
        tensor(width),
    )


def compile_one(op: str, problem: Problem, tiles: TileConfig, arch: str) -> list[int] | None:
    """The row of a record; None if Triton cannot compile it. In a process without TRITON_INTERPRET."""
    from fastmixer.aot.compile import compile_launch

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


def record(arch: str, pool: ProcessPoolExecutor, ops: Sequence[str] = TUNED) -> dict:
    """The content of an arch's file: entries of ``ops`` new, those of other ops as they were.

    Other ops are left out where they were compiled from other device code, or by another build of Triton.
    """
    import triton

    path = path_of(arch, triton.__version__)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("triton") != triton.__version__:
        before = {"kernels": {}, "entries": {}}
    code = {op: code_of(op) for op in TUNED}
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
    return Path(resources.__file__).parent / "compiled" / f"triton-{version}" / f"{arch}.json"


def write(arch: str, content: dict) -> None:
    """One entry a line, so that a change can be read in a diff."""
    head = {key: value for key, value in content.items() if key != "entries"}
    lines = [f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in content["entries"].items()]
    text = json.dumps(head, indent=1)[:-2] + ',\n "entries": {\n' + ",\n".join(lines) + "\n }\n}\n"
    path = path_of(arch, content["triton"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastmixer.aot.record", description=__doc__)
    parser.add_argument("archs", nargs="*", default=list(TARGETS), help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--op", action="append", choices=TUNED, help="compile only these")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="worker processes")
    options = parser.parse_args(arguments)
    for arch in options.archs:
        if arch not in TARGETS:
            parser.error(f"archs: expected some of {', '.join(TARGETS)}, got {arch!r}")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=_start_worker) as pool:
        for arch in options.archs:
            start = time.perf_counter()
            content = record(arch, pool, options.op or TUNED)
            write(arch, content)
            missing = sum(row is None for row in content["entries"].values())
            seconds = time.perf_counter() - start
            print(f"{arch}: {len(content['entries'])} candidates, {missing} do not compile, {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())

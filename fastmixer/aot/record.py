"""``python -m fastmixer.aot.record``: records what the candidates' compiled code needs.

Compiles every candidate of every op for each arch with the installed Triton, no GPU needed, and writes
``configs/compiled/triton-<version>/<arch>.json``. To be run again when a kernel or a candidate
changes, with ``--op`` for what one kernel's change touches, and with a new Triton; Triton's cache makes what
did not change cheap.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import torch

from fastmixer.aot.recording import meta, meta_params, needs_of, recording
from fastmixer.aot.workers import worker_pool
from fastmixer.configs import resources
from fastmixer.configs.designs import candidates
from fastmixer.configs.ops import HALVES, OPS, TUNED
from fastmixer.configs.problem import Problem, TileConfig, cdiv
from fastmixer.configs.resources import Resources
from fastmixer.configs.targets import TARGETS, Target
from fastmixer.configs.tiles import is_launched, rule
from fastmixer.ops import channel_mixing, launch, token_mixing

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
        # Only code that runs in one pass has other code for other tokens: ``resources.key_of``.
        for shape in TOKEN_SHAPES if OPS[op].one_pass else shapes:
            for x_dtype, dtype in ((BF16, BF16), (FP32, BF16), (FP32, FP32)):
                if x_dtype != dtype and not OPS[op].reads_x:
                    continue
                problem = Problem(BATCH, *shape, x_dtype, dtype)
                if not is_launched(op, problem, target):
                    continue
                for tiles in candidates(op, problem, target):
                    yield op, problem, tiles


def recorded_launch(op: str, problem: Problem, tiles: TileConfig, target: Target) -> launch.Launch:
    """The launch of ``op`` with ``tiles``, on meta tensors; the other ops have the rule's tiles."""

    def choose(name: str, problem: Problem, target: Target) -> TileConfig | None:
        return tiles if name == op else None if name in HALVES else rule(name, problem, target)

    B, S, C, hidden, x_dtype, dtype = problem[:6]
    half = OPS[op].half
    x, params = meta(B, S, C, dtype=x_dtype), meta_params(half, problem)
    before = problem._replace(hidden=TOKEN_SHAPES[1][2])  # the token half, which leaves blocks of moments
    blocks = 1 if half == "token" else cdiv(C, rule("token_mixing", before, target).block_m)
    moments = meta(blocks, 2, B * S)
    with recording(target, choose) as (context, launches):
        if OPS[op].direction == "forward":
            mixing = token_mixing if half == "token" else channel_mixing
            mixing.forward(x, params, dtype, context, moments)
        elif half == "token":
            token_mixing.backward(x, x, moments, params, dtype, context, needs_of(params))
        else:
            p = None if OPS[op].products == 2 else launch.empty_hidden(B * S, hidden, dtype, x.device)
            channel_mixing.backward(x, x, moments, params, dtype, context, needs_of(params), p=p)
    launches = [item for item in launches if item.kernel_name == OPS[op].kernel]
    return launches[-1] if op == "token_wgrad_fc2" else launches[0]


def compile_one(op: str, problem: Problem, tiles: TileConfig, arch: str) -> list[int | bool] | None:
    """The row of a record; None if Triton cannot compile it. In a process without TRITON_INTERPRET."""
    from fastmixer.aot.compile import compile_launch

    target = TARGETS[arch]
    try:
        row = compile_launch(recorded_launch(op, problem, tiles, target), target)
    except Exception as error:  # whatever the compiler says: this tile is no choice
        print(f"{arch} {resources.key_of(op, problem, tiles)}: {error!r:.200}", file=sys.stderr)
        return None
    return list(Resources.of(row))


def record(arch: str, pool: Executor, ops: Sequence[str] = TUNED) -> dict:
    """The content of an arch's file: entries of ``ops`` new, those of other ops as they were.

    Other ops are left out where they were compiled from other device code, by another build of Triton, or
    when other columns were recorded.
    """
    import triton

    path = path_of(arch, triton.__version__)
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    columns = list(Resources._fields)
    if before.get("triton") != triton.__version__ or before["columns"] != columns:
        before = {"kernels": {}, "entries": {}}
    code = {op: resources.code_of(op) for op in TUNED}
    wanted = {resources.key_of(*job): job for job in jobs(TARGETS[arch])}
    rows = {key: pool.submit(compile_one, *job, arch) for key, job in wanted.items() if job[0] in ops}
    entries = {}
    for key, (op, *_) in wanted.items():
        if key in rows:
            entries[key] = rows[key].result()
        elif key in before["entries"] and before["kernels"].get(op) == code[op]:
            entries[key] = before["entries"][key]
    return {
        "schema": 1,
        "arch": arch,
        "triton": triton.__version__,
        "kernels": code,
        "columns": columns,
        "entries": entries,
    }


def path_of(arch: str, triton: str) -> Path:
    """The file of an arch for a version of Triton; a build's own suffix does not count."""
    version = ".".join(map(str, resources.release(triton)))
    return resources.COMPILED / f"triton-{version}" / f"{arch}.json"


def write(arch: str, content: dict) -> None:
    """One line per entry, so that a change can be read in a diff."""
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
    parser.add_argument("--jobs", type=int, help="worker processes")
    options = parser.parse_args(arguments)
    for arch in options.archs:
        if arch not in TARGETS:
            parser.error(f"archs: expected some of {', '.join(TARGETS)}, got {arch!r}")
    with worker_pool(options.jobs) as pool:
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

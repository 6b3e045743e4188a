"""What compiled code needs of a multiprocessor, and how many programs that leaves room for.

The candidates' figures were read from code compiled ahead of time and lie in
``compiled/triton-<version>/<arch>.json``, which ``python -m fastmixer.aot.record`` writes. They depend on
Triton, the tile, the dtypes and, in one-pass ops, the pieces of the token axis; not on the batch. Two
constants of that code are one model's for each: the number of hidden units, which moves addresses and the end
of a loop, and in channel_fc1 the number of blocks of moments, on which the compiler's schedule may depend.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from fastmixer.configs.device_code import kernel_hash, triton_version
from fastmixer.configs.ops import OPS
from fastmixer.configs.problem import Problem, TileConfig, cdiv, round_up
from fastmixer.configs.targets import Target
from fastmixer.configs.tiles import ALIGNED, token_pieces


@dataclass(frozen=True)
class Multiprocessor:
    """What the programs on one multiprocessor (AMD: compute unit) share.

    ``registers``, 32-bit ones, and ``warps`` are split evenly over four schedulers, and a warp lives on
    one of them. Sources: CUDA C++ Programming Guide, table "Technical Specifications per Compute
    Capability"; AMD Instinct MI300 ISA guide and LLVM's AMDGPU usage guide for gfx942.
    """

    warps: int
    programs: int
    shared_memory: int  # bytes
    shared_memory_reserved: int  # bytes the system takes for each program
    registers: int = 65536
    register_unit: int = 256  # registers are handed to a warp in multiples of this
    warp_size: int = 32
    tensor_memory: int = 0  # columns


COMPILED = Path(__file__).parent / "compiled"  # the records
THREADS = 1024  # per program, on every GPU
_KIB = 1024
MULTIPROCESSORS: dict[int | str, Multiprocessor] = {
    80: Multiprocessor(64, 32, 164 * _KIB, _KIB),
    86: Multiprocessor(48, 16, 100 * _KIB, _KIB),
    89: Multiprocessor(48, 24, 100 * _KIB, _KIB),
    90: Multiprocessor(64, 32, 228 * _KIB, _KIB),
    100: Multiprocessor(64, 32, 228 * _KIB, _KIB, tensor_memory=512),
    120: Multiprocessor(48, 24, 100 * _KIB, _KIB),
    # 8 waves on each of four SIMDs; 512 vector registers per lane, accumulation registers included, in
    # units of 8; a compute unit has barriers for 16 workgroups.
    "gfx942": Multiprocessor(32, 16, 64 * _KIB, 0, 4 * 512 * 64, 8 * 64, warp_size=64),
}


def programs_per_multiprocessor(
    arch: int | str, registers: int, num_warps: int, shared_memory: int, tensor_memory: int = 0
) -> int:
    """How many programs one multiprocessor can hold at a time; 0 if not even one fits.

    registers: per thread; shared_memory: bytes, without what the system reserves; tensor_memory: columns.
    ValueError: unknown ``arch``.
    """
    if arch not in MULTIPROCESSORS:
        raise ValueError(f"arch: expected one of {list(MULTIPROCESSORS)}, got {arch!r}")
    has = MULTIPROCESSORS[arch]
    registers_per_warp = round_up(max(registers, 1) * has.warp_size, has.register_unit)
    warps = min(has.warps, 4 * (has.registers // 4 // registers_per_warp))
    limits = [has.programs, warps // num_warps]
    if shared := round_up(shared_memory + has.shared_memory_reserved, 128):
        limits.append(has.shared_memory // shared)
    if tensor_memory:
        limits.append(has.tensor_memory // tensor_memory)
    return min(limits)


class Resources(NamedTuple):
    """What one program of a compiled kernel needs and does; counts are static, as in ``aot.sass.count``."""

    registers: int  # per thread
    shared_memory: int  # bytes
    tensor_memory: int  # columns
    spills: int  # stores and loads
    loop_spills: int
    instructions: int
    loop_instructions: int
    full_waits: int  # for all wgmma in flight, in one step of the loop over products that has most
    wgmma_columns: int  # of the widest wgmma in a loop
    wgmma: bool  # the products run as warp-group instructions (sm_90)
    serialised: bool  # and each part of a product waits for the one before

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Resources:
        """From values by name, of which there may be more: a row of ``aot.compile.compile_launch``."""
        return cls(*(row[name] for name in cls._fields))

    def is_clean(self, op: str) -> bool:
        """Whether nothing spills in a loop, no product waits inside, and a plain one at most once a step.

        One-pass ops may wait more often: of the several products in a step some need those before them, and
        above 64 tokens no tile waits only once.
        """
        drained = OPS[op].is_matrix and self.full_waits > 1
        return not (self.loop_spills or self.serialised or drained)

    def residency(self, arch: int | str, num_warps: int) -> int:
        """Programs that one multiprocessor holds at a time; 0: it cannot run."""
        return programs_per_multiprocessor(
            arch, self.registers, num_warps, self.shared_memory, self.tensor_memory
        )


def key_of(op: str, problem: Problem, tiles: TileConfig) -> str:
    """The name of a record: what the compiled code of an aligned problem mostly depends on.

    One-pass code has all sizes as constants, and a bias may lie in the padding: these move counts by few
    instructions, and the catalogue has cases of either kind.

    "" where rows cannot be loaded 16 bytes at a time: the records do not hold for such a problem. One GELU
    stands for both, whose polynomials have as many terms.
    """
    S, C, H = problem[1:4]
    widths = [C] if OPS[op].one_pass else [C, H, S] if OPS[op].half == "token" else [C, H]
    if any(width % ALIGNED for width in widths):
        return ""
    pieces = f"{sum(token_pieces(problem.tokens))} tokens" if OPS[op].one_pass else "-"
    wide = "wide " * (OPS[op].reads_x and problem.x_dtype.itemsize > problem.dtype.itemsize)
    return f"{op}, {pieces}, {8 * problem.dtype.itemsize} bit {wide}x, {tile_name(tiles)}"


def tile_name(tiles: TileConfig) -> str:
    """What a record's key ends in."""
    kind = " tma" * tiles.descriptors + " persistent" * tiles.persistent
    return f"{tiles.block_m}x{tiles.block_n}x{tiles.block_k} {tiles.num_warps}w {tiles.num_stages}s{kind}"


def records(target: Target) -> Mapping[str, Resources | None]:
    """What was recorded for an arch, by ``key_of``; None: it does not compile. Empty for an unknown arch.

    Of the target's Triton, or of the one that ``recorded_triton`` takes for it.
    """
    return recorded(target.arch).get(recorded_triton(target), MappingProxyType({}))


def recorded_triton(target: Target) -> str | None:
    """The Triton whose records hold for a target, as "3.6.0"; None: nothing is recorded for its arch."""
    return nearest(recorded(target.arch), target.triton or triton_version())


def nearest(versions: Iterable[str], version: str) -> str | None:
    """Of the recorded versions the one itself, else the newest that is older, else the oldest.

    The newest where ``version`` is none ("not installed", "of unknown version"); None if nothing is recorded.
    """
    known, asked = sorted(versions, key=release), release(version)
    not_newer = [one for one in known if not asked or release(one) <= asked]
    return next(iter(not_newer[-1:] or known), None)


def release(version: str) -> tuple[int, ...]:
    """ "3.6.0+git1a2b" -> (3, 6, 0), a release without what a build adds; () where it is no version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    return tuple(int(number or 0) for number in match.groups()) if match else ()


@functools.cache
def recorded(arch: int | str) -> Mapping[str, Mapping[str, Resources | None]]:
    """The records of an arch by version of Triton: package data, read once per process, constant as code."""
    stem = f"sm_{arch}" if isinstance(arch, int) else arch
    versions = {}
    for file in COMPILED.glob(f"triton-*/{stem}.json"):
        needs = _read(json.loads(file.read_text(encoding="utf-8")))
        versions[file.parent.name.removeprefix("triton-")] = MappingProxyType(needs)
    return versions


def _read(content: Mapping[str, Any]) -> dict[str, Resources | None]:
    """What a file says of the installed device code: nothing of an op whose kernel was another one then.

    Nor of any op where a column is missing. Files and code are installed together: this happens to those who
    edit a kernel, until they record it anew.
    """
    columns, code = content["columns"], content["kernels"]
    if not set(columns).issuperset(Resources._fields):
        return {}
    of_this_code = {op for op in code if op in OPS and code[op] == code_of(op)}
    rows = ((key, row) for key, row in content["entries"].items() if key.partition(",")[0] in of_this_code)
    return {key: row and Resources.of(dict(zip(columns, row, strict=True))) for key, row in rows}


def code_of(op: str) -> str:
    """Identifies the device code that an op is compiled from."""
    return kernel_hash(OPS[op].kernel)


def is_recorded(op: str, problem: Problem, tiles: TileConfig, target: Target) -> bool:
    """Whether anybody tried to compile this tile for such a problem."""
    return key_of(op, problem, tiles) in records(target)


def find(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Resources | None:
    """The record of a candidate; None if there is none for this problem, or it does not compile."""
    return records(target).get(key_of(op, problem, tiles))


def usable(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Resources | None:
    """The recorded resources of a tile if a program of it fits the target; None if not, or not recorded."""
    needs = find(op, problem, tiles, target)
    fits = needs and needs.shared_memory <= target.shared_memory
    return needs if fits and needs.residency(target.arch, tiles.num_warps) else None


def cannot_run(op: str, problem: Problem, tiles: TileConfig, target: Target) -> bool:
    """Whether the tile was compiled for such a problem and no program of it fits the target."""
    return is_recorded(op, problem, tiles, target) and usable(op, problem, tiles, target) is None


def why_not(op: str, problem: Problem, tiles: TileConfig, target: Target) -> str:
    """Why no program of a tile can run on the target, as far as that is known without compiling; or ""."""
    warp_size = MULTIPROCESSORS[target.arch].warp_size if target.arch in MULTIPROCESSORS else 32
    if tiles.num_warps * warp_size > THREADS:
        return f"{tiles.num_warps} warps of {warp_size} are more than {THREADS} threads"
    if tiles.descriptors and (target.backend != "cuda" or target.arch < 90):
        return "tensor descriptors are for NVIDIA GPUs from sm_90"
    # AMD's one pass is recorded with one stage only: nothing is known of more.
    known = target.backend != "hip" or not OPS[op].one_pass
    needed = least_shared_memory(op, problem, tiles) if known else 0
    if needed > target.shared_memory:
        return f"its stages need {needed} bytes of shared memory, a program has {target.shared_memory}"
    if cannot_run(op, problem, tiles, target):
        return "compiled for this GPU, it does not fit"
    return ""


def least_shared_memory(op: str, problem: Problem, tiles: TileConfig) -> int:
    """Bytes that the stages of a loop over products take at the very least: no record is below it."""
    if op.startswith("layer_norm"):
        return 0
    # One pass: a piece of a weight for all tokens; else a tile of each operand.
    stages, elements = tiles.num_stages, (tiles.block_m + tiles.block_n) * tiles.block_k
    if OPS[op].one_pass:
        elements = sum(token_pieces(problem.tokens)) * tiles.block_n
        # The hidden is a constant of its code: a loop may be short.
        stages = min(stages, cdiv(problem.hidden, tiles.block_n))
    return (stages - 1) * elements * problem.dtype.itemsize

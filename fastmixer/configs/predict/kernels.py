"""What a launch of ours is predicted to take with given tiles: the part of the cost model that knows kernels.

Programs run in waves of as many as fit at once. In a wave a multiprocessor needs the longest of: its matrix
products and the instructions beside them as far as they do not overlap, its share of the L2 bandwidth, and
the latency of one program's loop. The whole takes at least as long as its bytes at the memory's bandwidth.

Everything here is a prediction from data sheets and compiled code; NO FIGURE HAS BEEN TIMED. The assumptions
are the constants below, meant to order designs, not to be exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastmixer.configs.ops import OPS, TUNED, matrix_sizes
from fastmixer.configs.problem import Problem, TileConfig, cdiv, round_up
from fastmixer.configs.resources import Resources, records, tile_name
from fastmixer.configs.targets import Device, Target
from fastmixer.configs.tiles import (
    multiplies_on_ordinary_cores,
    token_pieces,
    wgrad_in_one_launch,
    wgrad_splits,
)

# What long products reach of the data sheet under the power limit: about 790 of 989 TFLOP/s is what a good
# library product is known to reach on an H200.
SUSTAINED = 0.80
MEMORY_EFFICIENCY = 0.90  # 4.3 of 4.8 TB/s in a copy on an H200
# mma.sync, which runs where a tile has fewer rows than wgmma needs, against wgmma on sm_90: arXiv 2402.13499.
MMA_SYNC_ON_HOPPER = 0.62
# ASSUMED: how much of the shorter of products and other instructions hides under the longer: with one program
# of 4 warps on a multiprocessor, with one of more warps, and with more programs; none with one program whose
# products wait for each other.
OVERLAP_ALONE, OVERLAP_WARPS, OVERLAP_SHARED = 0.3, 0.7, 0.8
# ASSUMED share of the issue slots that find a warp ready; lower where the products themselves are ordinary
# instructions that wait for operands from shared memory.
ISSUE, ISSUE_FP32 = 0.85, 0.70
SHARED_MEMORY_BYTES = 128  # per cycle and multiprocessor: 32 banks of 4 bytes
L2_BYTES_PER_MULTIPROCESSOR = 64  # per cycle: what one multiprocessor can take from L2 (A100 whitepaper)
# ASSUMED share of a program's reads that L2 itself has to deliver: neighbours that ask for the same operand
# at about the same time are served together (otherwise no 128 x 256 tile could reach what it does).
L2_SHARED_READS = 0.6
# ASSUMED cycles: from a load to its use, hidden by the stages of the pipeline; of a barrier and the issue of
# the next step; from a program's start to its first product plus from its last to its end.
LOAD_LATENCY, STEP_LATENCY, PROGRAM_LATENCY = 500, 60, 2000
# ESTIMATED seconds from the end of one kernel to the start of the next in a CUDA graph; reported for CUDA.
LAUNCH = 1.5e-6
ACCUMULATOR = 4  # bytes of a statistic or a partial sum


class Prediction(NamedTuple):
    """Predicted, never measured.

    seconds: of the launch, with the gap to the next; bound: what takes longest ("matrix", "instructions",
    "L2", "latency" or "memory").
    """

    seconds: float
    bound: str


def total(parts: list[Prediction]) -> Prediction:
    """Launches one after the other; the bound is the longest one's."""
    longest = max(parts, key=lambda part: part.seconds)
    return Prediction(sum(part.seconds for part in parts), longest.bound)


def tiled(
    op: str, problem: Problem, tiles: TileConfig, device: Device, resources: Resources | None
) -> Prediction:
    """A launch of tiles that need these resources, else those ``estimated``; ValueError if none fits."""
    target = device.target
    resources = resources or estimated(op, problem, tiles, target)
    work = work_of(op, problem, tiles, target)
    resident = resources.residency(target.arch, tiles.num_warps)
    if not resident:
        raise ValueError(f"choice: not one program of {op} with {tiles} fits {target}")
    at_once = resident * target.multiprocessors
    full, rest = divmod(work.programs, at_once)
    cycles, bounds = 0.0, {}
    for count, programs in ((full, at_once), (1, rest)):
        if count and programs:
            parts = _wave(programs, work, tiles, problem, resources, device)
            start = PROGRAM_LATENCY / cdiv(programs, target.multiprocessors)  # under the others' work
            cycles += count * (max(parts.values()) + start)
            bounds = bounds or parts
    memory = work.hbm_bytes / (device.memory_bandwidth * MEMORY_EFFICIENCY)
    compute = cycles / (device.clock * 1e9)
    bound = "memory" if memory > compute else max(bounds, key=bounds.get)
    return Prediction(max(compute, memory) + LAUNCH, bound)


def _wave(
    programs: int, work: Work, tiles: TileConfig, problem: Problem, resources: Resources, device: Device
) -> dict[str, float]:
    """Cycles that so many programs, all resident, need by what could bound them."""
    target = device.target
    busy = min(programs, target.multiprocessors)
    each = cdiv(programs, target.multiprocessors)  # programs on the fullest multiprocessor
    schedulers = min(1.0, each * tiles.num_warps / 4)
    matrix = each * _matrix_cycles(work, tiles, problem, resources, device) / schedulers
    ready = ISSUE_FP32 if multiplies_on_ordinary_cores(problem, target) else ISSUE
    outside = resources.instructions - resources.loop_instructions
    instructions = outside + work.steps * resources.loop_instructions  # per warp
    rate = 1 if target.backend == "hip" else 4  # a wave of 64 takes four cycles of a SIMD 16 wide
    issue = each * tiles.num_warps * instructions / (rate * ready * schedulers)
    exposed = (1 - _overlap(each, tiles, problem, resources, target)) * min(matrix, issue)
    l2_share = device.l2_bandwidth / (device.clock * 1e9) / busy / L2_SHARED_READS
    l2_share = min(L2_BYTES_PER_MULTIPROCESSOR, l2_share)
    waiting = LOAD_LATENCY / max(tiles.num_stages - 1, 1) + STEP_LATENCY
    return {
        "matrix" if matrix >= issue else "instructions": max(matrix, issue) + exposed,
        "L2": each * work.l2_bytes / l2_share,
        "latency": work.steps * waiting,
    }


def _overlap(each: int, tiles: TileConfig, problem: Problem, resources: Resources, target: Target) -> float:
    if multiplies_on_ordinary_cores(problem, target):
        return 1.0  # the products are among the instructions
    if each > 1:
        return OVERLAP_SHARED
    if resources.serialised:
        return 0.0
    return OVERLAP_WARPS if tiles.num_warps > 4 else OVERLAP_ALONE


def _matrix_cycles(
    work: Work, tiles: TileConfig, problem: Problem, resources: Resources, device: Device
) -> float:
    """Cycles of the matrix units in one program, waiting for operands from shared memory included."""
    bits32 = problem.dtype.itemsize >= 4
    rate = 2 * device.fp32 if bits32 else device.tensor
    if device.target.arch == 90 and not bits32 and not resources.wgmma:
        rate *= MMA_SYNC_ON_HOPPER
    if resources.wgmma or device.target.arch == 100:
        rows, columns = (128 if device.target.arch == 100 else 64), tiles.block_n
    else:
        rows, columns = _warp_tile(tiles, work)
    # A matrix instruction of rows x columns reads rows + columns operands for 2 x rows x columns FLOP.
    bytes_a_flop = problem.dtype.itemsize / 2 * (1 / rows + (0 if work.registers_a else 1 / columns))
    operands = work.flops * bytes_a_flop / SHARED_MEMORY_BYTES
    # Ordinary cores are not what draws the power: fp32 runs at its full rate.
    return work.flops / rate if bits32 else max(work.flops / (rate * SUSTAINED), operands)


def _warp_tile(tiles: TileConfig, work: Work) -> tuple[int, int]:
    """Rows and columns of a warp's share: as square as it gets, or all columns if rows stay in registers."""
    rows, columns, warps = tiles.block_m, tiles.block_n, tiles.num_warps
    while warps > 1:
        if work.registers_a or rows >= columns:
            rows //= 2
        else:
            columns //= 2
        warps //= 2
    return max(rows, 16), max(columns, 8)


def estimated(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Resources:
    """Resources where none are recorded for the problem: those of the same tile elsewhere, else a guess.

    The guess leaves room for one program, and has an instruction for every eight bytes of an operand.
    """
    rows = [(key, row) for key, row in records(target).items() if row]
    alike = [row for key, row in rows if key.startswith(f"{op},") and key.endswith(tile_name(tiles))]
    alike = [row for row in alike if row.residency(target.arch, tiles.num_warps)]  # more tokens may not fit
    if alike:
        return max(alike, key=lambda row: (row.registers, row.shared_memory, row.instructions))
    loop = max(64, tiles.block_m * max(tiles.block_n, tiles.block_k) // (8 * tiles.num_warps))
    most = 65536 // (32 * tiles.num_warps) if target.backend == "cuda" else 256
    registers = min(255, most) // 8 * 8
    shared_memory = min(target.shared_memory, 48 * 1024)
    return Resources(registers, shared_memory, 0, 0, 0, 12 * loop, loop, 0, 0, False, False)


@dataclass(frozen=True)
class Work:
    """Of a launch the programs and the bytes moved if every tensor passes memory once; the rest per program.

    steps: iterations of its loop; flops: of its matrix products, padding included; l2_bytes: what it reads
    and writes; registers_a: the left operand of the products comes from registers.
    """

    programs: int
    steps: int
    flops: int
    l2_bytes: int
    hbm_bytes: int
    registers_a: bool = False


def work_of(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Work:
    """The work of ``op`` with ``tiles``; ValueError if it has no matrix product."""
    if op not in TUNED:
        raise ValueError(f"op: expected one of {list(TUNED)}, got {op!r}")
    if not OPS[op].one_pass:
        return _product(op, problem, tiles)
    kernels = {"token_mixing": _one_pass, "token_dgrad": _one_pass, "token_wgrad": _wgrad}
    return kernels[OPS[op].kernel](op, problem, tiles, target)


def _one_pass(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Work:
    B, S, C, D, x_dtype, dtype = problem[:6]
    tokens, hidden = sum(token_pieces(S)), round_up(D, tiles.block_n)
    blocks = cdiv(C, tiles.block_m)
    forward = op == "token_mixing"
    products = 2 if forward else 3  # p and o; p, dhidden and dn
    u = (x_dtype if forward else dtype).itemsize
    weights = 2 * tokens * hidden * dtype.itemsize
    moments = ACCUMULATOR * 2 * B * S * (1 + blocks) if forward else 0
    return Work(
        programs=B * blocks,
        steps=hidden // tiles.block_n,
        flops=2 * products * tiles.block_m * tokens * hidden,
        l2_bytes=weights + 3 * S * tiles.block_m * u + 4 * ACCUMULATOR * S,  # x, y and one again; n, do, dn
        hbm_bytes=(2 if forward else 3) * B * S * C * u + weights + moments,
        registers_a=True,
    )


def _wgrad(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Work:
    B, S, C, D, _, dtype = problem[:6]
    tokens, hidden = sum(token_pieces(S)), round_up(D, tiles.block_n)
    blocks = hidden // tiles.block_n
    splits, steps = wgrad_splits(problem, tiles, blocks, target)
    both = wgrad_in_one_launch(problem, target)
    # p and dw2; p, dhidden and dw1; all four.
    products = 4 if both else 3 if op == "token_wgrad_fc1" else 2
    sums = (2 if both else 1) * tokens * tiles.block_n * ACCUMULATOR
    operands = 2 * B * S * C * dtype.itemsize
    return Work(
        programs=splits * blocks,
        steps=steps,
        flops=2 * products * tiles.block_m * tokens * tiles.block_n * steps,
        l2_bytes=2 * steps * S * tiles.block_m * dtype.itemsize + sums,
        hbm_bytes=operands + splits * blocks * sums,
    )


def _product(op: str, problem: Problem, tiles: TileConfig) -> Work:
    row = OPS[op]
    products, fc2 = row.products, not row.columns_are_hidden
    B, R, N, K = matrix_sizes(op, problem)
    it, x = problem.dtype.itemsize, problem.x_dtype.itemsize
    a, out = (it, x) if fc2 else (x if row.reads_x else it, it)
    per_sample = row.half == "token" and row.direction == "forward"  # those tiles do not straddle samples
    tiles_m = B * cdiv(R, tiles.block_m) if per_sample else cdiv(B * R, tiles.block_m)
    depth = round_up(K, tiles.block_k)
    stored = row.tensors * out
    return Work(
        programs=tiles_m * cdiv(N, tiles.block_n),
        steps=products * depth // tiles.block_k,
        flops=2 * products * tiles.block_m * tiles.block_n * depth,
        l2_bytes=products * depth * (tiles.block_m * a + tiles.block_n * it)
        + tiles.block_m * tiles.block_n * stored,
        hbm_bytes=products * (B * R * K * a + N * K * it) + B * R * N * stored,
    )

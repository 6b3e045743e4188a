"""What a launch has to do: programs, products, bytes. Arithmetic on the problem and the tile alone."""

from __future__ import annotations

from dataclasses import dataclass

from fastmixer.configs.ops import OPS, TUNED, matrix_sizes
from fastmixer.configs.problem import Problem, TileConfig, cdiv, round_up
from fastmixer.configs.targets import Target
from fastmixer.configs.tiles import WGRAD_WAVES, token_pieces, wgrad_in_one_launch

ACC = 4  # bytes of a statistic or a partial sum


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
    """The work of ``op`` with ``tiles``.

    Raises:
        ValueError: ``op`` has no matrix product.
    """
    kernel = OPS[op].kernel if op in TUNED else ""
    if kernel in ("token_mixing", "token_dgrad"):
        return _one_pass(op, problem, tiles)
    if kernel == "token_wgrad":
        return _wgrad(op, problem, tiles, target)
    if op not in TUNED or not OPS[op].is_matrix:
        raise ValueError(f"op: expected one of {list(TUNED)}, got {op!r}")
    return _product(op, problem, tiles)


def _one_pass(op: str, problem: Problem, tiles: TileConfig) -> Work:
    B, S, C, D, x_dtype, dtype = problem
    tokens, hidden = sum(token_pieces(S)), round_up(D, tiles.block_n)
    blocks = cdiv(C, tiles.block_m)
    forward = op == "token_mixing"
    products = 2 if forward else 3  # H and Y; H, dG and dn
    u = (x_dtype if forward else dtype).itemsize
    weights = 2 * tokens * hidden * dtype.itemsize
    moments = ACC * 2 * B * S * (1 + blocks) if forward else 0
    return Work(
        programs=B * blocks,
        steps=hidden // tiles.block_n,
        flops=2 * products * tiles.block_m * tokens * hidden,
        l2_bytes=weights + 3 * S * tiles.block_m * u + 4 * ACC * S,  # x twice and y; n, g and dn
        hbm_bytes=(2 if forward else 3) * B * S * C * u + weights + moments,
        registers_a=True,
    )


def _wgrad(op: str, problem: Problem, tiles: TileConfig, target: Target) -> Work:
    B, S, C, D, _, dtype = problem
    tokens, hidden = sum(token_pieces(S)), round_up(D, tiles.block_n)
    pairs = B * cdiv(C, tiles.block_m)
    splits = max(1, min(pairs, WGRAD_WAVES * target.multiprocessors // (hidden // tiles.block_n)))
    both = wgrad_in_one_launch(problem, target)
    # H and dW2; H, dG and dW1; all four.
    products = 4 if both else 3 if op == "token_wgrad_fc1" else 2
    steps = cdiv(pairs, splits)
    sums = (2 if both else 1) * tokens * tiles.block_n * ACC
    operands = 2 * B * S * C * dtype.itemsize
    return Work(
        programs=splits * (hidden // tiles.block_n),
        steps=steps,
        flops=2 * products * tiles.block_m * tokens * tiles.block_n * steps,
        l2_bytes=2 * steps * S * tiles.block_m * dtype.itemsize + sums,
        hbm_bytes=operands + splits * (hidden // tiles.block_n) * sums,
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

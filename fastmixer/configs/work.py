"""What a launch has to do: programs, products, bytes. Arithmetic on the problem and the tile alone."""

from __future__ import annotations

from dataclasses import dataclass

from .targets import Target
from .tiles import ONE_PASS, WGRAD_WAVES, Problem, TileConfig, round_up, token_pieces, wgrad_in_one_launch

ACC = 4  # bytes of a statistic or a partial sum


@dataclass(frozen=True)
class Work:
    """programs: the grid; steps: iterations of a program's loop; flops: of a program's matrix products,
    padding included; l2_bytes: what a program reads and writes; hbm_bytes: what the launch moves if every
    tensor passes memory once; registers_a: the left operand of the products comes from registers."""

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
    if op == "token_mixing" or op == "token_dgrad":
        return _one_pass(op, problem, tiles)
    if op in ONE_PASS:
        return _wgrad(op, problem, tiles, target)
    if op not in MATRICES:
        raise ValueError(f"op: expected one of {[*ONE_PASS, *MATRICES]}, got {op!r}")
    return _product(op, problem, tiles)


def _one_pass(op: str, problem: Problem, tiles: TileConfig) -> Work:
    B, S, C, D, x_dtype, dtype = problem
    tokens, hidden = sum(token_pieces(S)), round_up(D, tiles.block_n)
    blocks = -(-C // tiles.block_m)
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
    pairs = B * -(-C // tiles.block_m)
    splits = max(1, min(pairs, WGRAD_WAVES * target.multiprocessors // (hidden // tiles.block_n)))
    both = wgrad_in_one_launch(problem, target)
    # H and dW2; H, dG and dW1; all four.
    products = 4 if both else 3 if op == "token_wgrad_fc1" else 2
    steps = -(-pairs // splits)
    sums = (2 if both else 1) * tokens * tiles.block_n * ACC
    operands = 2 * B * S * C * dtype.itemsize
    return Work(
        programs=splits * (hidden // tiles.block_n),
        steps=steps,
        flops=2 * products * tiles.block_m * tokens * tiles.block_n * steps,
        l2_bytes=2 * steps * S * tiles.block_m * dtype.itemsize + sums,
        hbm_bytes=operands + splits * (hidden // tiles.block_n) * sums,
    )


# Op: whether rows are (sample, channel) pairs, products in a tile, outputs of its size, residual inputs.
MATRICES = {
    "token_fc1": (True, 1, 1, 0),
    "token_fc2": (True, 1, 1, 1),
    "token_mlp_hidden_bwd_recompute": (True, 2, 2, 0),
    "channel_fc1": (False, 1, 1, 0),
    "channel_fc2": (False, 1, 1, 1),
    "channel_mlp_hidden_bwd": (False, 1, 2, 1),
    "channel_mlp_hidden_bwd_recompute": (False, 2, 2, 0),
}


def matrix_sizes(op: str, problem: Problem) -> tuple[int, int, int, int]:
    """Samples, rows of one, columns and depth of an op's product."""
    B, S, C, H = problem[:4]
    rows, width = (C, S) if MATRICES[op][0] else (S, C)
    columns, depth = (width, H) if op.endswith("fc2") else (H, width)
    return B, rows, columns, depth


def _product(op: str, problem: Problem, tiles: TileConfig) -> Work:
    token, products, outputs, residuals = MATRICES[op]
    B, R, N, K = matrix_sizes(op, problem)
    it, x = problem.dtype.itemsize, problem.x_dtype.itemsize
    fc2 = op.endswith("fc2")
    a, out = (it, x) if fc2 else (x if op.endswith("fc1") else it, it)
    per_sample = token and "hidden_bwd" not in op  # those tiles do not straddle samples
    tiles_m = B * -(-R // tiles.block_m) if per_sample else -(-B * R // tiles.block_m)
    depth = round_up(K, tiles.block_k)
    stored = (outputs + residuals) * out
    return Work(
        programs=tiles_m * -(-N // tiles.block_n),
        steps=products * depth // tiles.block_k,
        flops=2 * products * tiles.block_m * tiles.block_n * depth,
        l2_bytes=products * depth * (tiles.block_m * a + tiles.block_n * it)
        + tiles.block_m * tiles.block_n * stored,
        hbm_bytes=products * (B * R * K * a + N * K * it) + B * R * N * stored,
    )

"""The one table of ops: what a choice can be made for, which kernel runs it, what it reads and writes.

To add an op: its kernel, its launcher in ``fastmixer/ops``, a row here, its tiles in ``tiles.py``, a test.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmixer.configs.problem import Problem


@dataclass(frozen=True)
class Op:
    """An op that runs in tiles: one kernel, launched for one half.

    Attributes:
        kernel: its name in ``launch.kernels()``.
        half: "token" or "channel"; "" serves both.
        direction: "forward" or "backward".
        outputs: the kernel's pointers to what it writes and does not read.
        one_pass: it holds all tokens in one program: for up to ONE_PASS_TOKENS.
        columns_are_hidden: of a matrix product (B * rows, columns): columns are hidden units and the depth is
            the half's width (fc1), or the other way round (fc2). None: it is no plain product.
        products: products in a tile of the output.
        tensors: tensors of the output's size that are read or written.
        reads_x: its operand is x itself; the others read dense copies in the products' dtype.
        library: PyTorch's own product may serve in its place (``Library.ATEN``).
        tuned: it has candidates; the others have the rule's tiles.
    """

    kernel: str
    half: str
    direction: str
    outputs: tuple[str, ...]
    one_pass: bool = False
    columns_are_hidden: bool | None = None
    products: int = 1
    tensors: int = 1
    reads_x: bool = False
    library: bool = False
    tuned: bool = True

    @property
    def is_matrix(self) -> bool:
        return self.columns_are_hidden is not None


def _fc1(half: str, **flags: bool) -> Op:
    return Op("fc1", half, "forward", ("g_ptr", "p_ptr"), columns_are_hidden=True, reads_x=True, **flags)


def _fc2(half: str, **flags: bool) -> Op:
    outputs = ("y_ptr", "y_moments_ptr")
    return Op("fc2", half, "forward", outputs, columns_are_hidden=False, tensors=2, reads_x=True, **flags)


def _hidden_bwd(half: str, products: int, tensors: int) -> Op:
    outputs = ("hidden_ptr", "dhidden_ptr", "db1_ptr")
    sizes = {"columns_are_hidden": True, "products": products, "tensors": tensors}
    return Op("mlp_hidden_bwd", half, "backward", outputs, **sizes)


def _layer_norm(direction: str, outputs: tuple[str, ...]) -> Op:
    return Op(
        "layer_norm_fwd" if direction == "forward" else "layer_norm_bwd", "", direction, outputs, tuned=False
    )


_WGRAD = Op("token_wgrad", "token", "backward", ("dw1_ptr", "db1_ptr", "dw2_ptr"), one_pass=True)

# In the order in which they matter: the tuner begins with the first.
OPS: dict[str, Op] = {
    "channel_fc1": _fc1("channel", library=True),
    "channel_fc2": _fc2("channel", library=True),
    "token_mixing": Op(
        "token_mixing", "token", "forward", ("y_ptr", "y_moments_ptr"), one_pass=True, reads_x=True
    ),
    "token_fc1": _fc1("token"),
    "token_fc2": _fc2("token"),
    "channel_mlp_hidden_bwd": _hidden_bwd("channel", products=1, tensors=3),
    "channel_mlp_hidden_bwd_recompute": _hidden_bwd("channel", products=2, tensors=2),
    "token_wgrad_fc1": _WGRAD,
    "token_wgrad_fc2": _WGRAD,
    "token_dgrad": Op("token_dgrad", "token", "backward", ("dn_ptr",), one_pass=True),
    "token_mlp_hidden_bwd_recompute": _hidden_bwd("token", products=2, tensors=2),
    "layer_norm_fwd": _layer_norm("forward", ("y_ptr",)),
    "layer_norm_fwd_transposed": _layer_norm("forward", ("y_ptr",)),
    "layer_norm_bwd": _layer_norm("backward", ("dgamma_ptr", "dbeta_ptr", "column_sums_ptr", "row_sums_ptr")),
}

# Whole halves: what runs them, the kernels or PyTorch, is a choice too; in training with the backward.
TRAINING = "_training"
WHOLE_HALVES = ("channel_half", "token_half")
HALVES = (*WHOLE_HALVES, *(half + TRAINING for half in WHOLE_HALVES))

TUNED = tuple(name for name, op in OPS.items() if op.tuned)
ONE_PASS = tuple(name for name, op in OPS.items() if op.one_pass)
# The one-pass kernels hold a BLOCK_C x S accumulator in registers: 256 tokens are the end of that road.
ONE_PASS_TOKENS = 256

# What the passes beside PyTorch's products write, by kernel; it may be what they read.
LIBRARY_PASSES = {"gelu_fwd": ("g_ptr",), "residual_fwd": ("y_ptr",)}


def half_of(op: str) -> str:
    """ "token" or "channel": of a row of OPS that serves one half, or of one of HALVES."""
    return OPS[op].half if op in OPS else op.partition("_")[0]


def outputs_of(kernel: str) -> tuple[str, ...]:
    """The pointers to what a kernel writes; () for a kernel that no op has."""
    outputs = {op.kernel: op.outputs for op in OPS.values()} | LIBRARY_PASSES
    return outputs.get(kernel, ())


def matrix_sizes(op: str, problem: Problem) -> tuple[int, int, int, int]:
    """Samples, rows per sample, columns and depth of a matrix op's product."""
    B, S, C, H = problem[:4]
    rows, width = (C, S) if OPS[op].half == "token" else (S, C)
    columns, depth = (H, width) if OPS[op].columns_are_hidden else (width, H)
    return B, rows, columns, depth

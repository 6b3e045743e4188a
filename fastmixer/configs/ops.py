"""The one table of ops: what a choice can be made for, which kernel runs it, what it reads and writes.

To add an op: "Adding an op" in ``docs/development.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastmixer.configs.problem import Library, Problem


@dataclass(frozen=True)
class Op:
    """An op that runs in tiles: one kernel, launched for one half. A new kernel enters ``OUTPUTS`` below too.

    Attributes:
        kernel: its name in ``launch.kernels()``.
        half: "token" or "channel"; "" serves both.
        direction: "forward" or "backward".
        one_pass: it holds all tokens in one program, for up to ONE_PASS_TOKENS. False: it serves more, in the
            place of such ops. None: any number.
        columns_are_hidden: of a matrix product (B * rows, columns): columns are hidden units and the depth is
            the half's width (fc1), or the other way round (fc2). None: it is no plain product.
        products: products in a tile of the output.
        tensors: how many tensors of the output's size are read or written.
        reads_x: its operand is x itself; the others read dense copies in the products' dtype.
        library: how PyTorch's own product may serve in its place, see ``libraries``.
        tuned: it has candidates; the others have the rule's tiles.
    """

    kernel: str
    half: str
    direction: str
    one_pass: bool | None = None
    columns_are_hidden: bool | None = None
    products: int = 1
    tensors: int = 1
    reads_x: bool = False
    library: tuple[Library, ...] = ()
    tuned: bool = True

    @property
    def is_matrix(self) -> bool:
        return self.columns_are_hidden is not None

    def takes(self, tokens: int) -> bool:
        """Whether a half of so many tokens launches it."""
        return self.one_pass is None or self.one_pass == (tokens <= ONE_PASS_TOKENS)


# In the order in which they matter: the tuner begins with the first.
OPS: dict[str, Op] = {
    "channel_fc1": Op(
        "fc1", "channel", "forward", columns_are_hidden=True, reads_x=True,
        library=(Library.ATEN, Library.ATEN_GELU),
    ),
    "channel_fc2": Op(
        "fc2", "channel", "forward", columns_are_hidden=False, tensors=2, reads_x=True,
        library=(Library.ATEN, Library.ADDMM),
    ),
    "token_mixing": Op("token_mixing", "token", "forward", one_pass=True, reads_x=True),
    "token_fc1": Op("fc1", "token", "forward", one_pass=False, columns_are_hidden=True, reads_x=True),
    "token_fc2": Op(
        "fc2", "token", "forward", one_pass=False, columns_are_hidden=False, tensors=2, reads_x=True
    ),
    "channel_mlp_hidden_bwd": Op("mlp_hidden_bwd", "channel", "backward", columns_are_hidden=True, tensors=3),
    "channel_mlp_hidden_bwd_recompute": Op(
        "mlp_hidden_bwd", "channel", "backward", columns_are_hidden=True, products=2, tensors=2
    ),
    # Both weights' gradients where ``tiles.wgrad_in_one_launch`` says so: there token_wgrad_fc2 never runs.
    "token_wgrad_fc1": Op("token_wgrad", "token", "backward", one_pass=True),
    "token_wgrad_fc2": Op("token_wgrad", "token", "backward", one_pass=True),
    "token_dgrad": Op("token_dgrad", "token", "backward", one_pass=True),
    "token_mlp_hidden_bwd_recompute": Op(
        "mlp_hidden_bwd", "token", "backward", one_pass=False, columns_are_hidden=True, products=2, tensors=2
    ),
    "layer_norm_fwd": Op("layer_norm_fwd", "", "forward", tuned=False),
    "layer_norm_fwd_transposed": Op("layer_norm_fwd", "", "forward", one_pass=False, tuned=False),
    "layer_norm_bwd": Op("layer_norm_bwd", "", "backward", tuned=False),
}  # fmt: skip

# Whole halves: what runs them, the kernels or PyTorch, is a choice too; in training with the backward.
TRAINING = "_training"
WHOLE_HALVES = ("channel_half", "token_half")
HALVES = (*WHOLE_HALVES, *(half + TRAINING for half in WHOLE_HALVES))

TUNED = tuple(name for name, op in OPS.items() if op.tuned)
ONE_PASS = tuple(name for name, op in OPS.items() if op.one_pass)
ONE_PASS_BACKWARD = tuple(name for name in ONE_PASS if OPS[name].direction == "backward")
# The one-pass kernels hold a BLOCK_C x S accumulator in registers: 256 tokens are the end of that road.
ONE_PASS_TOKENS = 256

# The pointers to what a kernel writes and does not read, and to what the passes beside PyTorch's products
# write, which may be what they read.
OUTPUTS = {
    "fc1": ("hidden_ptr", "ones_ptr", "p_ptr"),
    "fc2": ("y_ptr", "y_moments_ptr"),
    "token_mixing": ("y_ptr", "y_moments_ptr"),
    "mlp_hidden_bwd": ("hidden_ptr", "dp_ptr", "db1_ptr"),
    "token_wgrad": ("dw1_ptr", "db1_ptr", "dw2_ptr"),
    "token_dgrad": ("dn_ptr",),
    "layer_norm_fwd": ("y_ptr",),
    "layer_norm_bwd": ("dgamma_ptr", "dbeta_ptr", "column_sums_ptr", "row_sums_ptr"),
    "gelu_fwd": ("hidden_ptr",),
    "residual_fwd": ("y_ptr",),
}


def half_of(op: str) -> str:
    """ "token" or "channel": of a row of OPS that serves one half, or of one of HALVES."""
    return OPS[op].half if op in OPS else op.partition("_")[0]


def libraries(op: str, problem: Problem) -> tuple[Library, ...]:
    """Which of PyTorch's products may serve in the place of ``op``'s kernel, in the order to try them.

    ATEN_GELU: of 16 bits with tanh's GELU, which is the epilogue's: erf's would be out of parity. ADDMM: x
    has the products' dtype.
    """
    serves = {
        Library.ATEN: True,
        Library.ATEN_GELU: problem.approximate == "tanh" and problem.dtype.itemsize == 2,
        Library.ADDMM: problem.x_dtype == problem.dtype,
    }
    return tuple(library for library in OPS[op].library if serves[library])


def matrix_sizes(op: str, problem: Problem) -> tuple[int, int, int, int]:
    """Samples, rows per sample, columns and depth of a matrix op's product."""
    B, S, C, H = problem[:4]
    rows, width = (C, S) if OPS[op].half == "token" else (S, C)
    columns, depth = (H, width) if OPS[op].columns_are_hidden else (width, H)
    return B, rows, columns, depth

"""Instructions an element: whether a kernel's fp32 work fits beside its products, from compiled code.

A scheduler issues one instruction a cycle, for the tensor cores and for everything else. GELU, conversions
and addresses are cheap enough only if they leave the tensor cores busy: few instructions for each hidden
element in token mixing, where GELU stands inside the loop, and for each output element in fc1's epilogue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastmixer.configs import DEVICES, Target

if TYPE_CHECKING:
    from fastmixer.aot.sass import InstructionCounts
    from fastmixer.ops.launch import Launch

SCHEDULERS = 4  # of a multiprocessor, on every NVIDIA GPU from sm_80


def per_element(launch: Launch, counts: InstructionCounts, threads: int) -> float | None:
    """Instructions of a thread for each of its elements; None for kernels without GELU behind a product.

    Token mixing: those of one step of the loop over hidden units, an element being a hidden one. The MLP's
    fc1 and its backward: those behind the loop over K, an element being one of the output.
    """
    name, args = launch.kernel.__name__, launch.args
    if name == "_token_mixing_fwd_kernel":
        return counts.loop_instructions * threads / (args["BLOCK_C"] * args["BLOCK_D"])
    if name in ("_fc1_fwd_kernel", "_mlp_hidden_bwd_kernel") and counts.epilogue_instructions:
        return counts.epilogue_instructions * threads / (args["BLOCK_M"] * args["BLOCK_N"])
    return None


def issue_share(launch: Launch, counts: InstructionCounts, num_warps: int, target: Target) -> float | None:
    """Issue slots over tensor-core cycles in the loop of token mixing, with 16-bit products on an NVIDIA GPU.

    Below 1 the tensor cores can be the bound, if both overlap. None for everything else.
    """
    args = launch.args
    wanted = launch.kernel.__name__ == "_token_mixing_fwd_kernel" and args["w1_ptr"].dtype.itemsize == 2
    device = next((d for d in DEVICES.values() if d.target.arch == target.arch), None)
    if not wanted or target.backend != "cuda" or device is None:
        return None
    tokens = args["P0"] + args["P1"] + args["P2"]
    cycles = 4 * tokens * args["BLOCK_C"] * args["BLOCK_D"] / device.tensor
    return counts.loop_instructions * num_warps / SCHEDULERS / cycles

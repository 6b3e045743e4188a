"""Ahead-of-time compilation: a :class:`~fastmixer.ops.launch.Launch` to machine code, without a GPU.

What is compiled is exactly what a launch with the same arguments would compile, down to the key in
Triton's cache on disk: Triton's own code decides what to specialise on (:func:`signature`). So the
registers and loads read here are those that run. Triton has to be imported in a process without
``TRITON_INTERPRET``.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastmixer.aot.sass import InstructionCounts, count_amdgcn, count_sass
from fastmixer.configs import DEVICES, Target
from fastmixer.configs.resources import MULTIPROCESSORS, programs_per_multiprocessor
from fastmixer.ops.launch import Launch

SCHEDULERS = 4  # of a multiprocessor, on every NVIDIA GPU from sm_80


@dataclass(frozen=True)
class Compiled:
    """What one kernel, compiled for one target, needs and does."""

    kernel: str
    triton: str  # the version that compiled it
    num_warps: int
    num_stages: int
    registers: int  # per thread; AMD: vector and accumulation registers together
    stack: int  # bytes per thread, spilled registers included
    shared_memory: int  # bytes
    shared_memory_limit: int  # bytes a program may use
    tensor_memory: int  # columns
    programs_per_multiprocessor: int
    per_element: float | None  # instructions: see fp32_work
    issue_share: float | None  # issue slots over tensor-core cycles: see fp32_work
    counts: InstructionCounts

    @property
    def fits(self) -> bool:
        """Whether the target can hold one program at all: otherwise the launch would fail."""
        return self.shared_memory <= self.shared_memory_limit and self.programs_per_multiprocessor > 0

    def why_not_fits(self) -> str:
        """What a program that does not fit needs."""
        return (
            f"does not fit: {self.shared_memory} bytes of shared memory where a program may use "
            f"{self.shared_memory_limit}, {self.registers} registers x {self.num_warps} warps"
        )

    def as_row(self) -> dict[str, object]:
        """All figures in one flat dictionary."""
        row = asdict(self)
        counts = row.pop("counts")
        return {**row, **counts, "spills": self.counts.spills, "fits": self.fits}


def gpu_target(target: Target) -> GPUTarget:
    """Triton's name for ``target``.

    Raises:
        ValueError: no GPU of this kind is known.
    """
    if target.arch not in MULTIPROCESSORS:
        raise ValueError(f"target: expected an arch in {list(MULTIPROCESSORS)}, got {target.arch!r}")
    return GPUTarget(target.backend, target.arch, MULTIPROCESSORS[target.arch].warp_size)


def signature(launch: Launch, target: Target) -> tuple[dict, dict, dict]:
    """What Triton's JIT would specialise ``launch`` on, on ``target``, as Triton's own code says.

    Tensors may be on "meta": there ``data_ptr()`` is the byte offset into the storage, so an offset view is
    as aligned as its offset and everything else is aligned.

    Returns:
        By parameter, the types: "*bf16", "i32", "constexpr", ...; by the position of the parameter, the
        constants (constexprs, None and the int 1) and the attributes (tt.divisibility, tt.pointer_range).

    Raises:
        RuntimeError: the kernel is an interpreted one.
        TypeError: an argument is missing or unknown, or of a type that no kernel takes.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"kernel: expected a compilable @triton.jit function, got {type(kernel).__name__}: "
            "ahead-of-time compilation needs a process without TRITON_INTERPRET"
        )
    backend = make_backend(gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(**launch.args, **launch.options)
    return kernel._pack_args(backend, options, arguments, specialization, options)[1:]


def code_key(launch: Launch, target: Target) -> str:
    """The same for launches that compile to the same code. Raises as :func:`signature`."""
    return repr((launch.kernel.cache_key, signature(launch, target), launch.options))


def compile_binary(launch: Launch, target: Target) -> Any:
    """What ``triton.compile`` makes of the kernel of ``launch``, now also in Triton's cache on disk.

    Raises as :func:`compile_launch`.
    """
    source = ASTSource(launch.kernel, *signature(launch, target))
    return triton.compile(source, target=gpu_target(target), options=dict(launch.options))


def compile_launch(launch: Launch, target: Target) -> Compiled:
    """Compiles the kernel of ``launch`` for ``target`` and reads what the result needs.

    Triton's cache on disk makes a repetition cheap.

    Raises:
        RuntimeError: the kernel is an interpreted one, or the code could not be disassembled.
        TypeError: as for :func:`signature`.
        Exception: whatever Triton raises for a kernel that does not compile.
    """
    binary = compile_binary(launch, target)
    read = _read_amdgcn if target.backend == "hip" else _read_cubin
    registers, stack, counts = read(binary.asm)
    metadata = binary.metadata
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    per_element, issue_share = fp32_work(launch, counts, metadata.num_warps, target)
    return Compiled(
        kernel=metadata.name,
        triton=triton.__version__,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        stack=stack,
        shared_memory=metadata.shared,
        shared_memory_limit=target.shared_memory,
        tensor_memory=tensor_memory,
        programs_per_multiprocessor=programs_per_multiprocessor(
            target.arch, registers, metadata.num_warps, metadata.shared, tensor_memory
        ),
        per_element=per_element,
        issue_share=issue_share,
        counts=counts,
    )


def compiles_ahead(target: Target) -> bool:
    """Whether enough is known of the target's arch; elsewhere candidates compile when they first run."""
    return target.arch in MULTIPROCESSORS


def fp32_work(
    launch: Launch, counts: InstructionCounts, num_warps: int, target: Target
) -> tuple[float | None, float | None]:
    """Whether a kernel's fp32 work fits beside its products.

    A scheduler issues one instruction per cycle, for the tensor cores and for everything else: GELU,
    conversions and addresses are cheap enough only where they leave the tensor cores busy.

    Returns:
        Instructions of a thread for each of its elements; None for kernels without GELU behind a product.
        Token mixing: those of one step of the loop over hidden units, an element being a hidden one. fc1 and
        its backward: those behind the loop over K, an element being one of the output.
        Issue slots over tensor-core cycles in the loop of token mixing, with 16-bit products on NVIDIA GPUs;
        below 1 the tensor cores can be the bound, if both overlap. None for everything else.
    """
    name, args = launch.kernel.__name__, launch.args
    threads = num_warps * MULTIPROCESSORS[target.arch].warp_size
    if name in ("_fc1_fwd_kernel", "_mlp_hidden_bwd_kernel") and counts.epilogue_instructions:
        return counts.epilogue_instructions * threads / (args["BLOCK_M"] * args["BLOCK_N"]), None
    if name != "_token_mixing_fwd_kernel":
        return None, None
    elements = args["BLOCK_C"] * args["BLOCK_D"]
    per_element = counts.loop_instructions * threads / elements
    device = next((device for device in DEVICES.values() if device.target.arch == target.arch), None)
    if device is None or target.backend != "cuda" or args["w1_ptr"].dtype.itemsize != 2:
        return per_element, None
    cycles = 4 * (args["P0"] + args["P1"] + args["P2"]) * elements / device.tensor
    return per_element, counts.loop_instructions * num_warps / SCHEDULERS / cycles


# ---- Reading the compiled code: registers and bytes of stack per thread, and the instructions.


def _read_cubin(asm: Mapping[str, Any]) -> tuple[int, int, InstructionCounts]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run_tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        # -ndf: the branches of the old branch stack need no resolving, and the analysis takes time.
        code = _run_tool(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    return _find_int(r"\bREG:(\d+)", usage), _find_int(r"\bSTACK:(\d+)", usage), count_sass(code)


def _read_amdgcn(asm: Mapping[str, Any]) -> tuple[int, int, InstructionCounts]:
    code = asm["amdgcn"]
    # On gfx90a and later .vgpr_count includes the accumulation registers.
    registers = _find_int(r"\.vgpr_count:\s+(\d+)", code)
    return registers, _find_int(r"\.private_segment_fixed_size:\s+(\d+)", code), count_amdgcn(code)


def _find_int(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"cannot read the compiled code: nothing matches {pattern} in {text[:200]!r}...")
    return int(match[1])


def _run_tool(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed with exit code {ran.returncode}: {ran.stderr.strip()}"
        )
    return ran.stdout

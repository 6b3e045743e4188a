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
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastmixer.aot import issue
from fastmixer.aot.sass import InstructionCounts, count_amdgcn, count_sass
from fastmixer.configs import Target
from fastmixer.configs.resources import MULTIPROCESSORS, programs_per_multiprocessor

if TYPE_CHECKING:
    from fastmixer.ops.launch import Launch


class Signature(NamedTuple):
    """What Triton specialises a kernel on."""

    types: dict[str, str]  # by parameter: "*bf16", "i32", "i64", "fp32", "u1", "constexpr", ...
    constants: dict[tuple[int, ...], object]  # by parameter position: constexprs, None and the int 1
    attributes: dict[tuple[int, ...], list]  # by parameter position: tt.divisibility, tt.pointer_range


@dataclass(frozen=True)
class Compiled:
    """What one kernel, compiled for one target, needs and does."""

    kernel: str
    triton: str  # the version that compiled it
    num_warps: int
    num_stages: int
    registers: int  # a thread; AMD: vector and accumulation registers together
    stack: int  # bytes a thread, spilled registers included
    shared_memory: int  # bytes
    shared_memory_limit: int  # bytes a program may use
    tensor_memory: int  # columns
    programs_per_multiprocessor: int
    per_element: float | None  # instructions: see issue.per_element
    issue_share: float | None  # issue slots over tensor-core cycles: see issue.issue_share
    counts: InstructionCounts

    @property
    def fits(self) -> bool:
        """Whether the target can hold one program at all: otherwise the launch would fail."""
        return self.shared_memory <= self.shared_memory_limit and self.programs_per_multiprocessor > 0

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


def signature(launch: Launch, target: Target) -> Signature:
    """What Triton's JIT would specialise ``launch`` on, on ``target``.

    Asks Triton's own code. Tensors may be on "meta": there ``data_ptr()`` is the byte offset into the
    storage, so an offset view is as aligned as its offset and everything else is aligned.

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
    _, types, constants, attributes = kernel._pack_args(backend, options, arguments, specialization, options)
    return Signature(types, constants, attributes)


def compile_binary(launch: Launch, target: Target) -> Any:
    """What ``triton.compile`` makes of the kernel of ``launch``, now also in Triton's cache on disk.

    Raises:
        As :func:`compile_launch`.
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
    if target.backend == "hip":
        resources = _read_amdgcn(binary.asm["amdgcn"])
    else:
        resources = _read_cubin(binary.asm["cubin"])
    metadata = binary.metadata
    tensor_memory = getattr(metadata, "tmem_size", None) or 0
    warp_size = MULTIPROCESSORS[target.arch].warp_size
    return Compiled(
        kernel=metadata.name,
        triton=triton.__version__,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=resources.registers,
        stack=resources.stack,
        shared_memory=metadata.shared,
        shared_memory_limit=target.shared_memory,
        tensor_memory=tensor_memory,
        programs_per_multiprocessor=programs_per_multiprocessor(
            target.arch, resources.registers, metadata.num_warps, metadata.shared, tensor_memory
        ),
        per_element=issue.per_element(launch, resources.counts, metadata.num_warps * warp_size),
        issue_share=issue.issue_share(launch, resources.counts, metadata.num_warps, target),
        counts=resources.counts,
    )


class _Resources(NamedTuple):
    registers: int
    stack: int
    counts: InstructionCounts


def _read_cubin(cubin: bytes) -> _Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run_tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
        # -ndf: the branches of the old branch stack need no resolving, and the analysis takes time.
        code = _run_tool(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
    return _Resources(_find_int(r"\bREG:(\d+)", usage), _find_int(r"\bSTACK:(\d+)", usage), count_sass(code))


def _read_amdgcn(assembly: str) -> _Resources:
    # On gfx90a and later .vgpr_count includes the accumulation registers.
    registers = _find_int(r"\.vgpr_count:\s+(\d+)", assembly)
    return _Resources(
        registers, _find_int(r"\.private_segment_fixed_size:\s+(\d+)", assembly), count_amdgcn(assembly)
    )


def _find_int(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"cannot read the compiled code: nothing matches {pattern} in {text[:200]!r}...")
    return int(found[1])


def _run_tool(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed with exit code {ran.returncode}: {ran.stderr.strip()}"
        )
    return ran.stdout


def compiles_ahead(target: Target) -> bool:
    """Whether enough is known of the target's arch; elsewhere candidates compile when they first run."""
    return target.arch in MULTIPROCESSORS

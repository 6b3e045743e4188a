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
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from fastmixer.aot import sass
from fastmixer.configs import DEVICES, Target
from fastmixer.configs.resources import MULTIPROCESSORS, programs_per_multiprocessor
from fastmixer.ops.launch import Launch

SCHEDULERS = 4  # of a multiprocessor, on every NVIDIA GPU from sm_80


def gpu_target(target: Target) -> GPUTarget:
    """Triton's name for ``target``; ValueError where no GPU of this kind is known."""
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

    Raises RuntimeError for an interpreted kernel, and TypeError for an argument that is missing or unknown,
    or of a type that no kernel takes.
    """
    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):
        raise RuntimeError(
            f"kernel: expected a compilable @triton.jit function, got {type(kernel).__name__}: "
            "ahead-of-time compilation needs a process without TRITON_INTERPRET"
        )
    backend = make_backend(gpu_target(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    arguments, specialization, options = bind(**launch.arguments(), **launch.options)
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


def compile_launch(launch: Launch, target: Target) -> dict[str, Any]:
    """Compiles the kernel of ``launch`` for ``target``; all that the result needs and does, in one flat row.

    Triton's cache on disk makes a repetition cheap. Raises as :func:`signature`, RuntimeError for code that
    cannot be disassembled, and whatever Triton raises for a kernel that does not compile.
    """
    binary = compile_binary(launch, target)
    registers, stack, counts = _read_code(binary.asm, target.backend)
    num_warps, shared_memory = binary.metadata.num_warps, binary.metadata.shared
    tensor_memory = getattr(binary.metadata, "tmem_size", None) or 0
    programs = programs_per_multiprocessor(target.arch, registers, num_warps, shared_memory, tensor_memory)
    per_element, issue_share = fp32_work(launch, counts, target)
    return {
        "kernel": binary.metadata.name,
        "triton": triton.__version__,
        "num_warps": num_warps,
        "num_stages": binary.metadata.num_stages,
        "registers": registers,  # per thread; AMD: vector and accumulation registers together
        "stack": stack,  # bytes per thread, spilled registers included
        "shared_memory": shared_memory,  # bytes
        "shared_memory_limit": target.shared_memory,  # bytes a program may use
        "tensor_memory": tensor_memory,  # columns
        "programs_per_multiprocessor": programs,
        "fits": shared_memory <= target.shared_memory and programs > 0,  # otherwise a launch would fail
        "per_element": per_element,
        "issue_share": issue_share,
        **counts,
    }


def why_not_fits(row: Mapping[str, Any]) -> str | None:
    """What the target cannot hold one program of, by a row of :func:`compile_launch`; None if it can."""
    if row["fits"]:
        return None
    return (
        f"does not fit: {row['shared_memory']} bytes of shared memory where a program may use "
        f"{row['shared_memory_limit']}, {row['registers']} registers x {row['num_warps']} warps"
    )


def fp32_work(launch: Launch, counts: Mapping[str, int], target: Target) -> tuple[float | None, float | None]:
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
    name, args, num_warps = launch.kernel_name, launch.args, launch.options["num_warps"]
    threads = num_warps * MULTIPROCESSORS[target.arch].warp_size
    if name in ("fc1", "mlp_hidden_bwd") and counts["epilogue_instructions"]:
        return counts["epilogue_instructions"] * threads / (args["BLOCK_M"] * args["BLOCK_N"]), None
    if name != "token_mixing":
        return None, None
    elements = args["BLOCK_C"] * args["BLOCK_D"]
    per_element = counts["loop_instructions"] * threads / elements
    device = next((device for device in DEVICES.values() if device.target.arch == target.arch), None)
    if device is None or target.backend != "cuda" or args["w1_ptr"].dtype.itemsize != 2:
        return per_element, None
    cycles = 4 * (args["P0"] + args["P1"] + args["P2"]) * elements / device.tensor
    return per_element, counts["loop_instructions"] * num_warps / SCHEDULERS / cycles


def _read_code(asm: Mapping[str, Any], backend: str) -> tuple[int, int, dict[str, int]]:
    """Of compiled code the registers and bytes of stack per thread, and the instructions' counts."""
    if backend == "hip":
        usage = code = asm["amdgcn"]
        # On gfx90a and later .vgpr_count includes the accumulation registers.
        patterns = r"\.vgpr_count:\s+(\d+)", r"\.private_segment_fixed_size:\s+(\d+)"
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            usage = _run_tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
            # -ndf: the branches of the old branch stack need no resolving, and the analysis takes time.
            code = _run_tool(knobs.nvidia.nvdisasm.path, "-c", "-ndf", file.name)
        patterns = r"\bREG:(\d+)", r"\bSTACK:(\d+)"
    registers, stack = (re.search(pattern, usage) for pattern in patterns)
    if registers is None or stack is None:
        raise RuntimeError(f"cannot read the compiled code: {patterns} are not all in {usage[:200]!r}...")
    return int(registers[1]), int(stack[1]), sass.count(sass.parse(code, backend))


def _run_tool(*command: str) -> str:
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(
            f"{' '.join(command)} failed with exit code {ran.returncode}: {ran.stderr.strip()}"
        )
    return ran.stdout

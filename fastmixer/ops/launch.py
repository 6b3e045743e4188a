"""What every launch is made of: context, kernels, constants, and ``run``, the only way to a kernel.

Arguments are trusted here; ``functional`` has checked them. Every launch is described by a ``Launch``, which
the context's ``execute`` runs; what PyTorch computes goes through its ``call``. With tensors on the "meta"
device both can record instead: that is what a plan is made of (``plan.py``), and what ahead-of-time
compilation compiles.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastmixer import configs
from fastmixer.configs import Problem, Target, TileConfig, next_power_of_2, round_up
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops.layouts import Kept, PackedLinear
from fastmixer.params import MixingParams


@dataclass(frozen=True)
class Descriptor:
    """A matrix (rows, columns) that kernels read or write in tiles of ``block``: a tensor descriptor.

    base: the 2-D tensor, rows any multiple of 16 bytes apart, columns contiguous; its address is a multiple
    of 16 bytes: ``is_describable``.
    """

    base: Any
    block: tuple[int, int]

    def of_triton(self) -> Any:
        """What a launch takes."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor(self.base, [*self.base.shape], [*self.base.stride()], [*self.block])


def is_describable(matrix: Tensor) -> bool:
    """Whether a 2-D tensor can be read by descriptors; of one on "meta" the address is its offset."""
    rows, columns = matrix.shape
    apart = matrix.stride(0) >= columns > 0 and matrix.stride(1) == 1 and rows > 0  # no row in another
    return apart and matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch: every kernel parameter by name, the compile options, and the half it is of."""

    kernel: Any
    grid: tuple[int, ...]
    args: dict[str, Any]
    options: dict[str, Any]
    half: str = ""

    @property
    def kernel_name(self) -> str:
        """What ``kernels()`` calls the kernel."""
        return _short(self.kernel.__name__)

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor among the arguments, also those in tuples and behind descriptors."""
        leaves = (leaf.base if isinstance(leaf, Descriptor) else leaf for leaf in tree_leaves(self.args))
        return (leaf for leaf in leaves if isinstance(leaf, Tensor))

    def tensor(self, name: str) -> Tensor | None:
        """What the parameter points at or describes; None where that is no tensor."""
        value = self.args[name]
        value = value.base if isinstance(value, Descriptor) else value
        return value if isinstance(value, Tensor) else None

    def arguments(self) -> dict[str, Any]:
        """The parameters as Triton takes them."""
        return {k: v.of_triton() if isinstance(v, Descriptor) else v for k, v in self.args.items()}


# The interpreter keeps the running program's index in a global: one launch at a time.
_interpreter_lock = threading.Lock()


def execute(launch: Launch) -> None:
    """Runs a launch on the current device and stream."""
    with _interpreter_lock if kernels().interpreted else contextlib.nullcontext():
        launch.kernel[launch.grid](**launch.arguments(), **launch.options)


@dataclass(frozen=True)
class Context:
    """How to launch: for which target, with which tiles, and what is packed already.

    choose: says what runs for an op (``configs/choice.py``). kept: packed layers that outlive the call.
    packed: those of a forward by role (``packing.py``), where they were packed for both halves at once;
    otherwise each half packs its own. call: runs a function of PyTorch, ``call(function, *args, out=...)``.
    half: "token" or "channel", for whoever looks at the launches.
    """

    target: Target
    kept: Kept | None = None
    choose: Callable[[str, Problem, Target], configs.Choice] = configs.choose
    execute: Callable[[Launch], None] = lambda item: execute(item)  # the module's as it is at the launch
    packed: Mapping[str, PackedLinear] | None = None
    call: Callable[..., object] = lambda function, *args, **outputs: function(*args, **outputs)
    half: str = ""

    def copied(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor, dense and in ``dtype``: itself if it is both."""
        if tensor.dtype == dtype and tensor.is_contiguous():
            return tensor
        out = torch.empty(tensor.shape, dtype=dtype, device=tensor.device)
        self.call(Tensor.copy_, out, tensor)
        return out


def context_of(device: torch.device, kept: Kept | None = None, *, kernels_only: bool = False) -> Context:
    """How to launch on ``device``; ``kernels_only``: neither a half nor a product may be PyTorch's."""
    if kernels_only:
        return Context(configs.target_of(device), kept, choose=configs.choose_kernels)
    return Context(configs.target_of(device), kept)


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it x's."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


@functools.cache
def kernels() -> SimpleNamespace:
    """The device code, imported on first use: importing fastmixer does not import triton.

    Every function ``_NAME_kernel`` of the folder ``kernels`` as NAME, and what its host side has to know.
    """
    import triton.language as tl
    from triton import knobs

    from fastmixer import interpreter

    interpreted = interpreter.is_interpreted()
    if interpreted:
        interpreter.install()
    from fastmixer import kernels as package  # the folder kernels/ of the repository: setup.py

    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    modules = {name: importlib.import_module(f"{package.__name__}.{name}") for name in names}
    functions = {name: value for module in modules.values() for name, value in vars(module).items()}
    device_code = {_short(name): value for name, value in functions.items() if name.endswith("_kernel")}
    if not interpreted:
        # Each kernel gets the key in Triton's cache on disk that it has in every other process. With Triton
        # 3.6 the key depends on what the process hashed before: the constants of a function that a kernel
        # calls count only where that one was hashed already. What the tuner's workers compile, and what is
        # compiled ahead of time, would be compiled again.
        for kernel in device_code.values():
            hash(kernel)
    return SimpleNamespace(
        **device_code,
        norm=_values(modules["mlp"], "FOLD", "ROW", "COLUMN"),
        pack=_values(modules["pack"], "PLAIN", "FOLD_CONSTANT", "FOLD_PER_ROW", "BIAS", "BIAS_IN_PADDING"),
        dtype={getattr(torch, n): getattr(tl, n) for n in ("float16", "bfloat16", "float32", "float64")},
        interpreted=interpreted,
        knobs=knobs,
        stream=(lambda: None) if interpreted else _current_stream,
        gelu_terms=modules["activations"].polynomial_terms,
    )


def _current_stream() -> int:
    """Of the current device, as Triton takes it."""
    from triton.runtime import driver

    return driver.active.get_current_stream(driver.active.get_current_device())


def switches() -> tuple | None:
    """Those of Triton's by which it compiles other code; None where no kernel was loaded yet."""
    if not kernels.cache_info().currsize:
        return None
    knobs = kernels().knobs
    return knobs.runtime.debug, knobs.compilation.instrumentation_mode


def _short(function: str) -> str:
    return function.removeprefix("_").removesuffix("_kernel")


def _values(module: ModuleType, *names: str) -> SimpleNamespace:
    """The values of a module's constexprs."""
    return SimpleNamespace(**{name: getattr(module, name).value for name in names})


def run(context: Context, kernel: Any, programs: int, tiles: TileConfig | None = None, **args: Any) -> None:
    """Launches ``programs`` programs of a kernel with its parameters by name."""
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if tiles is not None:
        options |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    context.execute(Launch(kernel, (programs,), args, options, context.half))


def accumulator(dtype: torch.dtype) -> Any:
    """The constexpr ACC: what ``accumulate_dtype`` is to Triton."""
    return kernels().dtype[accumulate_dtype(dtype)]


def pass_tile(columns: int, context: Context, widest: int = 1024) -> tuple[int, int]:
    """Rows and columns of a program of a pass: 16 elements per thread are two 16-byte loads in 16 bits."""
    block = min(next_power_of_2(columns), widest)
    return (256 if context.target.backend == "interpreter" else max(1, 2048 // block)), block


class Call(NamedTuple):
    """One half of a block in one call: what its launches have in common.

    half: "token" or "channel". params: with dense vectors. scale: the residual scale as one accumulator-typed
    number per sample, or None for 1.
    """

    half: str
    params: MixingParams
    problem: Problem
    context: Context
    scale: Tensor | None = None

    def tiles(self, op: str) -> configs.Choice:
        """What was chosen for ``op``."""
        return self.context.choose(op, self.problem, self.context.target)

    def activation_constants(self) -> dict[str, Any]:
        """The constexprs of GELU."""
        dtype = self.problem.dtype
        terms = kernels().gelu_terms(kernels().dtype[dtype])
        return {"APPROXIMATE": self.params.approximate, "POLYNOMIAL": terms, "ACC": accumulator(dtype)}

    def product_constants(self) -> dict[str, Any]:
        """The constexprs of a product; TF32 where PyTorch's own switch allows it and the GPU has it."""
        dtype, target = self.problem.dtype, self.context.target
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        tf32 = tf32 and (target.backend != "hip" or target.arch == "gfx942")
        return {"INPUT_PRECISION": "tf32" if tf32 else "ieee", "ACC": accumulator(dtype)}

    def gelu_constants(self) -> dict[str, Any]:
        """The constexprs of a product with GELU."""
        return self.product_constants() | self.activation_constants()


def call_of(half: str, x: Tensor, params: MixingParams, dtype: torch.dtype, context: Context) -> Call:
    """A call of ``half`` with x (B, S, C), or its output's gradient, and products in ``dtype``."""
    scale = params.residual_scale
    if scale is not None:
        scale = context.copied(scale.reshape(-1).expand(x.shape[0]), accumulate_dtype(dtype))
    return Call(half, dense_vectors(params, context), problem_of(x, params, dtype), context, scale)


def dense_vectors(params: MixingParams, context: Context) -> MixingParams:
    """The same with contiguous norm parameters and biases: the kernels have no strides for them."""
    names = ("norm_weight", "norm_bias", "fc1_bias", "fc2_bias")
    vectors = {name: t for name in names if (t := getattr(params, name)) is not None}
    return params._replace(**{name: context.copied(t, t.dtype) for name, t in vectors.items()})


def problem_of(x: Tensor, params: MixingParams, dtype: torch.dtype) -> Problem:
    """What the launches of a half of x (B, S, C), with products in ``dtype``, are chosen for."""
    return Problem(*x.shape, params.fc1_weight.shape[0], x.dtype, dtype, params.approximate)


def padded_hidden(hidden: int, *, ones: bool = False) -> int:
    """The columns of whatever has the hidden's size; ones: with two more, and rows of whole cache lines."""
    return round_up(hidden + 2, 64) if ones else round_up(hidden, configs.ALIGNED)


def empty_hidden(
    rows: int, hidden: int, dtype: torch.dtype, device: torch.device, *, ones: bool = False
) -> Tensor:
    """An uninitialised (rows, hidden padded) tensor: how everything of the hidden's size lies in memory."""
    return torch.empty((rows, padded_hidden(hidden, ones=ones)), dtype=dtype, device=device)

"""Which backend runs a call, and why: "triton" (the fused kernels) or "torch" (the reference)."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastmixer.interpreter import is_interpreted
from fastmixer.notices import constant_in_traces, warn
from fastmixer.params import MixingParams

BACKENDS = ("auto", "triton", "torch")
MEMORY = ("balanced", "lean")

_warned: set[str] = set()


class _Switch:
    """One of ``choices``: chosen by the innermost block of this thread or task, else by the environment."""

    def __init__(self, name: str, choices: tuple[str, ...]) -> None:
        self._name, self._choices, self._variable = name, choices, f"FASTMIXER_{name.upper()}"
        self._chosen = contextvars.ContextVar[str | None](self._variable, default=None)

    @contextlib.contextmanager
    def chosen(self, choice: str) -> Iterator[None]:
        token = self._chosen.set(self._validated(choice, self._name))
        try:
            yield
        finally:
            self._chosen.reset(token)

    def current(self) -> str:
        choice = self._chosen.get()
        if choice is not None:
            return choice
        return self._validated(os.environ.get(self._variable) or self._choices[0], self._variable)

    def _validated(self, choice: str, source: str) -> str:
        if choice not in self._choices:
            raise ValueError(f"{source} must be one of {self._choices}, got {choice!r}")
        return choice


_BACKEND = _Switch("backend", BACKENDS)
_MEMORY = _Switch("memory", MEMORY)


def backend(name: str) -> contextlib.AbstractContextManager[None]:
    """Chooses the backend inside a ``with`` block, for the current thread or task.

    Outside any block the environment variable ``FASTMIXER_BACKEND`` decides, then "auto". What counts is the
    backend at the forward; the backward follows it. The forward that non-reentrant activation checkpointing
    repeats is a new one, on a GPU in another thread: see ``memory``. A compiled or exported program keeps the
    choice of its tracing.

    Args:
        name: "auto": Triton on the CUDA and ROCm tensors that it supports, otherwise the reference, with one
            ``FallbackWarning`` per reason; a half that was measured to be faster in PyTorch on this GPU, or
            in fp32 is predicted to be, is left to the reference without one, as ``explain`` shows.
            "triton": the kernels for every half and every product they have, or a RuntimeError that says why
            not, except under forward-mode differentiation, which the reference runs, and in a block that runs
            its own modules; on CPU tensors the kernels run in Triton's interpreter if ``TRITON_INTERPRET=1``
            was set before triton was imported. "torch": the reference.

    Raises:
        ValueError: any other name; on entering the block.
    """
    return _BACKEND.chosen(name)


@constant_in_traces
def current_backend() -> str:
    """The backend in force: the innermost ``backend`` block's, else FASTMIXER_BACKEND, else "auto".

    Raises:
        ValueError: FASTMIXER_BACKEND decides and names none.
    """
    return _BACKEND.current()


def memory(name: str) -> contextlib.AbstractContextManager[None]:
    """Chooses what a forward keeps for its backward inside a ``with`` block, for the current thread or task.

    Gradients differ by rounding only. Outside any block the environment variable ``FASTMIXER_MEMORY``
    decides, then "balanced". What counts is the choice at the forward; a compiled program keeps that of its
    tracing.

    Activation checkpointing repeats the forward inside the backward, where on a GPU no block is in force. The
    environment variable reaches it, and so does ``checkpoint(..., use_reentrant=False, context_fn=lambda:
    (fastmixer.memory("lean"), fastmixer.memory("lean")))``. Otherwise checkpoint raises a CheckpointError.

    Args:
        name: "balanced": the input of each half and the channel MLP's pre-activation, 6 activations (of
            B S C elements) per block where E = 4 C; a half that was chosen to be PyTorch's (see ``backend``)
            keeps what eager keeps. "lean": only the inputs, 2 activations, and no half that needs gradients
            is chosen to be PyTorch's; the backward recomputes the pre-activation, one more matrix product.

    Raises:
        ValueError: any other name; on entering the block.
    """
    return _MEMORY.chosen(name)


@constant_in_traces
def current_memory() -> str:
    """The choice in force: the innermost ``memory`` block's, else FASTMIXER_MEMORY, else "balanced".

    Raises:
        ValueError: FASTMIXER_MEMORY decides and names none.
    """
    return _MEMORY.current()


def fall_back(reason: str) -> None:
    """Warns, once per reason, that the reference runs."""
    if reason not in _warned:
        warn(f"fastmixer runs the PyTorch reference: {reason}")
        _warned.add(reason)  # after it: where warnings are errors, every such call raises


def why_not_triton(device: torch.device, x_dtype: torch.dtype, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run with x in ``x_dtype`` and products in ``dtype``; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x_dtype not in (dtype, torch.float32) or (dtype == torch.float64) != (x_dtype == torch.float64):
        return f"x is {x_dtype} and the products would run in {dtype}"
    if device.type == "cpu":
        if is_interpreted():
            return None
        if os.environ.get("TRITON_INTERPRET") == "1":
            return (
                "TRITON_INTERPRET was set after triton was imported and acts only before: "
                "set it in the environment before Python starts"
            )
        return "x is on the CPU; set TRITON_INTERPRET=1 before Python starts to run the kernels interpreted"
    if device.type != "cuda":
        return f"device type {device.type!r} is not supported"
    if is_interpreted():
        return "TRITON_INTERPRET is set, so the kernels run on CPU tensors only"
    if dtype == torch.float64:
        return "float64 has no GPU tiles"
    if not torch.cuda.is_available():
        return None  # a fake tensor: nothing will be launched
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def _why_not_memory(tensors: Sequence[Tensor]) -> str | None:
    """Why a kernel that reads the tensors' memory would not see their values; None when it would."""
    for tensor in tensors:
        kind = type(tensor)
        keeps_values_itself = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__
        if keeps_values_itself and kind not in (FakeTensor, FunctionalTensor):  # quantized, distributed ...
            return f"a {kind.__name__} keeps its values in its own way"
        if tensor.is_neg():
            return "a tensor is a negated view"
    return None


def is_ordinary(x: object) -> bool:
    """Whether nothing compiles, traces, transforms or watches a call with x now."""
    if is_traced(x) or torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def is_traced(x: object) -> bool:
    """Whether a call with x is recorded, or watched, operator by operator: then it has to be made of them."""
    if torch.compiler.is_compiling():
        return True
    modes = torch._C._len_torch_dispatch_stack() + torch._ops._len_torch_dispatch_stack_pre_dispatch()
    return modes > 0 or isinstance(x, (FakeTensor, FunctionalTensor))


@constant_in_traces  # traced itself, PyTorch 2.11's answer is always yes
def is_exported() -> bool:
    """Whether ``torch.export`` makes a program now."""
    return torch.compiler.is_exporting()


def use_triton(x: Tensor, dtype: torch.dtype, *halves: MixingParams) -> bool:
    """Whether the kernels run this call. Warns, or under backend("triton") raises RuntimeError, if not."""
    if torch.jit.is_tracing():
        return False
    tensors = [x, *(t for params in halves for t in params.tensors() if t is not None)]
    scales = [params.residual_scale for params in halves if isinstance(params.residual_scale, Tensor)]
    derives_scale = torch.is_grad_enabled() and any(scale.requires_grad for scale in scales)
    if not torch.compiler.is_compiling():
        return _use_triton(x.device, x.dtype, dtype, derives_scale, tensors)
    is_wrapped = any(is_traceable_wrapper_subclass(t) for t in tensors)
    return _use_triton(x.device, x.dtype, dtype, derives_scale, is_wrapped=is_wrapped)


@constant_in_traces
def _use_triton(
    device: torch.device,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    derives_scale: bool,
    tensors: Sequence[Tensor] | None = None,
    *,
    is_wrapped: bool = False,
) -> bool:
    """``use_triton``; in a trace, which has no tensors at hand, decided once and then part of the program."""
    name = current_backend()
    if name == "torch":
        return False
    in_forward_mode = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    have_tangents = in_forward_mode and (
        tensors is None or any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    )
    if have_tangents:
        fall_back("forward-mode derivatives are not fused")
        return False
    if name == "auto" and device.type == "cpu":
        reason = "x is on the CPU"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        reason = "the call is inside a torch.func transform"
    elif derives_scale:
        reason = "residual_scale requires a gradient"
    elif is_wrapped:
        reason = "a tensor keeps its values in its own way"
    else:
        reason = _why_not_memory(tensors or ()) or why_not_triton(device, x_dtype, dtype)
    if reason is None:
        return True
    if name == "triton":
        raise RuntimeError(f'backend("triton") cannot run this call: {reason}')
    fall_back(reason)
    return False

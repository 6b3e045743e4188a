"""Which backend runs a call, and why: "triton" (the fused kernels) or "torch" (the reference)."""

from __future__ import annotations

import contextlib
import contextvars
import importlib.util
import os
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

BACKENDS = ("auto", "triton", "torch")

_chosen: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastmixer_backend", default=None)
_warned: set[str] = set()


class FallbackWarning(UserWarning):
    """The reference ran where the fused kernels could not; the message says why. Given once a reason."""


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {BACKENDS}, got {name!r}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Chooses the backend inside a ``with`` block, for the current thread or task.

    name: "auto": Triton on the CUDA and ROCm tensors that it supports, otherwise the reference, with one
    ``FallbackWarning`` a reason. "triton": Triton, or an error that says why not; on CPU tensors the kernels
    run in Triton's interpreter if ``TRITON_INTERPRET=1`` was set before triton was imported. "torch": the
    reference. Outside any block the environment variable ``FASTMIXER_BACKEND`` decides, then "auto".
    A call that needs gradients runs the reference whatever the backend: training is not fused yet.

    Raises ValueError for any other name.
    """
    token = _chosen.set(_validated(name, "backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> str:
    """The backend in force: the innermost ``backend`` block's, else FASTMIXER_BACKEND, else "auto"."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _validated(os.environ.get("FASTMIXER_BACKEND") or "auto", "FASTMIXER_BACKEND")


def fall_back(reason: str) -> None:
    """Warns, once a reason, that the reference runs."""
    if reason not in _warned:
        warnings.warn(f"fastmixer runs the PyTorch reference: {reason}", FallbackWarning, stacklevel=4)
        _warned.add(reason)  # after it: where warnings are errors, every such call raises


def why_not_triton(device: torch.device, x_dtype: torch.dtype, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run with x in ``x_dtype`` and products in ``dtype``; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if x_dtype not in (dtype, torch.float32) or (dtype == torch.float64) != (x_dtype == torch.float64):
        return f"x is {x_dtype} and the products would run in {dtype}"
    from .interpreter import is_interpreted

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
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def _need_gradients(tensors: list[Tensor]) -> bool:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return True
    in_forward_mode = forward_ad._current_level >= 0 and torch._C._is_fwd_grad_enabled()
    return in_forward_mode and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _why_not_memory(tensors: list[Tensor]) -> str | None:
    """Why a kernel that reads the tensors' memory would not see their values; None when it would."""
    for tensor in tensors:
        kind = type(tensor)
        if kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:  # quantized, distributed, fake ...
            return f"a {kind.__name__} keeps its values in its own way"
        if tensor.is_neg():
            return "a tensor is a negated view"
    return None


def use_triton(x: Tensor, dtype: torch.dtype, tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the kernels run this call. Warns, or under backend("triton") raises RuntimeError, if not."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False  # the operators for torch.compile do not exist yet: inductor compiles the reference
    name = current_backend()
    if name == "torch":
        return False
    present = [x, *(t for t in tensors if t is not None)]
    if _need_gradients(present):
        fall_back("the call needs gradients and training is not fused yet")
        return False
    if name == "auto" and x.device.type == "cpu":
        reason = "x is on the CPU"
    elif torch._C._functorch.peek_interpreter_stack() is not None:
        reason = "the call is inside a torch.func transform"
    else:
        reason = _why_not_memory(present) or why_not_triton(x.device, x.dtype, dtype)
    if reason is None:
        return True
    if name == "triton":
        raise RuntimeError(f'backend("triton") cannot run this call: {reason}')
    fall_back(reason)
    return False

"""Makes Triton's CPU interpreter right in bfloat16, and quick enough to check kernels with.

The interpreter keeps a bf16 tensor as a NumPy array of uint16 patterns. In triton 3.6.0 and 3.9.0 it also
computes with those patterns as integers, casts integers and fp64 to bf16 by taking their value as a pattern,
and truncates fp32; 3.6.0 has no bf16 constants at all. ``install`` replaces the few methods that every
operation goes through, so kernels need no workaround:

- casts to bf16 round once, to nearest even (fp64 too, where torch rounds to fp32 first); integers go through
  fp32, as in compiled kernels;
- arithmetic, comparisons, minimum, maximum, clamp and fma widen to fp32 (fma to fp64) and round the result
  to bf16 once; comparisons give booleans that can be cast;
- ``tl.dot`` widens bf16 to fp32 and accumulates there;
- sums, minima, maxima and cumulative sums and products of bf16 accumulate in fp32 and round at the end.

Other dtypes give the values they gave, sooner: ``tl.erf``, fp16 casts and products are vectorised; a device
function no longer patches triton.language again at each call, nor does integer arithmetic compute overflow
checks that nothing reads. Two more differences: a comparison of fp32 can be cast to bf16, and loops up to a
run-time bound, which triton 3.6.0 refuses with NumPy 2.4, work.
Left alone: fp8 and ``tl.dot_scaled``; ``tl.atomic_add`` of bf16 raises instead of adding patterns.

Source of the methods replaced: triton/runtime/interpreter.py of those two versions.
"""

import dataclasses
import threading
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch

_lock = threading.Lock()
_installed = False


def is_interpreted() -> bool:
    """Whether Triton kernels run in its CPU interpreter in this process.

    ``TRITON_INTERPRET`` acts when a kernel is decorated, and triton.language's own functions (``tl.zeros``,
    ``tl.sum``) are decorated when triton is imported: they, not the environment, hold the answer. Imports
    triton; without it the answer is False.

    Raises:
        RuntimeError: this version of triton lacks what the answer is read from.
    """
    try:
        import triton
    except ImportError:
        return False
    from triton.runtime import jit

    return not isinstance(_member(triton.language.standard, "zeros"), _member(jit, "JITFunction"))


def install() -> None:
    """Patches Triton's interpreter, once per process; later calls do nothing. Safe to call from any thread.

    Raises:
        ImportError: triton is not installed.
        RuntimeError: this version of triton lacks something that is patched; then nothing is.
    """
    global _installed
    with _lock:
        if _installed:
            return
        for owner, name, replacement in _replacements():
            setattr(owner, name, replacement)
        _installed = True


# ---- conversions of whole arrays ------------------------------------------------------------------------


def bf16_to_fp32(patterns: np.ndarray) -> np.ndarray:
    """The fp32 values, exact, of bf16 patterns: uint16, any shape and strides."""
    wide = patterns.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """The bf16 patterns (uint16) of fp64, fp32, fp16, integer or boolean values, to nearest even."""
    if values.dtype == np.float64:
        values = _fp32_round_to_odd(values)
    single = values.astype(np.float32, copy=False)
    return _to_torch(single).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def to_bf16_toward_zero(values: np.ndarray) -> np.ndarray:
    """The bf16 patterns (uint16) of floating-point values, rounded toward zero."""
    if values.dtype == np.float64:
        values = _fp32_round_to_odd(values)
    single = np.asarray(values, dtype=np.float32)
    patterns = (single.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    # The payload of a NaN may lie in the bits that go: what is left would be an infinity.
    return np.where(np.isnan(single), patterns | np.uint16(0x40), patterns)


def _fp32_round_to_odd(values: np.ndarray) -> np.ndarray:
    """fp64 -> fp32 so that rounding the result again, to fewer bits, equals rounding ``values`` once.

    Round to odd (Boldo and Melquiond 2008): truncate, and set the last bit if anything was lost.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = np.asarray(values).astype(np.float32)
        widened = nearest.astype(np.float64)
        away_from_zero = np.abs(widened) > np.abs(values)
        inexact = widened != values
    bits = nearest.view(np.uint32) - away_from_zero.astype(np.uint32)
    return (bits | inexact).view(np.float32)


def _fp16_cast(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """fp16 <-> fp32; torch has vector instructions for it, NumPy goes element by element."""
    return _to_torch(values).to(dtype).numpy()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    # torch takes neither the read-only arrays of a broadcast nor the negative strides of a flip.
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy()
    return torch.from_numpy(array)


# ---- what is patched ------------------------------------------------------------------------------------


def _replacements() -> list[tuple[Any, str, Callable]]:
    """(owner, attribute, replacement) for all that is patched; reads everything before anything changes."""
    import triton.language as tl
    from triton.runtime import interpreter

    ir = _member(interpreter, "_ir")
    context = SimpleNamespace(
        tl=tl,
        handle=_member(interpreter, "TensorHandle"),
        empty_scope=_member(interpreter, "_LangPatchScope"),
        is_builtin=_member(tl.core, "is_builtin"),
        np_dtypes={},
        round_toward_zero=_member(_member(ir, "ROUNDING_MODE"), "RTZ"),
        float_add=_member(_member(ir, "ATOMIC_OP"), "FADD"),
    )
    builder = _member(interpreter, "InterpreterBuilder")
    reductions = (_member(interpreter, "ReduceOps"), ("sum", "min_max"))
    scans = (_member(interpreter, "ScanOps"), ("cumsum", "cumprod"))
    replaced = [
        (builder, "cast_impl", _cast_impl),
        (builder, "create_fp_to_fp", _create_fp_to_fp),
        *((builder, f"{kind}_op", _elementwise) for kind in ("unary", "binary", "ternary")),
        (builder, "create_fma", _create_fma),
        (builder, "create_dot", _create_dot),
        (builder, "create_erf", _create_erf),
        (builder, "create_atomic_rmw", _create_atomic_rmw),
        *((owner, name, _reduction) for owner, names in (reductions, scans) for name in names),
        (interpreter, "_get_np_dtype", _remembered_np_dtype),
        (interpreter, "_patch_lang", _patch_lang_once),
        (interpreter, "_patch_lang_tensor", _patch_lang_tensor),
    ]
    patches = [
        (owner, name, _bound(replacement, context, _member(owner, name)))
        for owner, name, replacement in replaced
    ]
    if not hasattr(builder, "get_bf16"):  # 3.6.0 has no bf16 constants: tl.full((N,), 0.1, tl.bfloat16) fails
        patches.append((builder, "get_bf16", _bound(_get_bf16, context, None)))
    # Less the overflow check of every integer operation that only ``debug`` reads.
    options = _member(_member(interpreter, "interpreter_builder"), "options")
    options = dataclasses.replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)
    return [*patches, (interpreter.interpreter_builder, "options", options)]


def _bound(replacement: Callable, context: SimpleNamespace, original: Callable | None) -> Callable:
    """The replacement as a function, or a method, of the original's arguments."""
    return lambda *args, **kwargs: replacement(context, original, *args, **kwargs)


def _member(owner: Any, name: str) -> Any:
    try:
        return getattr(owner, name)
    except AttributeError:
        import triton

        where = owner.__name__ if isinstance(owner, ModuleType | type) else repr(owner)
        raise RuntimeError(
            f"triton {triton.__version__} has no {where}.{name}, on which fastmixer's support of Triton's "
            "interpreter relies; known to work: triton 3.6.0 and 3.9.0"
        ) from None


def _is_bf16(handle: Any) -> bool:
    # The dtype alone would not do: a comparison's handle holds booleans under its operands' dtype.
    return handle.data.dtype == np.uint16 and handle.dtype.scalar.name == "bf16"


# ---- replacements: each gets the original, to give it all that is not its concern, and its arguments ------


def _cast_impl(context, original, self, src, dst_type):
    tl, target, data = context.tl, dst_type.scalar, src.data
    if _is_bf16(src):
        if target == tl.bfloat16:
            return context.handle(data, target)
        # A handle with fp32 data takes the original's way to any other type.
        wide = context.handle(bf16_to_fp32(data), tl.float32)
        return wide if target == tl.float32 else self.cast_impl(wide, target)
    if target == tl.bfloat16:
        return context.handle(to_bf16(data), target)
    if data.dtype == np.float16 and target == tl.float32:
        return context.handle(_fp16_cast(data, torch.float32), target)
    if data.dtype == np.float32 and target == tl.float16:
        return context.handle(_fp16_cast(data, torch.float16), target)
    return original(self, src, dst_type)


def _get_bf16(context, original, self, value):
    return self.cast_impl(self.get_fp32(value), context.tl.bfloat16)


def _create_fp_to_fp(context, original, self, src, dst_type, rounding_mode):
    """The cast with a rounding mode, and (since 3.9) fp16 <-> bf16."""
    tl, target = context.tl, dst_type.scalar
    standard = src.dtype.scalar.is_standard_floating() and target.is_standard_floating()
    if not standard or tl.bfloat16 not in (src.dtype.scalar, target):
        return original(self, src, dst_type, rounding_mode)
    if target == tl.bfloat16 and rounding_mode == context.round_toward_zero:
        return context.handle(to_bf16_toward_zero(src.data), target)
    return self.cast_impl(src, dst_type)


def _elementwise(context, original, self, *args):
    """unary_op, binary_op and ternary_op: (operands, then the NumPy function to apply)."""
    *operands, op = args
    if not all(_is_bf16(operand) for operand in operands):
        return original(self, *args)  # among them tl.where: its condition is boolean, it moves patterns
    values = op(*(bf16_to_fp32(operand.data) for operand in operands))
    if values.dtype == np.bool_:
        return context.handle(values, context.tl.int1)
    return context.handle(to_bf16(values), context.tl.bfloat16)


def _create_fma(context, original, self, x, y, z):
    if not _is_bf16(z):
        return original(self, x, y, z)
    a, b, c = (bf16_to_fp32(operand.data).astype(np.float64) for operand in (x, y, z))
    return context.handle(to_bf16(_fp64_sum_round_to_odd(a * b, c)), context.tl.bfloat16)


def _fp64_sum_round_to_odd(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b so that rounding the result to fewer bits equals rounding the exact sum once."""
    with np.errstate(invalid="ignore"):
        total = a + b
        # Knuth's TwoSum: a + b == total + error, exactly.
        b_part = total - a
        error = (a - (total - b_part)) + (b - b_part)
        even = (total.view(np.uint64) & np.uint64(1)) == 0
        lost = np.isfinite(total) & (error != 0)
    return np.where(lost & even, np.nextafter(total, np.copysign(np.inf, error)), total)


def _create_dot(context, original, self, a, b, d, *options):
    either_bf16 = _is_bf16(a) or _is_bf16(b)
    fp16_into_fp32 = a.data.dtype == b.data.dtype == np.float16 and d.data.dtype == np.float32
    if not either_bf16 and not fp16_into_fp32:
        return original(self, a, b, d, *options)
    left, right = (
        bf16_to_fp32(operand.data) if _is_bf16(operand) else _fp16_cast(operand.data, torch.float32)
        for operand in (a, b)
    )
    product = np.matmul(left, right)
    product += d.data
    return context.handle(product.astype(d.data.dtype, copy=False), d.dtype.scalar)


def _create_erf(context, original, self, arg):
    """erf in the dtype of ``arg`` (fp32 or fp64), computed in fp64 as math.erf is."""
    values = torch.erf(_to_torch(arg.data).to(torch.float64)).numpy()
    return context.handle(values.astype(arg.data.dtype, copy=False), arg.dtype.scalar)


def _create_atomic_rmw(context, original, self, operation, ptr, val, *rest):
    if operation == context.float_add and _is_bf16(val):
        raise NotImplementedError("Triton's interpreter cannot add bfloat16 atomically: use float32")
    return original(self, operation, ptr, val, *rest)


def _reduction(context, original, self, tensor, *args, **kwargs):
    """A reduction or scan of one tensor, for bf16 done in fp32 and rounded at the end."""
    tl = context.tl

    def retyped(tensor, data, dtype):
        kind = tl.block_type(dtype, list(data.shape)) if tensor.type.is_block() else dtype
        return tl.core.tensor(context.handle(data, dtype), kind)

    def narrowed(result):
        if result.dtype != tl.float32:
            return result  # indices
        return retyped(result, to_bf16(result.handle.data), tl.bfloat16)

    if not _is_bf16(tensor.handle):
        return original(self, tensor, *args, **kwargs)
    wide = retyped(tensor, bf16_to_fp32(tensor.handle.data), tl.float32)
    result = original(self, wide, *args, **kwargs)
    if isinstance(result, tuple | list):
        return type(result)(narrowed(item) for item in result)
    return narrowed(result)


def _remembered_np_dtype(context, original, dtype):
    """The original builds a dictionary of all types at every load and cast."""
    name = dtype.scalar.name
    if name not in context.np_dtypes:
        context.np_dtypes[name] = original(dtype)
    return context.np_dtypes[name]


def _patch_lang_once(context, original, fn):
    """Every call of a device function patches triton.language, though the launch has done so already."""
    tl = context.tl
    # A launch restores tl and tl.tensor when it ends: outside launches these are builtins, and inside, where
    # they are interpreted, they no longer say so.
    if any(context.is_builtin(function) for function in (tl.load, tl.core.load, tl.core.tensor.to)):
        return original(fn)
    return context.empty_scope()


def _patch_lang_tensor(context, original, tensor, scope):
    original(tensor, scope)
    # 3.6.0 calls int() on an array of shape (1,), which NumPy 2.4 refuses; range() needs it.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

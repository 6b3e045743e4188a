"""bfloat16 in Triton's interpreter: casts, arithmetic, reductions and products, with fastmixer's patches.

Casts are held to two oracles, torch's bf16 and a search among the sorted bf16 values; products to the
forward error bound of the accumulation dtype. Run with TRITON_INTERPRET=1 set before triton is imported.
"""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.runtime.errors import InterpreterError

from fastmixer import interpreter

pytestmark = pytest.mark.skipif(not interpreter.is_interpreted(), reason="needs TRITON_INTERPRET=1")

NARROW = torch.bfloat16
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64


@pytest.fixture(autouse=True, scope="module")
def patched():
    interpreter.install()


@triton.jit
def _cast_kernel(x_ptr, out_ptr, N: tl.constexpr, ROUNDING: tl.constexpr = None):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(out_ptr + i, tl.cast(x, out_ptr.dtype.element_ty, fp_downcast_rounding=ROUNDING))


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a - b)
    tl.store(out_ptr + 2 * N + i, a * b)
    tl.store(out_ptr + 3 * N + i, a / b)
    tl.store(out_ptr + 4 * N + i, a * 0.1 + 3.0)
    tl.store(out_ptr + 5 * N + i, tl.where(a < b, a, b))
    tl.store(out_ptr + 6 * N + i, tl.abs(a))
    tl.store(out_ptr + 7 * N + i, -a)
    tl.store(out_ptr + 8 * N + i, tl.maximum(a, b))
    tl.store(out_ptr + 9 * N + i, tl.minimum(a, b))
    tl.store(out_ptr + 10 * N + i, tl.clamp(a, -1.5, 2.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _comparison_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr + i, (a < b).to(dtype))
    tl.store(out_ptr + N + i, (a <= b).to(dtype))
    tl.store(out_ptr + 2 * N + i, (a > b).to(dtype))
    tl.store(out_ptr + 3 * N + i, (a >= b).to(dtype))
    tl.store(out_ptr + 4 * N + i, (a == b).to(dtype))
    tl.store(out_ptr + 5 * N + i, (a != b).to(dtype))
    tl.store(out_ptr + 6 * N + i, ((a > b) & (a < 3.0)).to(dtype))


@triton.jit
def _fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)))


@triton.jit
def _constants_kernel(x_ptr, out_ptr, value, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.full((N,), 0.1, tl.bfloat16))
    tl.store(out_ptr + N + i, tl.load(x_ptr + i, mask=i < 0, other=0.1))
    tl.store(out_ptr + 2 * N + i, tl.zeros((N,), tl.bfloat16) + value)
    tl.store(out_ptr + 3 * N + i, 0.1)


@triton.jit
def _reductions_kernel(x_ptr, sum_ptr, max_ptr, argmax_ptr, scans_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    x = tl.load(x_ptr + tile)
    total = tl.sum(x, axis=1)
    # What tl.max calls; in 3.6.0 it casts to fp32 before.
    largest, where = tl.core._reduce_with_indices(x, 1, tl.standard._argmax_combine_tie_break_left)
    tl.static_assert(total.dtype == tl.bfloat16 and largest.dtype == tl.bfloat16 and where.dtype == tl.int32)
    tl.store(sum_ptr + i, total)
    tl.store(max_ptr + i, largest)
    tl.store(argmax_ptr + i, where)
    tl.store(scans_ptr + tile, tl.cumsum(x, axis=1))
    tl.store(scans_ptr + N * N + tile, tl.cumprod(x, axis=1))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, acc_ptr, out_ptr, N: tl.constexpr, TRANSPOSED: tl.constexpr):
    i = tl.arange(0, N)
    tile = i[:, None] * N + i[None, :]
    a, acc = tl.load(a_ptr + tile), tl.load(acc_ptr + tile)
    if TRANSPOSED:
        a = tl.trans(a)
    product = tl.dot(a, tl.load(b_ptr + tile), acc, input_precision="ieee", out_dtype=acc.dtype)
    tl.store(out_ptr + tile, product)


@triton.jit
def _erf_kernel(x_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.erf(tl.load(x_ptr + i)))


@triton.jit
def _plus_one(x):
    return x + 1


@triton.jit
def _loop_kernel(out_ptr, count):
    total = 0
    for _ in range(0, count):
        total = _plus_one(total)
    tl.store(out_ptr, total)


@triton.jit
def _atomic_add_kernel(x_ptr):
    tl.atomic_add(x_ptr + tl.arange(0, 16), tl.full((16,), 1.0, x_ptr.dtype.element_ty))


def bf16(patterns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(patterns.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


def random_bits(dtype: torch.dtype, n: int, seed: int = 0) -> torch.Tensor:
    """n values with every bit random, which gives NaN, infinities and subnormals their share."""
    raw = np.random.default_rng(seed).integers(0, 256, n * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype)


def random_ties(n: int, seed: int = 0) -> torch.Tensor:
    """fp32 values halfway between two bf16 values, and their fp32 neighbours."""
    high = np.random.default_rng(seed).integers(0, 1 << 16, n, dtype=np.uint32) << np.uint32(16)
    step = np.random.default_rng(seed + 1).integers(-1, 2, n)
    return torch.from_numpy(((high | 0x8000) + step).astype(np.uint32).view(np.float32))


def nearest_bf16(values: np.ndarray) -> np.ndarray:
    """The bf16 patterns nearest to fp64 values, ties to even: a search among the values of all patterns."""
    table = bf16(np.arange(0x7F80)).to(torch.float64).numpy()  # sorted: the finite ones from 0 up
    table = np.append(table, 2.0**128)  # infinity stands where the next value would
    size = np.minimum(np.abs(np.where(np.isnan(values), 0.0, values)), 2.0**128)
    upper = np.searchsorted(table, size)
    lower = np.maximum(upper - 1, 0)
    below, above = size - table[lower], table[upper] - size  # both exact: the operands are close
    up = (above < below) | ((above == below) & (upper % 2 == 0))
    found = np.where(up, upper, lower) | (np.signbit(values) << 15)
    return np.where(np.isnan(values), 0x7FC0, found).astype(np.uint16)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits, but for NaN, of which one is as good as another."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    numbers = ~expected.isnan()
    assert torch.equal(actual[numbers].signbit(), expected[numbers].signbit())


def cast(x: torch.Tensor, dtype: torch.dtype, rounding: str | None = None) -> torch.Tensor:
    out = torch.full_like(x, 77, dtype=dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        _cast_kernel[(1,)](x, out, x.numel(), rounding)
    return out


@pytest.mark.parametrize("target", [HALF, SINGLE, DOUBLE, NARROW], ids=str)
@pytest.mark.parametrize("source", [NARROW, HALF], ids=str)
def test_every_16_bit_pattern_is_cast_as_in_torch(source, target):
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(source)
    assert_same(cast(x, target), x.to(target))


@pytest.mark.parametrize("make", [lambda n: random_bits(torch.float32, n), random_ties], ids=["bits", "ties"])
def test_fp32_rounds_to_nearest_even(make):
    x = make(1 << 16)
    out = cast(x, NARROW)
    assert_same(out, x.to(NARROW))
    assert_same(out, bf16(nearest_bf16(x.double().numpy())))


def test_fp64_rounds_once():
    """fp64 just above a tie: by way of fp32 it would become the tie, and then the even neighbour."""
    ties = random_ties(1 << 14).double()
    x = torch.cat([ties * (1 + 2.0**-40), ties * (1 - 2.0**-40), ties, random_bits(torch.float64, 1 << 14)])
    out = cast(x, NARROW)
    assert_same(out, bf16(nearest_bf16(x.numpy())))
    assert not torch.equal(out, x.to(torch.float32).to(NARROW))


@given(st.floats(width=64))
def test_to_bf16_of_any_float(value):
    x = np.array([value])
    assert_same(bf16(interpreter.to_bf16(x)), bf16(nearest_bf16(x)))


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_rounding_toward_zero(dtype):
    x = torch.cat([random_bits(dtype, 1 << 15), random_ties(1 << 15).to(dtype)])
    lost = [0x7F800001, 0x7F80FFFF, -0x7FFFFF]  # of NaN: no bit of their payload would be left
    x[:3] = torch.tensor(lost, dtype=torch.int32).view(SINGLE)
    nearest = nearest_bf16(x.double().numpy())
    overshot = bf16(nearest).double().abs() > x.double().abs()
    assert_same(cast(x, NARROW, rounding="rtz"), bf16(nearest - overshot.numpy()))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers_to_bf16_and_back(dtype):
    x = random_bits(dtype, 4096)
    assert_same(cast(x, NARROW), x.to(NARROW))
    whole = torch.randn(4096, generator=torch.Generator().manual_seed(0)).abs().mul(30).to(NARROW)
    assert torch.equal(cast(whole, dtype), whole.to(dtype))


def test_fp32_to_fp16_gives_what_numpy_gives():
    x = random_bits(SINGLE, 1 << 16)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = torch.from_numpy(x.numpy().astype(np.float16))
    assert_same(cast(x, HALF), expected)


def test_arrays_torch_does_not_take_are_converted():
    """Read-only ones, as a broadcast makes, and negative strides, as a flip makes."""
    x = np.array([1.0, 0.1], dtype=np.float32)
    expected = nearest_bf16(x.astype(np.float64))
    assert np.array_equal(interpreter.to_bf16(np.broadcast_to(x, (3, 2)))[2], expected)
    assert np.array_equal(interpreter.to_bf16(x[::-1]), expected[::-1])


def test_constants_are_rounded():
    out = torch.full((4, 16), torch.nan, dtype=NARROW)
    _constants_kernel[(1,)](torch.zeros(16, dtype=NARROW), out, 0.1, 16)
    assert torch.equal(out, torch.full_like(out, 0.1))


def operands(n: int = 4096) -> tuple[torch.Tensor, torch.Tensor]:
    """Random patterns; an eighth of the pairs is equal, an eighth opposite, a quarter of one scale."""
    a, b = random_bits(NARROW, n, seed=1), random_bits(NARROW, n, seed=2)
    b[::8], b[1::8] = a[::8], -a[1::8]
    generator = torch.Generator().manual_seed(0)
    a[2::4], b[2::4] = torch.randn(2, n // 4, generator=generator).to(NARROW)
    return a, b


def rows(kernel, count: int, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = NARROW) -> torch.Tensor:
    """The ``count`` results, a row each, of a kernel above."""
    out = torch.full((count, a.numel()), 77, dtype=dtype)
    with np.errstate(all="ignore"):
        kernel[(1,)](a, b, out, a.numel())
    return out


def test_arithmetic_is_torchs():
    a, b = operands()
    out = rows(_arithmetic_kernel, 11, a, b)
    scaled = a * torch.tensor(0.1, dtype=NARROW) + 3.0
    expected = [a + b, a - b, a * b, a / b, scaled, torch.where(a < b, a, b), a.abs()]
    assert_same(out[:7], torch.stack(expected))
    # 3.6.0 compiles -x to 0 - x, so 0 to 0, and versions differ in what the minimum of 1 and NaN is.
    numbers = ~(a.isnan() | b.isnan())
    expected = [-a, torch.maximum(a, b), torch.minimum(a, b), a.clamp(-1.5, 2.0)]
    assert torch.equal(out[7:, numbers], torch.stack(expected)[:, numbers])


@pytest.mark.parametrize("source", [NARROW, SINGLE], ids=str)
@pytest.mark.parametrize("target", [NARROW, SINGLE, torch.int32], ids=str)
def test_comparisons_are_torchs_and_can_be_cast(source, target):
    a, b = operands()
    expected = [a < b, a <= b, a > b, a >= b, a == b, a != b, (a > b) & (a < 3.0)]
    out = rows(_comparison_kernel, 7, a.to(source), b.to(source), target)
    assert torch.equal(out, torch.stack(expected).to(target))


def test_fma_rounds_once():
    """A product halfway between two bf16 values: the third operand, however small, decides."""
    generator = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(4096, generator=generator).to(NARROW) for _ in range(3))
    tie = (1 + 2.0**-7) * (1 + 2.0**-1)  # 9 significant bits, of which bf16 holds 8
    x[:2], y[:2] = 1 + 2.0**-7, 1 + 2.0**-1
    z[0], z[1] = 2.0**-100, -(2.0**-100)
    out = torch.full_like(x, 77)
    _fma_kernel[(1,)](x, y, z, out, x.numel())
    exact = x.double() * y.double() + z.double()  # exact but for the first two
    exact[0], exact[1] = math.nextafter(tie, 2), math.nextafter(tie, 1)
    assert_same(out, bf16(nearest_bf16(exact.numpy())))
    assert out[0] > out[1]


def test_reductions_accumulate_in_fp32():
    n = 64
    x = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).sub(0.5).to(NARROW)
    total, largest = (torch.full((n,), 77, dtype=NARROW) for _ in range(2))
    where, scans = torch.full((n,), 77, dtype=torch.int32), torch.full((2, n, n), 77, dtype=NARROW)
    _reductions_kernel[(1,)](x, total, largest, where, scans, n)
    assert torch.equal(largest, x.amax(1))
    assert torch.equal(where.long(), x.float().argmax(1))
    truth = torch.stack([x.double().cumsum(1), x.double().cumprod(1)])
    size = torch.stack([x.double().abs().cumsum(1), truth[1].abs()])
    accumulated = n * torch.finfo(SINGLE).eps * size
    bound = torch.finfo(NARROW).eps / 2 * (truth.abs() + accumulated) + accumulated
    assert ((scans.double() - truth).abs() <= bound).all()
    assert ((total.double() - truth[0, :, -1]).abs() <= bound[0, :, -1]).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("dtype", [NARROW, HALF, SINGLE, DOUBLE], ids=str)
def test_dot_accumulates_in_fp32_or_wider(dtype, transposed):
    n, wide = 64, DOUBLE if dtype == DOUBLE else SINGLE
    values = torch.randn(3, n, n, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    a, b, acc = values[0].to(dtype), values[1].to(dtype), values[2].to(wide)
    out = torch.full_like(acc, torch.nan)
    _dot_kernel[(1,)](a.T.contiguous() if transposed else a, b, acc, out, n, transposed)
    a, b, acc = a.double(), b.double(), acc.double()
    # Higham, Accuracy and Stability, 3.1: n products and n additions in any order; twice, as for fp64 the
    # truth is no better than the result.
    bound = 2 * (n + 1) * torch.finfo(wide).eps / 2 * (a.abs() @ b.abs() + acc.abs())
    assert ((out.double() - (a @ b + acc)).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=str)
def test_erf_is_maths(dtype):
    x = torch.linspace(-6, 6, 1 << 12, dtype=torch.float64).to(dtype)
    out = torch.full_like(x, torch.nan)
    _erf_kernel[(1,)](x, out, x.numel())
    expected = torch.tensor([math.erf(v) for v in x.tolist()], dtype=dtype)
    ulp = torch.from_numpy(np.spacing(expected.abs().numpy()))
    assert ((out - expected).abs() <= 2 * ulp).all()  # either is within one ulp of erf


def test_runtime_loop_bounds_and_device_functions():
    _loop_kernel[(1,)](out := torch.full((1,), 77, dtype=torch.int32), 5)
    assert out.item() == 5


def test_atomic_add_of_bf16_is_refused():
    with pytest.raises(InterpreterError, match="cannot add bfloat16 atomically"):
        _atomic_add_kernel[(1,)](torch.zeros(16, dtype=NARROW))
    single = torch.zeros(16)
    _atomic_add_kernel[(1,)](single)
    assert torch.equal(single, torch.ones(16))


def run(*arguments: str, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], env=clean, check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.strip()


def test_without_the_patches_bf16_is_wrong():
    """Should a release of triton be right, this says so, and the patches can go."""
    assert run(__file__, TRITON_INTERPRET="1") == "cast False dot False"


def test_is_interpreted_asks_the_objects_not_the_environment():
    code = (
        "import os, sys, fastmixer.interpreter as i; print('triton' in sys.modules, end=' '); import triton;"
        "os.environ['TRITON_INTERPRET'] = '1'; print(i.is_interpreted())"
    )
    assert run("-c", code) == "False False"


if __name__ == "__main__":  # the interpreter by itself: install() was not called
    x = torch.full((16,), 1 + 2.0**-8 + 2.0**-9)
    one, out = torch.ones(16, 16, dtype=NARROW), torch.full((16, 16), torch.nan)
    _dot_kernel[(1,)](one, one, torch.zeros(16, 16), out, 16, False)
    print("cast", torch.equal(cast(x, NARROW), x.to(NARROW)), "dot", bool((out == 16).all()))

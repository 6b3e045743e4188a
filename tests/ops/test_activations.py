"""GELU: the device function in the interpreter, and the machine code that its polynomials become."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from fastmixer.kernels import activations
from gelu_polynomials import APPROXIMATE, F32, SHIPPED, TERMS, evaluation_error

from benchmarks import fit_gelu
from fastmixer.dtypes import accumulate_dtype
from fastmixer.parity import compare

BLOCK = 8192
SIXTEEN_BIT = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
KEEPS_ITS_DIGITS = {torch.float32: tl.float32, torch.float64: tl.float64}

# numpy, which the interpreter computes with, reports what these tests are about
special_values = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@triton.jit
def _gelu_kernel(
    x_ptr,  # (N,) fp32 or fp64
    y_ptr,  # (N,)
    N,
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,  # None: copies
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(x_ptr + i, mask=i < N)
    if POLYNOMIAL is not None:
        y = activations.gelu(y, APPROXIMATE, POLYNOMIAL)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < N)


def gelu(x, approximate, polynomial):
    """The device function on a tensor (N,), fp32 or fp64."""
    y = torch.full_like(x, math.nan)
    _gelu_kernel[(triton.cdiv(len(x), BLOCK),)](x, y, len(x), approximate, polynomial, BLOCK)
    return y


@triton.jit
def _gelu_and_derivative_kernel(
    x_ptr,  # (N,) fp32 or fp64
    y_ptr,  # (N,)
    derivative_ptr,  # (N,)
    N,
    APPROXIMATE: tl.constexpr,
    POLYNOMIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < N)
    y, derivative = activations.gelu_and_derivative(x, APPROXIMATE, POLYNOMIAL)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < N)
    tl.store(derivative_ptr + i, derivative.to(derivative_ptr.dtype.element_ty), mask=i < N)


def gelu_and_derivative(x, approximate, polynomial):
    """The device function on a tensor (N,), fp32 or fp64."""
    found = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    grid = (triton.cdiv(len(x), BLOCK),)
    _gelu_and_derivative_kernel[grid](x, *found, len(x), approximate, polynomial, BLOCK)
    return found


def normal(mean, std, device, n=1 << 15):
    x = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(17)) * std + mean
    return x.to(device)


def torch_gelu(x, approximate):
    return torch.nn.functional.gelu(x, approximate=approximate)


def torch_derivative(x, approximate, g=None):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(torch_gelu(x, approximate), x, torch.ones_like(x) if g is None else g)[0]


# --- Parity with eager


@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, -1.0, -2.0])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_polynomial_of_an_fp32_tile_is_as_good_as_eager_in_16_bits(device, approximate, dtype, mean, std):
    h = normal(mean, std, device)
    polynomial = activations.polynomial_terms(SIXTEEN_BIT[dtype])
    fused = gelu(h.float(), approximate, polynomial).to(dtype)
    parity = compare(fused, torch_gelu(h.to(dtype), approximate), torch_gelu(h, approximate))
    assert polynomial in TERMS
    assert parity.ok, parity


@special_values
@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", KEEPS_ITS_DIGITS, ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_exact_form_is_as_good_as_torch(device, approximate, dtype, std):
    x = normal(0.0, std, device).to(dtype)
    fused = gelu(x, approximate, 0)
    truth = torch_gelu(x.double(), approximate)
    parity = compare(fused, torch_gelu(x, approximate), truth, accumulate_dtype(dtype))
    assert activations.polynomial_terms(KEEPS_ITS_DIGITS[dtype]) == 0
    assert parity.ok, parity


@pytest.mark.parametrize("dtype", KEEPS_ITS_DIGITS, ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_exact_form_keeps_every_digit_near_zero(device, approximate, dtype):
    """Element by element: a constant or a step in a type narrower than x would show.

    The longer of the two forms has eight operations, none of them off by more than an ulp.
    """
    x = torch.logspace(-30, -3, 2000, dtype=dtype, device=device)
    x = torch.cat([x, -x])
    phi = torch.from_numpy(fit_gelu.normal_cdf(x.double().cpu().numpy(), approximate)).to(device)
    relative = (gelu(x, approximate, 0).double() / (x.double() * phi) - 1).abs()
    assert relative.max() <= 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_polynomial_is_the_shipped_one_of_its_approximate(device, approximate, terms):
    """Up to rounding, since a GPU fuses multiply and add: far less than erf and tanh GELU differ by."""
    x = normal(0.0, 2.0, device).float()
    shipped = np.float32(SHIPPED[approximate, terms])
    x_host = x.double().cpu().numpy()
    rounding = np.abs(x_host) * (evaluation_error(shipped, x_host) + F32.eps)
    difference = gelu(x, approximate, terms).cpu().numpy() - fit_gelu.evaluate(shipped, x_host)
    assert (np.abs(difference) <= 2 * rounding).all()


# --- Special values


def assert_same(found, torchs, x):
    """Bits of torch's function, NaN included; at infinity of fp64's: in fp32 some CPUs' GELU is NaN there."""
    expected = torch.where(x.isinf(), torchs(x.double()).to(x.dtype), torchs(x))
    assert torch.equal(found.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


@special_values
@pytest.mark.parametrize("polynomial", [0, *TERMS])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_nan_inf_and_zero_are_what_torch_gives(device, approximate, polynomial):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], device=device)
    y = gelu(x, approximate, polynomial)
    assert y.isnan().tolist() == [True, False, True, False, False]
    assert_same(y, lambda x: torch_gelu(x, approximate), x)
    assert torch.equal(y[3:].signbit(), x[3:].signbit())


@special_values
@pytest.mark.parametrize("polynomial", [0, *TERMS])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_saturates_exactly_up_to_the_largest_number(device, approximate, polynomial):
    """From 13.5 on both exact Phi are 0 or 1 in fp32; the polynomials are from where their fit ends."""
    start = fit_gelu.FIT_END if polynomial else 13.5
    x = torch.cat([torch.linspace(start, 60, 4000), torch.logspace(2, 38, 500), torch.tensor([F32.max])])
    x = x.to(device)
    assert torch.equal(gelu(x, approximate, polynomial), x)
    assert torch.equal(gelu(-x, approximate, polynomial), torch.zeros_like(x))


@pytest.mark.parametrize("polynomial", [0, *TERMS])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_denormals_are_halved(device, approximate, polynomial):
    x = torch.tensor([1, 2, 3, 1000], dtype=torch.float32) * float(F32.smallest_subnormal)
    x = torch.cat([x, -x, torch.tensor([float(F32.tiny), -float(F32.tiny)])]).to(device)
    error = (gelu(x, approximate, polynomial).double() - x.double() / 2).abs()
    assert error.max() <= float(F32.smallest_subnormal) / 2


# --- GELU and its derivative


@special_values
@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("mean", [0.0, -1.0, -2.0])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT, ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_derivative_of_an_fp32_tile_is_as_good_as_eager_in_16_bits(device, approximate, dtype, mean, std):
    """As the backward uses it: times the gradient of GELU, which is fp32 here and rounded before in eager."""
    h, g = normal(mean, std, device), normal(0.0, 1.0, device).flip(0)
    rounded, polynomial = h.to(dtype), activations.polynomial_terms(SIXTEEN_BIT[dtype])
    y, derivative = gelu_and_derivative(h.float(), approximate, polynomial)
    fused = y.to(dtype), (g.float() * derivative).to(dtype)
    eager = torch_gelu(rounded, approximate), torch_derivative(rounded, approximate, g.to(dtype))
    truth = torch_gelu(h, approximate), torch_derivative(h, approximate, g)
    for compared in zip(fused, eager, truth, strict=True):
        parity = compare(*compared)
        assert parity.ok, parity


def exact_derivative(x, approximate):
    """GELU' of an fp64 x, without torch's 1 - tanh^2, which has few digits where tanh is about 1."""
    if approximate == "none":
        return torch_derivative(x, approximate)
    v, dv = (math.sqrt(8 / math.pi) * (1 + k * 0.044715 * x * x) for k in (1, 3))
    return (v * x).sigmoid() + x * (v * x).sigmoid() * (-v * x).sigmoid() * dv


@special_values
@pytest.mark.parametrize("std", [0.05, 0.3, 1.0, 3.0, 30.0])
@pytest.mark.parametrize("dtype", KEEPS_ITS_DIGITS, ids=str)
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_exact_derivative_is_as_good_as_torch(device, approximate, dtype, std):
    x = normal(0.0, std, device).to(dtype)
    y, derivative = gelu_and_derivative(x, approximate, 0)
    truth = torch_gelu(x.double(), approximate), exact_derivative(x.double(), approximate)
    eager = torch_gelu(x, approximate), torch_derivative(x, approximate)
    for compared in zip((y, derivative), eager, truth, strict=True):
        parity = compare(*compared, accumulate_dtype(dtype))
        assert parity.ok, parity


@special_values
@pytest.mark.parametrize("polynomial", [0, *TERMS])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_gelu_and_derivative_share_gelus_polynomial(device, approximate, polynomial):
    """The backward's hidden is the forward's, but for how tanh is evaluated: that one is always exact."""
    x = normal(0.0, 2.0, device).float()
    y, _ = gelu_and_derivative(x, approximate, polynomial)
    forward = gelu(x, approximate, polynomial if approximate == "none" else 0)
    assert ((y - forward).abs() <= 8 * float(F32.eps) * x.abs()).all()


@special_values
@pytest.mark.parametrize("polynomial", [0, *TERMS])
@pytest.mark.parametrize("approximate", APPROXIMATE)
def test_derivative_at_nan_inf_zero_and_large_numbers_is_what_torch_gives(device, approximate, polynomial):
    """From 15 on phi is 0 in fp32."""
    large = torch.cat([torch.linspace(15, 60, 400), torch.logspace(2, 38, 100), torch.tensor([F32.max])])
    x = torch.cat([torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0]), large, -large]).to(device)
    y, derivative = gelu_and_derivative(x, approximate, polynomial)
    assert_same(y, lambda x: torch_gelu(x, approximate), x)
    assert_same(derivative, lambda x: torch_derivative(x, approximate), x)


# --- Machine code

ELEMENTS_A_THREAD = 32


def compile_here():
    """Compiles for sm_90 and prints, by approximate and terms: (instructions, FFMA.SAT among them)."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    types = dict.fromkeys(_gelu_kernel.arg_names, "constexpr") | {"x_ptr": "*fp32", "y_ptr": "*bf16"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in (0, 1)}
    block = 128 * ELEMENTS_A_THREAD
    counts = {}
    for approximate, terms in [("none", None), *SHIPPED]:
        constants = dict(zip(_gelu_kernel.arg_names[2:], (block, approximate, terms, block), strict=True))
        positions = {(_gelu_kernel.arg_names.index(name),): value for name, value in constants.items()}
        binary = triton.compile(
            ASTSource(_gelu_kernel, types, positions, aligned),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": 4, "enable_fp_fusion": True},
        )
        cubin = Path(sys.argv[1]) / "gelu.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        sass = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True)
        lines = [
            line for line in sass.stdout.splitlines() if line.strip().startswith("/*") and "NOP" not in line
        ]
        counts[f"{approximate} {terms}"] = (len(lines), sum("FFMA.SAT" in line for line in lines))
    print(json.dumps(counts))


@functools.cache
def instruction_counts(folder):
    """compile_here() in a process without TRITON_INTERPRET."""
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(root), str(root / "tests"), environment.get("PYTHONPATH", "")]
    )
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, __file__, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    return instruction_counts(tmp_path_factory.mktemp("sm_90"))


@pytest.mark.parametrize(("approximate", "terms"), SHIPPED)
def test_polynomial_compiles_to_terms_plus_two_instructions(counts, approximate, terms):
    """x x, terms - 1 FFMA, one FFMA.SAT that is the clamp, and the product; the copy's own are subtracted."""
    instructions, saturating = counts[f"{approximate} {terms}"]
    copying, none = counts["none None"]
    assert none == 0
    assert saturating == ELEMENTS_A_THREAD
    assert (instructions - copying) // ELEMENTS_A_THREAD == terms + 2


if __name__ == "__main__":
    compile_here()

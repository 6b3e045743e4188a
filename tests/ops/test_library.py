"""Where PyTorch makes a product of the channel half: results, gradients, launches."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from draws import forward_case, forward_repeats, generated, gradient_repeats
from support import (
    SCALES,
    Case,
    assert_parity,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    leaves,
    run_case,
    run_gradients,
    with_library,
)
from torch import Tensor

from fastmixer.aot import catalogue
from fastmixer.configs import TARGETS, Library, TileConfig
from fastmixer.ops import channel_mixing, launch
from fastmixer.ops.layer_norm import dense
from fastmixer.ops.layouts import Kept
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import MixingParams

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
TILES = TileConfig(32, 32, 32)  # deeper than what rows are padded to
FC1, FC2 = {"channel_fc1": Library.ATEN}, {"channel_fc2": Library.ATEN}
PRODUCTS = {"fc1": FC1, "fc2": FC2, "both": FC1 | FC2}


def context_with(choices: dict[str, Library], case: Case, device: torch.device = CPU) -> launch.Context:
    return with_library(context_of(case, device), choices)


# ---- parity ----------------------------------------------------------------------------------------------

ODD = Case(3, 21, 37, 19, 35, BF16, tiles=TILES)
AUTOCAST = {"x_dtype": FP32, "weight_dtype": FP32}
NAMED = {
    "bf16": Case(2, 49, 128, 48, 256, BF16, mean=1.0),
    "fp16, tanh": Case(2, 49, 128, 48, 256, FP16, approximate="tanh"),
    "bf16, tanh, odd": dataclasses.replace(ODD, approximate="tanh", scale="column"),
    "fp32": Case(2, 49, 64, 48, 128, FP32, scale="float", mean=10.0),
    "autocast": dataclasses.replace(ODD, **AUTOCAST, scale="vector"),
    "autocast, fp16": Case(2, 49, 64, 48, 128, FP16, **AUTOCAST, mean=10.0),
    "no biases": dataclasses.replace(ODD, biases=(False,) * 4),
    "transposed": dataclasses.replace(ODD, layout="transposed", dtype=FP16),
    "batch last": dataclasses.replace(ODD, layout="batch last", scale="vector"),
    "channel slice": dataclasses.replace(ODD, layout="channel slice"),
    "strided channels": dataclasses.replace(ODD, layout="strided channels", dtype=FP32),
    "wider than a program": Case(1, 24, 1030, 24, 1100, FP16),
}


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name: str, products: str, device: torch.device) -> None:
    case = dataclasses.replace(NAMED[name], weight_dtype=None)
    part = "block" if products == "both" else "channel"  # after a token half the moments come in blocks
    result = run_case(part, case, device, 2, context=context_with(PRODUCTS[products], case, device))
    assert result.ok, result


@generated(2, 8, 70)
@pytest.mark.parametrize("products", PRODUCTS)
def test_generated_cases(products: str, draw: str, device: torch.device) -> None:
    case = forward_case("channel", draw)
    context = context_with(PRODUCTS[products], case, device)
    result = run_case("channel", case, device, forward_repeats(case), context=context)
    assert result.ok, (case, result)


@pytest.mark.parametrize("scale", SCALES)
def test_every_scale(scale: str, device: torch.device) -> None:
    case = dataclasses.replace(ODD, scale=scale, layout="transposed")
    result = run_case("channel", case, device, 2, context=context_with(FC2, case, device))
    assert result.ok, result


# What a forward leaves to its backward is the pre-activation, or nothing: fc2 is the same to it either way.
GRADIENTS = {
    "bf16": (FC1, {}),
    "fp32": (FC1, {}),
    "autocast": (FC1 | FC2, {}),
    "autocast, fp16": (FC1 | FC2, {"lean": True}),
    "bf16, tanh, odd": (FC1 | FC2, {}),
    "batch last": (FC1, {"lean": True}),
    "strided channels": (FC2, {}),
    "no biases": (FC1 | FC2, {}),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_named_gradients(name: str, device: torch.device) -> None:
    choices, options = GRADIENTS[name]
    case = dataclasses.replace(NAMED[name], **options)
    context = context_with(choices, case, device)
    assert_parity(run_gradients("channel", case, device, gradient_repeats(case), context=context))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "name"), list(enumerate(NAMED)))
def test_gradients_of_blocks(number: int, name: str, device: torch.device) -> None:
    # Products and memory modes in turns: all of them for every case take a quarter of an hour.
    case = dataclasses.replace(NAMED[name], lean=number % 2 == 1)
    context = context_with(list(PRODUCTS.values())[number % len(PRODUCTS)], case, device)
    assert_parity(run_gradients("block", case, device, gradient_repeats(case), context=context))


# ---- what is rounded, kept, launched and allocated -------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_the_pre_activation_is_the_one_that_eager_has(dtype: torch.dtype) -> None:
    """Its bias was added before it was rounded, and the pass that reads it leaves it as it is."""
    case = dataclasses.replace(ODD, dtype=dtype)
    x, halves, g = block_inputs(case)
    channel = halves["channel"]
    for tensor in leaves(x, {"channel": channel}).values():
        tensor.requires_grad_()
    context = context_with(FC1, case)
    out = fused_run(case, context)(x, {"channel": channel})
    kept = out.grad_fn.saved_tensors[4]
    with torch.no_grad():
        n = normalised(x, channel, case, context)
        expected = F.linear(n, channel.fc1_weight, channel.fc1_bias)
    torch.testing.assert_close(kept[:, : case.E], expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    before = kept.clone()
    out.backward(g)
    assert torch.equal(before.nan_to_num(), kept.nan_to_num())


def normalised(x: Tensor, params: MixingParams, case: Case, context: launch.Context) -> Tensor:
    """LN(x) (B * S, C) as the product gets it."""
    call = launch.call_of("channel", x, params, case.dtype, context)
    return dense(call, x, moments=row_moments(x, context)).flatten(0, 1)


def recorded(
    case: Case, choices: dict[str, Library], *, p: bool = False
) -> tuple[list[str], list[launch.Launch]]:
    """The kernels of a channel half on meta tensors, by name and as launches."""
    launches: list[launch.Launch] = []
    base = launch.Context(TARGETS["sm_90"], execute=launches.append)
    x = torch.empty(case.B, case.S, case.C, dtype=case.x_dtype or case.dtype, device="meta")
    params = MixingParams(
        *(t.to("meta") if isinstance(t, Tensor) else t for t in block_inputs(case)[1]["channel"])
    )
    kept = launch.empty_hidden(case.B * case.S, case.E, case.dtype, x.device) if p else None
    y = channel_mixing.forward(x, params, case.dtype, with_library(base, choices), p=kept)
    assert y.shape == x.shape and y.dtype == x.dtype and y.is_contiguous()
    return [item.kernel_name for item in launches], launches


EVEN = Case(2, 16, 32, 8, 64)


@pytest.mark.parametrize(
    "products, kernels",
    [
        ("fc1", ["row_moments", "layer_norm_fwd", "gelu_fwd", "fc2"]),
        ("fc2", ["pack_weights", "row_moments", "fc1", "residual_fwd"]),
        ("both", ["row_moments", "layer_norm_fwd", "gelu_fwd", "residual_fwd"]),
    ],
)
def test_what_is_launched(products: str, kernels: list[str]) -> None:
    """On meta tensors too, where the library's products are but shapes."""
    assert recorded(EVEN, PRODUCTS[products])[0] == kernels


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_catalogue_compiles_the_passes(arch: str) -> None:
    for case in catalogue.CASES[:3]:
        launches = catalogue.record_library(case, TARGETS[arch], 64)
        kernels = launch.kernels()
        assert [item.kernel for item in launches] == [kernels.gelu_fwd, kernels.residual_fwd, kernels.fc1]
        assert launches[2].args["ONES"] == 64
        for item, columns in zip(launches, (case.shape.channel_hidden, case.shape.channels), strict=False):
            tile = item.args["ROWS"] * item.args.get("BLOCK_N", item.args.get("BLOCK_C"))
            assert item.grid[0] * tile >= 64 * case.shape.tokens * columns


def test_passes_are_in_place_where_nothing_is_kept() -> None:
    """What is kept for the backward is not overwritten, nor is a branch narrower than the residual."""
    *_, gelu, residual = recorded(EVEN, FC1 | FC2)[1]
    assert gelu.args["hidden_ptr"] is gelu.args["p_ptr"] and residual.args["y_ptr"] is residual.args["o_ptr"]
    *_, gelu, residual = recorded(dataclasses.replace(EVEN, x_dtype=FP32), FC1 | FC2, p=True)[1]
    assert gelu.args["hidden_ptr"] is not gelu.args["p_ptr"]
    assert residual.args["y_ptr"].dtype == FP32 and residual.args["o_ptr"].dtype == BF16


def test_packed_weights_are_those_of_the_backward() -> None:
    """Under autocast: one cast a weight, where it is kept, for the forward and the backward alike."""
    case = dataclasses.replace(EVEN, **AUTOCAST, lean=True)
    x, halves, g = block_inputs(case)
    packed: list[str] = []

    def execute(item: launch.Launch) -> None:
        if item.kernel is launch.kernels().pack_weights:
            packed.extend(["packed"] * len(item.args["layers"]))
        launch.execute(item)

    context = dataclasses.replace(context_with(FC1 | FC2, case), execute=execute, kept=Kept())
    for _ in range(2):
        gradients(fused_run(case, context), x, {"channel": halves["channel"]}, g)
    assert len(packed) == 2


def test_the_hidden_beyond_int32() -> None:
    """The rows of p and g may start beyond 2**31 elements."""
    stride = 2**30 + 16
    p = torch.empty(2 * stride + 16, dtype=FP16).as_strided((3, 16), (stride, 1))
    p.copy_(torch.randn(3, 16))
    expected = F.gelu(p.double())
    context = context_of(EVEN, CPU)
    x, halves, _ = block_inputs(EVEN)
    call = launch.call_of("channel", x, halves["channel"], FP16, context)
    launch.run(
        context, launch.kernels().gelu_fwd, 1, p_ptr=p, hidden_ptr=p, M=3, N=16,
        stride_pm=stride, stride_hm=stride,
        **call.activation_constants(), ROWS=4, BLOCK_N=16,
    )  # fmt: skip
    rounding = expected.abs() * torch.finfo(FP16).eps / 2 + 6.1e-5  # GELU's own error: kernels/activations.py
    assert ((p.double() - expected).abs() <= rounding).all()


@pytest.mark.parametrize("strides", [(2**30 + 8, 24, 1), (1, 2**28 + 8, 8), (8, 24, 2**30 // 8 + 8)])
def test_x_beyond_int32(strides: tuple[int, ...]) -> None:
    case = Case(3, 17, 20, 16, 24, FP16, scale="vector")
    x, halves, _ = block_inputs(case)
    extent = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True)) + 1
    far = torch.empty(extent, dtype=case.dtype).as_strided(x.shape, strides).copy_(x)
    context = context_with(FC1 | FC2, case)
    near, away = (channel_mixing.forward(t, halves["channel"], FP16, context) for t in (x.contiguous(), far))
    assert extent > 2**31 and torch.equal(near, away)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_where_eager_puts_it(value: float, device: torch.device) -> None:
    case = Case(3, 20, 24, 33, 40, FP16)
    context = context_with(FC1 | FC2, case, device)
    result = run_case("channel", case, device, context=context, bad_element=value)
    assert result.ok, result

"""PyTorch's products that do more than multiply: GELU in fc1's epilogue, the residual as fc2's addend."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from draws import forward_case, forward_repeats, generated, gradient_repeats
from support import (
    Case,
    assert_parity,
    block_inputs,
    context_of,
    fused_run,
    leaves,
    moved,
    poisoned,
    run_case,
    run_gradients,
    with_library,
)
from torch import Tensor, nn
from torch.profiler import profile

import fastmixer
from fastmixer import functional, parity, reference
from fastmixer.configs import Library, TileConfig
from fastmixer.ops import autograd, channel_mixing, launch, mixing, packing, plan, plan_recording
from fastmixer.ops.launch import Context

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
TILES = TileConfig(32, 32, 32)
ATEN, GELU, ADDMM = Library.ATEN, Library.ATEN_GELU, Library.ADDMM
PRODUCTS: dict[str, dict[str, Library]] = {
    "gelu": {"channel_fc1": GELU},
    "addmm": {"channel_fc2": ADDMM},
    "gelu, addmm": {"channel_fc1": GELU, "channel_fc2": ADDMM},
    "aten, addmm": {"channel_fc1": ATEN, "channel_fc2": ADDMM},
    "gelu, aten": {"channel_fc1": GELU, "channel_fc2": ATEN},
}


def context_with(products: str, case: Case, device: torch.device = CPU) -> Context:
    return with_library(context_of(case, device), PRODUCTS[products])


def watched(context: Context) -> tuple[Context, list[tuple]]:
    """The context, and what PyTorch computes in it, in order: function, arguments, outputs."""
    calls: list[tuple] = []

    def call(function: Callable, *args: object, **outputs: Tensor) -> None:
        calls.append((function.__name__, args, outputs))
        function(*args, **outputs)

    return dataclasses.replace(context, call=call), calls


def calls_of(products: str, case: Case, *, trains: bool = False) -> list[str]:
    """The names of what PyTorch computes in a block's forward, casts aside."""
    x, halves, _ = block_inputs(case)
    for tensor in leaves(x, halves).values():
        tensor.requires_grad_(trains)
    context, calls = watched(context_with(products, case))
    autograd.mix(x, halves, case.dtype, context, lean=case.lean)
    return [name for name, *_ in calls if name != "copy_"]


# ---- parity ----------------------------------------------------------------------------------------------

ODD = Case(3, 21, 37, 19, 35, BF16, approximate="tanh", tiles=TILES)
EVEN = Case(2, 20, 48, 24, 64, BF16, approximate="tanh")
AUTOCAST = {"x_dtype": FP32, "weight_dtype": FP32}
NAMED = {
    "even": EVEN,
    "fp16": dataclasses.replace(EVEN, dtype=FP16, mean=10.0),
    "odd": ODD,
    "odd, fp16, small x": dataclasses.replace(ODD, dtype=FP16, std=0.1),
    "a row of ones ends a cache line": dataclasses.replace(ODD, E=62),
    "the padding is more than a cache line": dataclasses.replace(ODD, E=127),
    "no biases": dataclasses.replace(ODD, biases=(False,) * 4),
    "fc1's bias alone": dataclasses.replace(EVEN, biases=(True, True, True, False)),
    "fc2's bias alone": dataclasses.replace(ODD, biases=(True, True, False, True)),
    "erf": dataclasses.replace(ODD, approximate="none"),
    "fp32": dataclasses.replace(ODD, dtype=FP32),
    "fp32, no biases": dataclasses.replace(EVEN, dtype=FP32, biases=(False,) * 4),
    "autocast": dataclasses.replace(ODD, **AUTOCAST),
    "scale": dataclasses.replace(ODD, scale="vector"),
    "transposed": dataclasses.replace(ODD, layout="transposed"),
    "strided channels": dataclasses.replace(EVEN, layout="strided channels", dtype=FP16),
    "expanded": dataclasses.replace(EVEN, layout="expanded"),
    "two passes": dataclasses.replace(ODD, one_pass=False),
}


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name: str, products: str, device: torch.device) -> None:
    """Of a block, whose channel half may overwrite what the token half made; autocast's weights are cast."""
    case = dataclasses.replace(NAMED[name], weight_dtype=None)
    result = run_case("block", case, device, 3, context=context_with(products, case, device))
    assert result.ok, result


@generated(1, 8, 70)
@pytest.mark.parametrize("products", ["addmm", "gelu, addmm"])
def test_generated_cases(products: str, draw: str, device: torch.device) -> None:
    case = forward_case("block", draw)
    context = context_with(products, case, device)
    result = run_case("block", case, device, forward_repeats(case), context=context)
    assert result.ok, (case, result)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("name", ["even", "odd", "no biases", "transposed", "strided channels"])
def test_a_channel_half_by_itself(name: str, products: str, device: torch.device) -> None:
    """Its x is the user's: not a bit of it changes."""
    case = NAMED[name]
    context = context_with(products, case, device)
    result = run_case("channel", case, device, 3, context=context)
    assert result.ok, result
    x, halves, _ = block_inputs(case)
    x, channel = x.to(device), moved(halves["channel"], device)
    before = x.clone()
    y = autograd.mix(x, {"channel": channel}, case.dtype, context)
    assert torch.equal(x, before) and y.is_contiguous()


# With p kept, fc1 leaves its epilogue to a pass; lean, it does not.
@pytest.mark.parametrize(
    "name, products, lean",
    [
        ("even", "gelu, addmm", False),
        ("even", "gelu, addmm", True),
        ("odd", "gelu", True),
        ("odd", "addmm", False),
        ("odd, fp16, small x", "aten, addmm", False),
        ("no biases", "gelu, addmm", False),
        ("autocast", "gelu, addmm", True),
    ],
)
def test_gradients(name: str, products: str, lean: bool, device: torch.device) -> None:
    case = dataclasses.replace(NAMED[name], lean=lean)
    context = context_with(products, case, device)
    assert_parity(run_gradients("block", case, device, gradient_repeats(case), context=context))


# ---- where each serves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, changes, called",
    [
        ("gelu", {}, ["_gelu_product"]),
        ("gelu", {"approximate": "none"}, ["addmm"]),
        ("gelu", {"dtype": FP32}, ["addmm"]),
        ("gelu", {"biases": (True, True, False, True)}, ["zero_", "_gelu_product"]),
        ("addmm", {}, ["addmm_"]),
        ("addmm", {"approximate": "none"}, ["addmm_"]),
        ("addmm", {"dtype": FP32}, ["addmm_"]),
        ("addmm", {"scale": "vector"}, ["addmm"]),
        ("addmm", {"x_dtype": FP32}, ["addmm"]),
        ("gelu, addmm", {}, ["_gelu_product", "fill_", "addmm_"]),
        ("gelu, addmm", {"biases": (False,) * 4}, ["zero_", "_gelu_product", "addmm_"]),
        ("aten, addmm", {}, ["addmm", "fill_", "addmm_"]),
    ],
)
def test_what_pytorch_computes(name: str, changes: dict, called: list[str]) -> None:
    """Where a choice does not serve it is ATEN."""
    assert calls_of(name, dataclasses.replace(EVEN, **changes)) == called


def test_an_epilogue_cannot_keep_the_pre_activation() -> None:
    assert "_gelu_product" not in calls_of("gelu", EVEN, trains=True)
    assert "_gelu_product" in calls_of("gelu", dataclasses.replace(EVEN, lean=True), trains=True)


def test_the_epilogue_writes_whole_tensors() -> None:
    """cuBLASLt's takes no others: PyTorch would round, and apply GELU in a pass."""
    for case in (EVEN, ODD, dataclasses.replace(ODD, biases=(False,) * 4)):
        x, halves, _ = block_inputs(case)
        context, calls = watched(context_with("gelu, addmm", case))
        channel_mixing.forward(x, halves["channel"], case.dtype, context)
        outputs = [out for _, _, given in calls for out in given.values()]
        assert outputs and all(out.is_contiguous() for out in outputs)


def test_tf32_would_round_the_bias() -> None:
    case = dataclasses.replace(EVEN, dtype=FP32)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert calls_of("addmm", case) == ["addmm"]
        assert calls_of("addmm", dataclasses.replace(case, biases=(False,) * 4)) == ["addmm_"]
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


# ---- the bias in the padding -----------------------------------------------------------------------------


@pytest.mark.parametrize("products", ["addmm", "gelu, addmm", "aten, addmm"])
@pytest.mark.parametrize("case", [EVEN, dataclasses.replace(ODD, dtype=FP16)], ids=["bf16", "fp16"])
def test_a_large_bias_keeps_its_digits(case: Case, products: str) -> None:
    """Of fp32 beside products in 16 bits, as autocast has it, where x takes most of it away again.

    The fused kernel, which adds it in fp32, is the yardstick: eager rounds it.
    """
    found = []
    for seed in range(3):
        x, halves, _ = block_inputs(dataclasses.replace(case, seed=seed))
        x, bias = x - 1000, 1000 + torch.rand(case.C, generator=torch.Generator().manual_seed(seed))
        given = halves["channel"]._replace(fc2_bias=bias)
        contexts = context_with(products, case), context_of(case, CPU)
        own, kernel = (channel_mixing.forward(x, given, case.dtype, context) for context in contexts)
        found.append(
            (own, kernel, reference.channel_mixing(x.double(), **moved(given, torch.float64)._asdict()))
        )
    result = parity.compare(*(torch.stack(tensors) for tensors in zip(*found, strict=True)), FP32)
    assert result.ok, result


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("products", ["addmm", "gelu, addmm"])
def test_what_is_not_finite_in_a_bias_stays_in_its_column(products: str, value: float) -> None:
    x, halves, _ = block_inputs(ODD)
    halves["channel"].fc2_bias[5] = value
    with torch.no_grad(), poisoned():
        y = fused_run(ODD, context_with(products, ODD))(x, halves)
        expected = reference.mixer_block(x, **halves)
    bad = ~y.isfinite()
    assert bad[..., 5].all() and bad.sum() == bad[..., 5].sum()
    assert torch.equal(y[..., 5].nan_to_num(1.5), expected[..., 5].nan_to_num(1.5))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_in_a_row_stays_in_it(value: float, device: torch.device) -> None:
    for products in PRODUCTS:
        context = context_with(products, ODD, device)
        result = run_case("channel", ODD, device, 2, context=context, bad_element=value)
        assert result.ok, (products, result)


@pytest.mark.parametrize("products", ["addmm", "gelu, addmm", "aten, addmm"])
def test_the_padding_of_the_hidden_is_ones_then_zeros(products: str) -> None:
    x, halves, _ = block_inputs(ODD)
    for p in (None, launch.empty_hidden(ODD.B * ODD.S, ODD.E, BF16, CPU)):
        context, calls = watched(context_with(products, ODD))
        with poisoned():
            channel_mixing.forward(x, halves["channel"], BF16, context, p=p)
        padding = calls[-1][1][1][:, ODD.E :]  # addmm_(y, hidden, weight)
        assert padding.shape[1] == 64 - ODD.E and (padding[:, :2] == 1).all() and (padding[:, 2:] == 0).all()


# ---- in place --------------------------------------------------------------------------------------------


def plan_of(context: Context, case: Case, needs: tuple[bool, ...] = (), *, lean: bool = False) -> tuple:
    """The plan of a block's forward, and the tensors that it takes."""
    x, halves, _ = block_inputs(case)
    tensors = mixing.tensors_of(x, halves)
    settings = mixing.settings_of(halves, case.dtype, needs, lean=lean)
    function = functools.partial(mixing.forward, settings)
    return plan_recording.record(function, context, plan.seen(tensors)), tensors


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything in a plan is allocated by itself."""
    monkeypatch.setattr(plan_recording, "LARGE", 0)


def of_xs_size(made: plan.Plan, x: Tensor) -> int:
    """How often a plan allocates what x takes."""
    steps = [step for step in made.steps if isinstance(step, plan.Allocation)]
    return sum(math.prod(step.shape) * step.dtype.itemsize == x.nbytes for step in steps)


@pytest.mark.usefixtures("apart")
def test_in_place_allocates_and_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The result is what the token half made. In a profile of all that PyTorch does in the plan as well."""
    case = Case(2, 196, 512, 24, 64, BF16, approximate="tanh")
    made, tensors = plan_of(context_with("addmm", case), case)
    assert of_xs_size(made, tensors[0]) == 1
    assert of_xs_size(plan_of(context_of(case, CPU), case)[0], tensors[0]) == 2, "with the kernel"
    monkeypatch.setattr(launch, "execute", lambda item: None)  # the interpreter copies what it takes
    with profile(profile_memory=True, acc_events=True) as profiled:
        made(*tensors)
    size = tensors[0].nbytes
    events = profiled.events()
    assert "aten::addmm_" in {event.name for event in events}
    assert not {"aten::copy_", "aten::clone"} & {event.name for event in events}
    large = [event for event in events if event.cpu_memory_usage >= size]
    assert [event.name for event in large] == ["aten::empty_strided"], "the token half's output"


@pytest.mark.usefixtures("apart")
def test_what_autograd_keeps_is_not_overwritten() -> None:
    """What the token half made is saved as it was, without a plan and with one."""
    for lean in (False, True):
        case = dataclasses.replace(EVEN, lean=lean)
        x, halves, g = block_inputs(case)
        for tensor in leaves(x, halves).values():
            tensor.requires_grad_()
        y = fused_run(case, context_with("addmm", case))(x, halves)
        mid = y.grad_fn.saved_tensors[2]
        token = fused_run(case, context_of(case, CPU))(x, {"token": halves["token"]})
        assert mid.data_ptr() != y.data_ptr() and torch.equal(mid, token)
        before = mid.clone()
        y.backward(g)
        assert torch.equal(mid, before)
        made, tensors = plan_of(context_with("addmm", case), case, (True,) * 13, lean=lean)
        assert of_xs_size(made, x) == 2 and torch.equal(made(*tensors)[2], token)


@pytest.mark.usefixtures("apart")
def test_in_place_where_training_keeps_no_input_of_the_channel_half() -> None:
    """With fc2's weight alone in training and p kept, nobody reads mid."""
    needs = (False,) * 11 + (True, False)
    made, tensors = plan_of(context_with("addmm", EVEN), EVEN, needs)
    assert of_xs_size(made, tensors[0]) == 1 and made(*tensors)[2] is None
    x, halves, g = block_inputs(EVEN)
    weight = halves["channel"].fc2_weight.requires_grad_()
    found, expected = (
        torch.autograd.grad(fused_run(EVEN, context)(x, halves), weight, g)[0]
        for context in (context_with("addmm", EVEN), context_of(EVEN, CPU))
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("case", [EVEN, ODD], ids=["even", "odd"])
def test_a_plan_gives_the_same_bits(products: str, case: Case) -> None:
    made, tensors = plan_of(context_with(products, case), case)
    x, halves, _ = block_inputs(case)
    with torch.no_grad():
        once = fused_run(case, context_with(products, case))(x, halves)
        assert all(torch.equal(made.first(*tensors), once) for _ in range(2))


# ---- through the public functions ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 1.0])
@pytest.mark.parametrize("products", PRODUCTS)
def test_a_frozen_block_gives_the_same_bits(products: str, scale: float | None, choose: Callable) -> None:
    """A residual scale of 1 is none, also where layers are packed to be kept."""
    choose(PRODUCTS[products])
    x, halves, _ = block_inputs(EVEN)
    channel = halves["channel"]._replace(residual_scale=scale)
    kept = packing.Kept()
    with torch.no_grad():
        expected = functional.mixer_block(x, halves["token"], channel)
        for _ in range(2):
            assert torch.equal(functional.mixer_block(x, halves["token"], channel, kept=kept), expected)


def test_freeze_keeps_the_bias_in_the_padding(choose: Callable) -> None:
    launched = choose(PRODUCTS["gelu, addmm"])
    torch.manual_seed(0)
    gelu = functools.partial(nn.GELU, approximate="tanh")
    block = fastmixer.MixerBlock(48, 20, act_layer=gelu).to(BF16).eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 20, 48).to(BF16)
    with torch.no_grad():
        expected = block(x)
        assert launched[0] == "pack_weights"
        assert fastmixer.freeze(block) == 1 and fastmixer.stale(block) == []
        launched.clear()
        assert torch.equal(block(x), expected) and torch.equal(block(x), expected)
        assert launched == 2 * ["row_moments", "token_mixing", "layer_norm_fwd"]
        block.get_submodule("mlp_channels.fc2").bias.data += 1
        assert fastmixer.stale(block) == ["(model)"]


def test_a_trace_finds_the_same(choose: Callable) -> None:
    choose(PRODUCTS["addmm"])
    x, halves, _ = block_inputs(EVEN)
    settings = mixing.settings_of(halves, BF16, ())
    tensors = mixing.tensors_of(x, halves)
    with torch.no_grad():
        y = torch.ops.fastmixer.mixing(x, *settings.arguments(tensors[1:]))
        assert torch.equal(y, functional.mixer_block(x, halves["token"], halves["channel"]))


def test_the_token_half_by_pytorch_leaves_x_alone(choose: Callable) -> None:
    """Each half is a call of its own then."""
    choose(PRODUCTS["addmm"] | {"token_half": Library.REFERENCE})
    x, halves, _ = block_inputs(EVEN)
    before = x.clone()
    with torch.no_grad():
        y = functional.mixer_block(x, halves["token"], halves["channel"])
        mid = reference.token_mixing(x, **halves["token"]._asdict())
        expected = functional.channel_mixing(mid, **halves["channel"]._asdict())
    assert torch.equal(y, expected) and torch.equal(x, before)

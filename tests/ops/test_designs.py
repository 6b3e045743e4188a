"""The designs of products: parity of each, and what each needs of its operands."""

from __future__ import annotations

import dataclasses
import operator

import pytest
import torch
from draws import SMALL_STD, gradient_repeats
from support import (
    Case,
    assert_parity,
    block_inputs,
    context_of,
    run_case,
    run_gradients,
    with_library,
    with_sms,
)

import fastmixer
from fastmixer import configs
from fastmixer.configs import Choice, Library, Problem, Target, TileConfig
from fastmixer.configs.designs import DESIGNS, Design
from fastmixer.ops import channel_mixing, launch, mlp
from fastmixer.ops.launch import Descriptor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = ("channel_fc1", "channel_fc2", "channel_mlp_hidden_bwd", "channel_mlp_hidden_bwd_recompute")
TILED = {
    design.name: design.runs
    for op in OPS
    for design in DESIGNS[op]
    if isinstance(design.runs, TileConfig) and 90 in design.archs
}
# Designs of the forward, which are of the backward by the same name; and of both memory modes.
FORWARD = [design.name for design in DESIGNS["channel_fc1"] if design.name in TILED and 90 in design.archs]


def context_with(
    tiles: TileConfig, case: Case, device: torch.device, sms: int = 3, ops: tuple[str, ...] = OPS
) -> launch.Context:
    """The case's context with these tiles for the products of ``ops``; persistent programs are ``sms``."""
    context = context_of(case, device)

    def choose(op: str, problem: Problem, target: Target) -> Choice:
        return tiles if op in ops else context.choose(op, problem, target)

    target = with_sms(sms) if device.type == "cpu" else context.target
    return dataclasses.replace(context, target=target, choose=choose)


# ---- parity ----------------------------------------------------------------------------------------------

# Rows, columns and depths that end inside of a tile, and one row of tiles more than a group has.
WIDE = Case(2, 70, 128, 24, 320, BF16)
NAMED = {
    "bf16, ragged": Case(3, 49, 72, 24, 280, BF16, std=SMALL_STD, eps=1e-12),
    "fp16, tanh, ragged": Case(3, 49, 72, 24, 280, FP16, approximate="tanh"),
    "far from zero": dataclasses.replace(WIDE, mean=100.0),
    "no biases, drop path": dataclasses.replace(WIDE, biases=(False,) * 4, scale="column"),
    "a scale of samples apart": dataclasses.replace(WIDE, layout="token slice", scale="vector"),
    "columns of a wider x": dataclasses.replace(WIDE, layout="channel slice", dtype=FP16),
    "tokens innermost": dataclasses.replace(WIDE, layout="transposed"),
    "rows that are not aligned": Case(2, 21, 37, 19, 35, BF16),
    "autocast": dataclasses.replace(WIDE, x_dtype=FP32),
    "fp32": Case(2, 21, 40, 24, 72, FP32),
    "one token": Case(4, 1, 128, 5, 64, BF16),
}


@pytest.mark.parametrize("design", FORWARD)
@pytest.mark.parametrize("name", NAMED)
def test_named_cases(name: str, design: str, device: torch.device) -> None:
    case = NAMED[name]
    part = "block" if case.layout == "contiguous" else "channel"  # which reads that layout only by itself
    result = run_case(part, case, device, 2, context=context_with(TILED[design], case, device))
    assert result.ok, result


@pytest.mark.parametrize("design", TILED)
@pytest.mark.parametrize(
    ("name", "lean"),
    [
        ("bf16, ragged", True),
        ("fp16, tanh, ragged", False),
        pytest.param("a scale of samples apart", False, marks=pytest.mark.slow),
        pytest.param("autocast", True, marks=pytest.mark.slow),
    ],
)
def test_named_gradients(name: str, lean: bool, design: str, device: torch.device) -> None:
    """Each for the products of both directions; lean: p is made again."""
    case = dataclasses.replace(NAMED[name], lean=lean)
    context = context_with(TILED[design], case, device)
    assert_parity(run_gradients("channel", case, device, gradient_repeats(case), context=context))


NAME = operator.attrgetter("name")
LONG = {
    # Tiles of the first sample end in the second: 72 channels.
    "bf16, ragged": Case(2, 80, 72, 40, 8, BF16, one_pass=False, scale="vector"),
    "fp16, tanh, whole tiles": Case(1, 150, 256, 24, 8, FP16, approximate="tanh", one_pass=False),
}


@pytest.mark.parametrize(
    "design", [design for design in DESIGNS["token_fc2"] if 90 in design.archs], ids=NAME
)
@pytest.mark.parametrize("name", LONG)
def test_long_sequences(name: str, design: Design, device: torch.device, launches: list) -> None:
    """Of fc2 operands alone are described: x and y are transposed."""
    case = LONG[name]
    context = context_with(design.runs, case, device, ops=("token_fc2",))
    result = run_case("token", case, device, 2, context=context)
    assert result.ok, result
    described = {item.args["DESCRIPTORS"] for item in launches if item.kernel_name == "fc2"}
    assert described == {design.runs.descriptors}


@pytest.mark.parametrize("design", DESIGNS["token_mlp_hidden_bwd_recompute"][:2], ids=NAME)
def test_gradients_of_long_sequences(design: Design, device: torch.device) -> None:
    case = LONG["bf16, ragged"]
    context = context_with(design.runs, case, device, ops=("token_mlp_hidden_bwd_recompute",))
    assert_parity(run_gradients("token", case, device, gradient_repeats(case), context=context))


@pytest.mark.parametrize("design", ["tma_128x256_persistent", "tma_128x128"])
def test_ones_beside_a_described_hidden(design: str, device: torch.device) -> None:
    """fc2's bias goes through a product of PyTorch's with the padding, which descriptors leave alone."""
    case = Case(3, 49, 72, 24, 280, BF16, std=SMALL_STD, eps=1e-12)
    context = with_library(context_with(TILED[design], case, device), {"channel_fc2": Library.ADDMM})
    for part in ("channel", "block"):
        result = run_case(part, case, device, 2, context=context)
        assert result.ok, result
    assert_parity(run_gradients("channel", case, device, gradient_repeats(case), context=context))


def test_persistent_programs_give_the_same_bits(device: torch.device) -> None:
    """However many programs share the tiles: more than tiles, as many, fewer."""
    case = NAMED["bf16, ragged"]
    x, halves, _ = block_inputs(case)
    tiles = TileConfig(32, 32, 32, descriptors=True)
    half = halves["channel"], BF16

    def answer(tiles: TileConfig, sms: int) -> torch.Tensor:
        return channel_mixing.forward(x, *half, context_with(tiles, case, torch.device("cpu"), sms))

    expected = answer(tiles, 1)
    for sms in (1, 2, 7, 1000):
        assert torch.equal(answer(dataclasses.replace(tiles, persistent=True), sms), expected)


# ---- what is launched ------------------------------------------------------------------------------------


def launched(case: Case, tiles: TileConfig, x: torch.Tensor | None = None) -> dict[str, launch.Launch]:
    """The launches of the channel half's products, by kernel."""
    found: dict[str, launch.Launch] = {}
    inputs, halves, _ = block_inputs(case)
    context = context_with(tiles, case, torch.device("cpu"))
    execute = context.execute

    def noted(item: launch.Launch) -> None:
        found[item.kernel_name] = item
        execute(item)

    context = dataclasses.replace(context, execute=noted)
    channel_mixing.forward(inputs if x is None else x, halves["channel"], case.dtype, context)
    return found


def described(item: launch.Launch) -> dict[str, Descriptor]:
    return {name: value for name, value in item.args.items() if isinstance(value, Descriptor)}


TMA = TILED["tma_128x256_persistent"]


@pytest.mark.parametrize("layout", ["contiguous", "channel slice"])
def test_all_of_a_product_is_described(layout: str) -> None:
    items = launched(dataclasses.replace(WIDE, layout=layout), TMA)
    assert set(described(items["fc1"])) == {"x_ptr", "w_ptr", "hidden_ptr"}
    assert set(described(items["fc2"])) == {"hidden_ptr", "w_ptr", "x_ptr", "y_ptr"}
    for item in items.values():
        assert item.args.get("PERSISTENT", False) == item.args.get("DESCRIPTORS", False)
    # 140 rows by 320 columns are 2 by 2 tiles, by 128 columns 2 by 1; there are 3 programs at most
    assert (items["fc1"].grid, items["fc2"].grid) == ((3,), (2,))
    blocks = {name: descriptor.block for name, descriptor in described(items["fc1"]).items()}
    assert blocks == {"x_ptr": (128, 64), "w_ptr": (256, 64), "hidden_ptr": (128, 64)}


@pytest.mark.parametrize(
    ("case", "kernel"),
    [
        (dataclasses.replace(WIDE, layout="transposed"), "fc1"),  # columns are not contiguous
        (dataclasses.replace(WIDE, layout="token slice"), "fc2"),  # rows are not evenly spaced
        (dataclasses.replace(NAMED["one token"], layout="expanded"), "fc1"),  # all rows are one
        (dataclasses.replace(WIDE, x_dtype=FP32), "fc1"),
        (dataclasses.replace(WIDE, x_dtype=FP32), "fc2"),
        (Case(2, 21, 36, 24, 64, BF16), "fc2"),  # rows of 72 bytes
    ],
)
def test_what_cannot_be_described_is_read_by_pointers(case: Case, kernel: str) -> None:
    item = launched(case, TMA)[kernel]
    assert not described(item) and not item.args["DESCRIPTORS"] and not item.args["PERSISTENT"]
    assert (item.args["BLOCK_M"], item.args["BLOCK_N"]) == (128, 256)


@pytest.mark.parametrize(("offset", "expected"), [(8, True), (1, False)])
def test_a_misaligned_tensor_is_not_described(offset: int, expected: bool, launches: list) -> None:
    """Nor in plans, which are recorded on tensors without data."""
    x, halves, _ = block_inputs(WIDE)
    memory = torch.empty(x.numel() + 8, dtype=BF16)
    own = memory[offset : offset + x.numel()].view(x.shape).copy_(x)
    assert own.data_ptr() % 16 == 2 * offset % 16
    with configs.forced(channel_fc1="tma_128x256"), fastmixer.backend("triton"), torch.no_grad():
        results = [
            fastmixer.functional.channel_mixing(given, **halves["channel"]._asdict()) for given in (own, x)
        ]
    fc1, aligned = (item for item in launches if item.kernel_name == "fc1")
    assert bool(described(fc1)) == expected and described(aligned)
    assert torch.equal(*results)


def test_an_epilogue_of_a_large_tile_takes_quarters() -> None:
    parts = {name: mlp._parts(TILED[name], 1) for name in FORWARD}
    assert parts == {name: 1 if name == "tma_128x128" else 4 for name in FORWARD} and len(parts) == 5

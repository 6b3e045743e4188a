"""The token half: its moments, bias and padding, what it computes and in how many launches.

Its parity with the fp64 truth is in ``test_block_parity.py`` and ``test_block_gradients.py``, part "token".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from support import (
    A100,
    Case,
    assert_parity,
    block_inputs,
    context_of,
    fused_run,
    gradients,
    make_half,
    make_x,
    moved,
    run_case,
    run_gradients,
    with_sms,
)

from fastmixer.configs import TARGETS, Choice, Problem, Target, TileConfig, token_pieces
from fastmixer.ops import launch, packing, token_mixing
from fastmixer.ops.row_moments import moments_constants
from fastmixer.params import MixingParams, Needs

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_the_moments_of_the_output_are_those_of_the_rounded_output(arch: str, device: torch.device) -> None:
    """fc1 folds LayerNorm by the statistics of what it reads: the rounded y. On AMD it is not read back."""
    for one_pass in (None, False):
        case = Case(2, 49, 70, 40, 8, BF16, mean=10.0, tiles=TileConfig(32, 16, 16), one_pass=one_pass)
        generator = torch.Generator().manual_seed(1)
        x, token = make_x(case, generator).to(device), moved(make_half(case, "tokens", generator), device)
        context = dataclasses.replace(context_of(case, device), target=TARGETS[arch])
        y, moments = token_mixing.forward(x, token, BF16, context)
        rows = y.double().reshape(-1, case.C)
        for block, columns in enumerate(rows.split(moments_constants(moments, case.C)["COUNT"], dim=1)):
            mean, sum_sq = moments[block].double()
            torch.testing.assert_close(mean, columns.mean(1), rtol=1e-6, atol=1e-6)
            expected = (columns - columns.mean(1, keepdim=True)).square().sum(1)
            torch.testing.assert_close(sum_sq, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_on_amd_x_is_added_behind_the_loop(dtype: torch.dtype, device: torch.device, launches: list) -> None:
    case = Case(2, 49, 70, 40, 8, dtype, scale="vector", mean=10.0, tiles=TileConfig(32, 16, 16))
    context = dataclasses.replace(context_of(case, device), target=TARGETS["gfx942"])
    result = run_case("token", case, device, 3, context=context)
    assert result.ok, result
    assert {item.args["ADDS_TO_X"] for item in launches if item.kernel_name == "token_mixing"} == {False}


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    case = Case(2, 196, 64, 48, 96)
    generator = torch.Generator().manual_seed(2)
    x = make_x(case, generator).to(device)
    token = moved(make_half(case, "tokens", generator), device)
    first, second = (token_mixing.forward(x, token, BF16, context_of(case, device))[0] for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, x)


@pytest.mark.parametrize("tokens", [49, 62, 63, 64])
def test_a_wide_bias_loses_nothing_on_its_way(tokens) -> None:
    """b1 in fp32 beside bf16 products (autocast): what reaches GELU is b1, not b1 rounded to bf16."""
    g = torch.Generator().manual_seed(0)
    D, C = tokens, 16
    bias = 1 + 3 * torch.rand(D, generator=g)
    params = MixingParams(None, None, torch.zeros(D, tokens), bias, torch.eye(tokens, D), None)
    x = torch.zeros(1, tokens, C)
    y, _ = token_mixing.forward(x, params, BF16, context_of(Case(1, tokens, C, D, 8), CPU))
    exact = torch.nn.functional.gelu(bias.double())
    rounded_once = exact * torch.finfo(BF16).eps / 2 + 2.6e-4  # GELU's own error: kernels/activations.py
    assert ((y[0, :, 0].double() - exact).abs() <= rounded_once).all()


@pytest.mark.parametrize(("dtype", "in_padding"), [(BF16, True), (FP16, True), (FP32, False)])
def test_a_bias_lies_in_the_padding_of_16_bits_only(dtype: torch.dtype, in_padding: bool) -> None:
    """TF32 would round it on its way through the product."""
    case = Case(1, 21, 32, 24, 8, dtype)
    launched: list[launch.Launch] = []
    context = dataclasses.replace(context_of(case, CPU), execute=launched.append)
    x, halves, _ = block_inputs(case)
    token_mixing.forward(x, halves["token"], dtype, context)
    assert launched[-1].args["BIAS_IN_PADDING"] == in_padding
    assert (launched[-1].args["b1_ptr"] is None) == in_padding


@pytest.mark.parametrize("one_pass", [None, False])
def test_the_padding_of_a_large_row_stays_zero(one_pass) -> None:
    """The mean of the last row is subtracted in the padding as well: beyond fp16 it would give inf * 0."""
    case = Case(2, 21, 32, 24, 40, FP16, x_dtype=FP32, one_pass=one_pass)
    g = torch.Generator().manual_seed(0)
    x, token = make_x(case, g), make_half(case, "tokens", g)
    x[:, -1] = 1000.0
    y, _ = token_mixing.forward(x, token, FP16, context_of(case, CPU))
    assert y.isfinite().all()


@pytest.fixture
def macs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Multiply-adds of every ``tl.dot`` that the interpreter runs."""
    launch.kernels()
    from triton.runtime.interpreter import InterpreterBuilder

    counted: list[int] = []
    create_dot = InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        counted.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    yield counted


@pytest.mark.parametrize(("tokens", "padded"), [(196, 208), (49, 64), (256, 256), (144, 144), (16, 16)])
def test_token_mixing_pays_for_few_padded_tokens(tokens: int, padded: int, macs: list[int]) -> None:
    case = Case(1, tokens, 64, 32, 8, tiles=TileConfig(32, 16))
    x, halves, _ = block_inputs(case)
    token_mixing.forward(x, halves["token"], case.dtype, context_of(case, x.device))
    assert sum(token_pieces(tokens)) == padded
    assert sum(macs) == 2 * padded * case.C * case.D


# ---- the backward ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [225, 256])
def test_up_to_256_tokens_in_one_piece_as_on_hopper(
    tokens: int, device: torch.device, launches: list
) -> None:
    case = Case(2, tokens, 37, 19, 8, BF16, tiles=TileConfig(32, 32))
    context = dataclasses.replace(context_of(case, device), target=TARGETS["sm_90"])
    assert_parity(run_gradients("token", case, device, context=context))
    pieces = {item.kernel_name: item.args["P0"] for item in launches if "P0" in item.args}
    assert pieces == {"token_mixing": 128, "token_dgrad": 256, "token_wgrad": 256}


@pytest.mark.parametrize(("target", "launches"), [(with_sms(2), 1), (A100, 2)])
def test_both_weights_in_as_many_launches_as_configs_says(target: Target, launches: int) -> None:
    case = Case(2, 101, 37, 19, 35, BF16, tiles=TileConfig(32, 32, 16))
    launched: list[launch.Launch] = []
    context = dataclasses.replace(context_of(case, CPU), target=target, execute=launched.append)
    x, halves, g = block_inputs(case)
    gradients(fused_run(case, context), x, {"token": halves["token"]}, g)
    weights = [item.args for item in launched if "dw1_ptr" in item.args]
    assert len(weights) == launches
    for pointer in ("dw1_ptr", "db1_ptr", "dw2_ptr"):
        assert sum(args[pointer] is not None for args in weights) == 1, pointer


@pytest.mark.parametrize("target", [with_sms(2), A100])
def test_ops_of_one_backward_may_have_blocks_of_different_sizes(target: Target, launches: list) -> None:
    """The weights are packed once for them, and none of them masks a hidden unit."""
    case = Case(2, 101, 37, 40, 35, FP32)
    blocks = {"token_dgrad": 16, "token_wgrad_fc1": 32, "token_wgrad_fc2": 64}
    usual = context_of(case, CPU)

    def choose(op: str, problem: Problem, target: Target) -> Choice:
        return TileConfig(32, blocks[op]) if op in blocks else usual.choose(op, problem, target)

    context = dataclasses.replace(usual, choose=choose, target=target)
    assert_parity(run_gradients("token", case, CPU, 4, context=context))
    used = {item.args["BLOCK_D"] for item in launches if item.kernel_name in ("token_dgrad", "token_wgrad")}
    assert used == ({16, 32} if target != A100 else {16, 32, 64})


def test_weights_packed_for_smaller_blocks_are_refused() -> None:
    """A block that is not whole would be left out, or read beyond the end: nothing masks hidden units."""
    case = Case(1, 21, 32, 48, 8)
    x, halves, _ = block_inputs(case)

    def context(block: int) -> launch.Context:
        return context_of(dataclasses.replace(case, tiles=TileConfig(32, block)), CPU)

    packed = packing.pack_forward(x, {"token": halves["token"]}, BF16, context(16))
    with pytest.raises(AssertionError):
        token_mixing.forward(x, halves["token"], BF16, dataclasses.replace(context(32), packed=packed))


def test_partial_sums_do_not_depend_on_the_run() -> None:
    """How many there are follows from problem and target."""
    x, halves, g = block_inputs(Case(5, 10, 24, 12, 40, BF16))
    half = halves["token"]
    recorded: list[launch.Launch] = []
    for _ in range(2):
        context = launch.Context(TARGETS["sm_90"], execute=recorded.append)
        moments = torch.empty(1, 2, 50, device="meta")
        on_meta = moved(half, torch.device("meta"))
        token_mixing.backward(g.to("meta"), x.to("meta"), moments, on_meta, BF16, context, Needs(*[True] * 7))
    first, second = recorded[: len(recorded) // 2], recorded[len(recorded) // 2 :]
    assert [r.grid for r in first] == [r.grid for r in second]

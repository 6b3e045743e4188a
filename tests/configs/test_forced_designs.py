"""Designs by name: which serve a problem, and what is forced."""

from __future__ import annotations

import pytest
import torch

import fastmixer
from fastmixer import configs
from fastmixer.configs import DEVICES, TARGETS, Library, Problem, TileConfig
from fastmixer.configs import designs as module
from fastmixer.configs.designs import DESIGNS, candidates, name_of
from fastmixer.configs.ops import OPS
from fastmixer.ops import plan, plan_recording

BF16, FP32 = torch.bfloat16, torch.float32
SM_90, H200 = TARGETS["sm_90"], DEVICES["nvidia-h200"].target
PROBLEM = Problem(64, 196, 768, 3072, BF16, BF16)
LONG = Problem(64, 784, 768, 384, BF16, BF16)
TMA = TileConfig(128, 256, 64, num_warps=8, num_stages=3, descriptors=True)


def named(problem: Problem = PROBLEM, arch: str = "sm_90", op: str = "channel_fc1") -> set[str]:
    return set(configs.designs_of(op, problem, TARGETS[arch]))


def test_every_op_has_the_rules_design_first() -> None:
    for op in OPS:
        known = configs.designs_of(op, PROBLEM, SM_90)
        assert next(iter(known.items())) == ("rule", configs.rule(op, PROBLEM, SM_90))


def test_what_serves() -> None:
    tiled = {"pointers_128x256", "pointers_256x128", "tma_128x128", "tma_128x256", "tma_128x256_persistent"}
    everywhere = {"rule", "aten"}
    assert named() - everywhere == named(arch="sm_100") - everywhere == tiled
    assert named(arch="sm_120") - everywhere == {"tma_128x128"}
    for arch in ("sm_80", "sm_86", "sm_89", "gfx942"):
        assert named(arch=arch) == everywhere
    assert named(PROBLEM._replace(x_dtype=FP32)) - everywhere == {"pointers_128x256", "pointers_256x128"}
    assert named(PROBLEM._replace(x_dtype=FP32, dtype=FP32)) == everywhere
    assert named(PROBLEM._replace(channels=772)) == everywhere, "rows of 1,544 bytes"
    assert named(op="token_mixing") == named(LONG, op="token_fc1") == {"rule"}
    long = tiled - {"tma_128x256_persistent"}
    assert named(LONG, op="token_fc2") - {"rule"} == long
    assert named(LONG, op="token_mlp_hidden_bwd_recompute") - {"rule"} == {"tma_64x128", "tma_128x128"}
    assert named(op="token_fc2") == {"rule"}, "rows of 392 bytes"


def test_the_tuner_tries_the_tiles_of_every_design() -> None:
    for op in DESIGNS:
        problem = LONG if op.startswith("token") else PROBLEM
        known = configs.designs_of(op, problem, SM_90).values()
        tiles = [choice for choice in known if isinstance(choice, TileConfig)]
        assert candidates(op, problem, SM_90)[: len(tiles)] == tuple(tiles)


def test_a_choice_has_the_name_of_its_design() -> None:
    assert name_of("channel_fc1", PROBLEM, SM_90, TMA) == "tma_128x256"
    assert name_of("channel_fc2", PROBLEM, SM_90, Library.ATEN) == "aten"
    assert name_of("channel_fc1", PROBLEM, SM_90, TileConfig(16, 16, 16)) == ""


# ---- forced ----------------------------------------------------------------------------------------------


def test_a_forced_design_is_chosen() -> None:
    before = configs.choose("channel_fc1", PROBLEM, SM_90)
    with configs.forced(channel_fc1="tma_128x256"):
        assert configs.choose("channel_fc1", PROBLEM, SM_90) == TMA != before
        with configs.forced(channel_fc2="aten"):
            assert configs.choose("channel_fc1", PROBLEM, SM_90) == TMA
            assert configs.choose("channel_fc2", PROBLEM, SM_90) is Library.ATEN
        assert configs.choose("channel_fc2", PROBLEM, SM_90) == configs.rule("channel_fc2", PROBLEM, SM_90)
        assert configs.select("channel_fc1", PROBLEM, SM_90) == before, "pure: whatever is forced"
    assert configs.choose("channel_fc1", PROBLEM, SM_90) == before


def test_it_goes_before_a_table() -> None:
    table = {("channel_fc1", PROBLEM): Library.ATEN}
    chosen = configs.explained("channel_fc1", PROBLEM, H200, table, (("channel_fc1", "tma_128x256"),))
    assert (chosen.choice, chosen.source) == (TMA, "forced")


@pytest.mark.parametrize("op", ["channel_fc1", "channel_fc2", "channel_mlp_hidden_bwd"])
def test_the_half_of_a_forced_op_is_not_pytorchs(op: str) -> None:
    """Neither by a table nor by the model, which would leave a small fp32 half to it."""
    small = Problem(1, 144, 1280, 3072, FP32, FP32)
    assert configs.select("channel_half_training", small, H200) is Library.REFERENCE
    table = {(half, PROBLEM): Library.REFERENCE for half in ("channel_half", "token_half")}
    forced = ((op, "rule"),)
    assert configs.select("channel_half_training", small, H200, None, forced) is None
    assert configs.select("channel_half", PROBLEM, H200, table, forced) is None
    assert configs.select("token_half", PROBLEM, H200, table, forced) is Library.REFERENCE


def test_a_forced_product_of_pytorchs_runs_where_kernels_are_asked_for() -> None:
    assert isinstance(configs.choose_kernels("channel_fc2", PROBLEM, H200), TileConfig)
    with configs.forced(channel_fc2="addmm"):
        assert configs.choose_kernels("channel_fc2", PROBLEM, H200) is Library.ADDMM


def test_a_plan_of_other_designs_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may force designs while a plan is made."""
    record, block = plan_recording.record, fastmixer.MixerBlock(32, 16, dtype=BF16).eval()

    def meanwhile(*args):
        with configs.forced(channel_fc1="tma_128x256"):
            return record(*args)

    monkeypatch.setattr(plan_recording, "record", meanwhile)
    with fastmixer.backend("triton"), torch.no_grad():
        block(torch.randn(2, 16, 32, dtype=BF16))
        assert plan._plans, "nothing changed behind the record"
        plan.clear()
        monkeypatch.setattr(configs, "edition", iter(range(9)).__next__)
        block(torch.randn(2, 16, 32, dtype=BF16))
    assert not plan._plans


def test_it_ends_with_an_exception() -> None:
    with pytest.raises(ZeroDivisionError), configs.forced(channel_fc1="aten"):
        raise ZeroDivisionError
    assert module.forced_names() == ()


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_forced", None)
    monkeypatch.setenv("FASTMIXER_DESIGN", "channel_fc1=tma_128x256, channel_fc2 = aten")
    assert module.forced_names() == (("channel_fc1", "tma_128x256"), ("channel_fc2", "aten"))
    with configs.forced(channel_fc1="rule"):
        assert module.forced_names() == (("channel_fc1", "rule"), ("channel_fc2", "aten"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fc1=aten", "FASTMIXER_DESIGN: op: expected one of channel_fc1, .*, got 'fc1'"),
        ("channel_fc1", "FASTMIXER_DESIGN: design of channel_fc1: expected one of rule, .*, got ''"),
        ("channel_fc1=tma", "FASTMIXER_DESIGN: design of channel_fc1: expected one of rule, .*, got 'tma'"),
        ("channel_fc1=aten,channel_fc1=rule", "FASTMIXER_DESIGN: expected every op once"),
        ("token_mixing=aten", "FASTMIXER_DESIGN: design of token_mixing: expected one of rule, got 'aten'"),
    ],
)
def test_what_no_design_is_called(text: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_forced", None)
    monkeypatch.setenv("FASTMIXER_DESIGN", text)
    with pytest.raises(ValueError, match=message):
        configs.choose("channel_fc1", PROBLEM, SM_90)


def test_a_design_that_does_not_serve_is_refused_before_any_launch(launches: list) -> None:
    block = fastmixer.MixerBlock(24, 10)  # fp32
    refused = pytest.raises(ValueError, match="the design 'tma_128x256' of channel_fc1 does not serve")
    with configs.forced(channel_fc1="tma_128x256"), fastmixer.backend("triton"), torch.no_grad(), refused:
        block(torch.randn(2, 10, 24))
    assert not launches


def test_plans_of_other_designs_are_others(launches: list) -> None:
    block, x = fastmixer.MixerBlock(32, 16, dtype=BF16).eval(), torch.randn(2, 16, 32, dtype=BF16)

    def described() -> bool:
        launches.clear()
        with torch.no_grad():
            block(x)
        return next(item for item in launches if item.kernel_name == "fc1").args["DESCRIPTORS"]

    with fastmixer.backend("triton"):
        assert not described()
        with configs.forced(channel_fc1="tma_128x256"):
            assert described()
        assert not described()


def test_explain_names_it() -> None:
    model = fastmixer.MixerBlock(768, 196, dtype=BF16)
    with configs.forced(channel_fc1="tma_128x256"):
        (block,) = fastmixer.explain(model, (64, 196, 768), device="nvidia-h200").blocks
    found = {launch.op: (launch.design, launch.source) for launch in block.launches}
    assert found["channel_fc1"] == ("tma_128x256", "forced") and found["channel_fc2"] == ("rule", "rule")
    assert found["row_moments"] == ("", "fixed")

"""``fastmixer.explain``: what would run and why, for a named GPU, without one."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from torch import nn

import fastmixer
from fastmixer import configs, explain_choices
from fastmixer.configs import Library, Problem, TileConfig
from fastmixer.configs.predict import cost

NEWEST = max(configs.resources.recorded(90), key=configs.resources.release)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """The blocks of Mixer-B/16, two of them."""
    blocks = {str(n): fastmixer.MixerBlock(768, 196, device="meta") for n in range(2)}
    return nn.ModuleDict({"blocks": nn.ModuleDict(blocks)})


def test_a_fused_block_is_explained_launch_by_launch(model: nn.Module) -> None:
    found = fastmixer.explain(model, (256, 3, 224, 224), dtype=torch.bfloat16, device="nvidia-h200")
    assert found.gpu == "NVIDIA H200" and len(found.blocks) == 1
    block = found.blocks[0]
    assert block.names == ("blocks.0", "blocks.1") and (block.batch, block.tokens, block.channels) == (
        256,
        196,
        768,
    )
    ops = [launch.op for launch in block.launches]
    assert ops == ["pack_weights", "row_moments", "token_mixing", "channel_fc1", "channel_fc2"]
    for launch in block.launches[2:]:
        hidden = 384 if launch.op.startswith("token") else 3072
        problem = Problem(256, 196, 768, hidden, torch.bfloat16, torch.bfloat16)
        assert launch.choice == configs.select(launch.op, problem, found.target)
        expected = cost.predict_launch(launch.op, problem, launch.choice, found.target)
        assert launch.predicted_ms == pytest.approx(1e3 * expected.seconds) and launch.bound == expected.bound
    assert block.predicted_ms == pytest.approx(sum(launch.predicted_ms for launch in block.launches))
    unknown = replace(block.launches[0], predicted_ms=None)
    assert replace(block, launches=(unknown, *block.launches[1:])).predicted_ms is None


def test_a_frozen_block_does_not_pay_for_packing() -> None:
    made = fastmixer.MixerBlock(24, 10).bfloat16().eval()
    (block,) = fastmixer.explain(made, (64, 10, 24), device="nvidia-h200").blocks
    pack, *rest = block.launches
    assert pack.op == "pack_weights" and pack.predicted_ms > 0
    assert pack.why.startswith("token_fc1, token_fc2, channel_fc1: ")
    with fastmixer.backend("triton"):
        fastmixer.freeze(made)
    (block,) = fastmixer.explain(made, (64, 10, 24), device="nvidia-h200").blocks
    assert [one.op for one in block.launches] == [one.op for one in rest]


def test_the_table_says_what_runs_from_where_and_that_times_are_predicted(model: nn.Module) -> None:
    text = str(fastmixer.explain(model, (64, 3, 224, 224), dtype=torch.bfloat16, device="sm_90"))
    assert text.startswith("on sm_90; times are predicted by the cost model, not measured")
    assert "2 blocks, blocks.0 to blocks.1: batch 64, 196 tokens, 768 channels, hidden 384 and 3072" in text
    assert "predicted ms" in text and "128 x 128 x 64, 4 warps, 3 stages" in text and "rule" in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_a_half_left_to_pytorch_is_named_with_the_reason(model: nn.Module) -> None:
    found = fastmixer.explain(model, (256, 3, 224, 224), device="NVIDIA H200")
    launches = {launch.op: launch for launch in found.blocks[0].launches}
    assert launches["token_half"].choice is Library.REFERENCE
    assert launches["token_half"].source == "cost model" and "shorter than the kernels" in str(found)
    assert launches["channel_fc1"].choice is Library.ATEN and "row_moments" in launches


@pytest.mark.parametrize("shipped", [True, False])
def test_a_table_is_named(model: nn.Module, shipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(64, 196, 768, 3072, torch.bfloat16, torch.bfloat16)
    tuned = TileConfig(64, 64, 64)

    monkeypatch.setattr(configs.tables, "table_of", lambda target: {("channel_fc1", problem): tuned})
    source = "shipped" if shipped else "user"
    monkeypatch.setattr(configs.tables, "source", lambda op, problem, target: source)
    found = fastmixer.explain(model, (50, 3, 224, 224), dtype=torch.bfloat16, device="nvidia-h200")
    launch = next(launch for launch in found.blocks[0].launches if launch.op == "channel_fc1")
    assert launch.choice is tuned and launch.source == ("shipped table" if shipped else "user's cache")


def test_products_of_pytorchs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tanh's GELU. Both weights are packed: fc2's for its bias, fc1's for as wide a hidden."""
    tanh = functools.partial(nn.GELU, approximate="tanh")
    block = fastmixer.MixerBlock(768, 196, act_layer=tanh, dtype=torch.bfloat16)
    problem = Problem(64, 196, 768, 3072, torch.bfloat16, torch.bfloat16)
    table = {
        ("channel_fc1", problem._replace(approximate="tanh")): Library.ATEN_GELU,
        ("channel_fc2", problem): Library.ADDMM,
    }
    monkeypatch.setattr(configs.tables, "table_of", lambda target: table)
    found = str(fastmixer.explain(block, (64, 196, 768), device="nvidia-h200"))
    assert "PyTorch's product with GELU" in found and "PyTorch's product into x" in found
    assert "token_fc2, channel_fc2, channel_fc1:" in found


@pytest.mark.parametrize(
    "running, record, said",
    [
        ("3.6.0+local", "3.6.0", False),
        ("3.9.0", "3.9.0", False),
        ("3.8.0", "3.6.0", True),
        ("99.0", NEWEST, True),
        ("not installed", NEWEST, True),
    ],
)
def test_the_record_of_a_figure_is_named(
    model: nn.Module, running: str, record: str, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that it is of another Triton than the one that runs."""
    monkeypatch.setattr(configs, "target_named", lambda name: replace(configs.TARGETS[name], triton=running))
    found = fastmixer.explain(model, (8, 3, 224, 224), dtype=torch.bfloat16, device="sm_90")
    for launch in found.blocks[0].launches:
        assert launch.record == (record if isinstance(launch.choice, TileConfig) else ""), launch.op
    title, second, *_ = str(found).splitlines()
    expected = f"compiled by Triton {record}: there is no record of the running one ({running})"
    assert second == (expected if said else "")


def test_a_problem_that_was_never_compiled_has_no_record() -> None:
    block = fastmixer.MixerBlock(64, 100)
    found = fastmixer.explain(block, (8, 100, 64), dtype=torch.bfloat16, device="sm_90").blocks[0]
    records = {launch.op: launch.record for launch in found.launches}
    assert records["token_mixing"] == "none" and records["channel_fc1"] not in ("none", "")


def test_blocks_of_one_shape_are_one_table_and_others_another() -> None:
    blocks = nn.Sequential(
        fastmixer.MixerBlock(64, 49), fastmixer.MixerBlock(64, 49), fastmixer.MixerBlock(64, 784)
    )
    found = fastmixer.explain(blocks, (8, 49, 64), device="gfx942")
    assert [block.names for block in found.blocks] == [("0", "1"), ("2",)]
    ops = [launch.op for launch in found.blocks[1].launches]
    assert "token_mixing" not in ops


def test_under_autocast_a_models_convolution_makes_the_activations_narrow_too(model: nn.Module) -> None:
    found = fastmixer.explain(model, (8, 3, 224, 224), device="sm_90", autocast=torch.bfloat16).blocks[0]
    assert (found.x_dtype, found.dtype) == (torch.bfloat16, torch.bfloat16)
    assert fastmixer.explain(model, (8, 3, 224, 224), device="sm_90").blocks[0].x_dtype == torch.float32


def test_cuda_is_the_gpu_that_is_current_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the one that was current when the target of "cuda" was first asked for."""
    gpus = [configs.DEVICES["nvidia-h200"], configs.DEVICES["nvidia-b200"]]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpus[device.index].name)
    monkeypatch.setattr(configs, "target_of", lambda device: gpus[device.index].target)
    block = fastmixer.MixerBlock(64, 49)
    for current, gpu in enumerate(gpus):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        found = fastmixer.explain(block, (8, 49, 64), device="cuda")
        assert (found.gpu, found.target) == (gpu.name, gpu.target)


def test_autocast_means_16_bit_products_on_wide_activations() -> None:
    block = fastmixer.MixerBlock(64, 49)
    found = fastmixer.explain(block, (8, 49, 64), device="sm_90", autocast=torch.bfloat16).blocks[0]
    assert (found.x_dtype, found.dtype) == (torch.float32, torch.bfloat16)
    assert "bfloat16 products, x float32" in explain_choices._title(found)


def test_a_foreign_block_counts_once_it_is_fused() -> None:
    timm = pytest.importorskip("timm.models.mlp_mixer")
    block = timm.MixerBlock(64, 49)
    with pytest.raises(ValueError, match="model: no block of this MixerBlock is fused: see fastmixer.fuse"):
        fastmixer.explain(block, (8, 49, 64), device="sm_90")
    fastmixer.fuse(block)
    assert fastmixer.explain(block, (8, 49, 64), device="sm_90").blocks[0].names == ("(model)",)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module, got int"),
        ({"input_shape": 8}, TypeError, "input_shape must be a sequence of ints, got int"),
        ({"input_shape": (8, 0, 64)}, ValueError, r"input_shape must be .* positive ints.* got \(8, 0, 64\)"),
        ({"input_shape": (8, 50, 64)}, ValueError, r"input_shape must be \(B, 49, 64\).* got \(8, 50, 64\)"),
        ({"dtype": "bf16"}, TypeError, "dtype must be a torch.dtype or None, got str"),
        (
            {"dtype": torch.float64},
            ValueError,
            "dtype: expected float16, .* got torch.float64",
        ),
        ({"device": "voodoo-2"}, ValueError, "device: expected one of sm_80.* got 'voodoo-2'"),
        (
            {"device": "cpu"},
            ValueError,
            "device: expected a GPU that is there, .* got 'cpu'",
        ),
        ({"device": 90}, TypeError, "device must be a name or a torch.device, got int"),
        ({"model": nn.Linear(2, 2)}, ValueError, "model: no block of this Linear is fused"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_name_the_argument(change: dict, error: type, message: str) -> None:
    block = fastmixer.MixerBlock(64, 49)
    arguments = {"model": block, "input_shape": (8, 49, 64), "device": "sm_90"} | change
    with pytest.raises(error, match=message):
        fastmixer.explain(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_one_has_to_be_named() -> None:
    with pytest.raises(ValueError, match="device: the model is not on a GPU and there is none"):
        fastmixer.explain(fastmixer.MixerBlock(64, 49), (8, 49, 64))

"""The cost model: arithmetic that can be checked by hand, and what must hold for any GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmixer.aot.catalogue import MODEL_BLOCKS
from fastmixer.configs import (
    DEVICES,
    INTERPRETER,
    TARGETS,
    Library,
    Problem,
    Target,
    TileConfig,
    device_data,
    resources,
    target_named,
)
from fastmixer.configs.choice import select
from fastmixer.configs.models import BlockShape
from fastmixer.configs.ops import TRAINING, matrix_sizes
from fastmixer.configs.predict import cost
from fastmixer.configs.predict.kernels import LAUNCH, work_of
from fastmixer.configs.resources import MULTIPROCESSORS, Resources
from fastmixer.configs.targets import slug
from fastmixer.configs.tiles import wgrad_splits

ROOT = Path(__file__).parents[2]
BF16, FP32 = torch.bfloat16, torch.float32
H200 = DEVICES["nvidia-h200"]
SMALL = Resources(64, 1024, 0, 0, 0, 400, 100, 1, 64, True, False)
B16_TOKEN = Problem(64, 196, 768, 384, BF16, BF16)
B16_CHANNEL = B16_TOKEN._replace(hidden=3072)


# --- The devices.


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_devices_data_agree_with_its_data_sheet(device) -> None:
    """TFLOP/s of the data sheet, dense, 16-bit inputs and fp32 accumulation."""
    sheet = {
        "nvidia-a100-sxm4-80gb": 312,
        "nvidia-a100-sxm4-40gb": 312,
        "nvidia-geforce-rtx-3090": 71,
        "nvidia-geforce-rtx-4090": 165.2,
        "nvidia-geforce-rtx-5090": 209.5,
        "nvidia-h100-80gb-hbm3": 989.4,
        "nvidia-h100-pcie": 756,
        "nvidia-h200": 989.4,
        "nvidia-b200": 2250,
        "amd-instinct-mi300x": 1307.4,
    }[device.slug]
    assert device.tensor * device.clock * device.target.multiprocessors / 1e3 == pytest.approx(
        sheet, rel=0.005
    )
    assert device.source
    assert device.memory_bandwidth < device.l2_bandwidth
    assert device.target.name == device.slug and device.target.arch in MULTIPROCESSORS


def test_every_device_of_the_issue_and_every_arch_is_there() -> None:
    wanted = ("a100", "3090", "4090", "5090", "h100", "h200", "b200", "mi300x")
    assert all(any(name in key for key in DEVICES) for name in wanted)
    assert {device.target.arch for device in DEVICES.values()} == {t.arch for t in TARGETS.values()}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("AMD Instinct™ MI300X", "amd-instinct-mi300x"),
        ("—", "unknown"),
    ],
)
def test_slug(name: str, expected: str) -> None:
    assert slug(name) == expected


def test_a_gpu_that_is_not_in_the_table_has_its_archs_data() -> None:
    half = Target("cuda", 90, 66, 227 * 1024, "nvidia-h20-of-some-kind")
    like = DEVICES["nvidia-h100-80gb-hbm3"]
    found = device_data(half)
    assert found.target == half and found.clock == like.clock
    assert found.memory_bandwidth == like.memory_bandwidth / 2
    assert device_data(TARGETS["sm_90"]).memory_bandwidth == like.memory_bandwidth
    nvl = replace(H200.target, name="nvidia-h200-nvl")
    assert device_data(nvl).memory_bandwidth == H200.memory_bandwidth
    card = DEVICES["nvidia-geforce-rtx-4090"]
    laptop = replace(
        card.target, name=f"{card.slug}-laptop-gpu", multiprocessors=card.target.multiprocessors // 2
    )
    found = device_data(laptop)
    assert found.target == laptop and found.memory_bandwidth == card.memory_bandwidth / 2
    assert (found.l2, found.l2_bandwidth) == (card.l2 // 2, card.l2_bandwidth / 2)
    fewer = replace(H200.target, multiprocessors=100)
    assert device_data(fewer).target == fewer
    assert device_data(INTERPRETER) is None
    assert device_data(Target("cuda", 75, 40, 64 * 1024)) is None


def test_target_named() -> None:
    assert target_named("sm_90") == TARGETS["sm_90"] and target_named("NVIDIA H200") == H200.target
    with pytest.raises(ValueError, match=r"device: expected one of sm_80.*nvidia-h200.*, got 'voodoo-2'"):
        target_named("voodoo-2")
    with pytest.raises(TypeError, match="device must be a name or a torch.device, got int"):
        target_named(90)


# --- The work.


def test_the_work_of_a_product_by_hand() -> None:
    work = work_of("channel_fc1", B16_CHANNEL, TileConfig(128, 128, 64), TARGETS["sm_90"])
    assert work.programs == 64 * 196 // 128 * 24 and work.steps == 12
    assert work.flops == 2 * 128 * 128 * 768
    assert work.programs * work.flops == 2 * 64 * 196 * 768 * 3072
    assert work.l2_bytes == 2 * 768 * (128 + 128) + 2 * 128 * 128
    assert work.hbm_bytes == 2 * (64 * 196 * 768 + 768 * 3072 + 64 * 196 * 3072)


def test_the_work_of_token_mixing_counts_its_padding() -> None:
    work = work_of("token_mixing", B16_TOKEN, TileConfig(64, 32), TARGETS["sm_90"])
    assert work.programs == 64 * 12 and work.steps == 12
    assert work.programs * work.flops == 2 * 2 * 64 * 768 * 208 * 384  # 208 of 196 tokens
    three = work_of("token_dgrad", B16_TOKEN, TileConfig(64, 32), TARGETS["sm_90"])
    assert 2 * three.flops == 3 * work.flops


def test_weight_gradients_fill_two_waves() -> None:
    target = TARGETS["sm_90"]
    work = work_of("token_wgrad_fc1", B16_TOKEN, TileConfig(32, 64), target)
    assert work.programs <= 2 * target.multiprocessors < work.programs + 384 // 64
    pairs, blocks = 64 * 768 // 32, 384 // 64
    assert work.steps * (work.programs // blocks) >= pairs


@pytest.mark.parametrize("blocks_d", [1, 6, 264, 2640])
def test_shares_have_all_pairs_and_none_is_empty(blocks_d: int) -> None:
    """token_wgrad counts on it: of an empty share its first step would be wrong."""
    target, tiles = TARGETS["sm_90"], TileConfig(32, 64)
    for batch in (1, 2, 3, 7, 11, 64, 1000):
        pairs = batch * 768 // 32
        splits, share = wgrad_splits(B16_TOKEN._replace(batch=batch), tiles, blocks_d, target)
        assert (splits - 1) * share < pairs <= splits * share
        assert splits == 1 or splits * blocks_d <= 2 * target.multiprocessors
        # Not fewer programs than two on a multiprocessor, but for pairs that do not divide.
        assert share == 1 or splits * blocks_d * share / (share - 1) >= 2 * target.multiprocessors - blocks_d


def test_rows_of_two_pass_token_mixing_are_channels() -> None:
    problem = Problem(2, 784, 768, 384, BF16, BF16)
    assert matrix_sizes("token_fc1", problem) == (2, 768, 384, 784)
    assert matrix_sizes("channel_fc2", problem) == (2, 784, 768, 384)
    with pytest.raises(ValueError, match="op: expected one of .* got 'layer_norm_fwd'"):
        work_of("layer_norm_fwd", problem, TileConfig(1, 1024), TARGETS["sm_90"])


# --- Predictions.


def test_a_prediction_is_bounded_from_below_by_its_floors() -> None:
    for op, problem in (("token_mixing", B16_TOKEN), ("channel_fc1", B16_CHANNEL)):
        tiles = TileConfig(64, 32) if op == "token_mixing" else TileConfig(128, 128, 64)
        found = cost.predict(op, problem, tiles, H200, SMALL)
        peak = H200.tensor * H200.clock * 1e9 * H200.target.multiprocessors
        work = work_of(op, problem, tiles, H200.target)
        assert found.seconds > work.programs * work.flops / peak + LAUNCH
        assert found.seconds > work.hbm_bytes / H200.memory_bandwidth
        assert work.programs * work.l2_bytes >= work.hbm_bytes // 2


def test_waves_follow_from_registers_and_shared_memory() -> None:
    """One program more than fit at a time takes a wave more, of which the latency alone is seen here."""
    tiles, endless = TileConfig(128, 128, 64), replace(H200, l2_bandwidth=1e15, memory_bandwidth=1e15)
    crowded = SMALL._replace(registers=255)  # two programs of 4 warps
    alone = SMALL._replace(shared_memory=200 * 1024)
    for needs, resident in ((crowded, 2), (alone, 1)):
        assert needs.residency(90, tiles.num_warps) == resident

        def seconds(programs: int, needs=needs) -> float:
            problem = Problem(1, programs * 128, 768, 128, BF16, BF16)
            assert work_of("channel_fc1", problem, tiles, H200.target).programs == programs
            return cost.predict("channel_fc1", problem, tiles, endless, needs).seconds

        wave = 132 * resident
        assert seconds(wave) < seconds(wave + 1) == seconds(wave + 132) < seconds(2 * wave + 1)


@pytest.mark.parametrize(
    "change, bound",
    [
        ({"instructions": 400_000}, "instructions"),
        ({"instructions": 0, "loop_instructions": 0}, "matrix"),
    ],
)
def test_the_bound_is_what_takes_longest(change: dict, bound: str) -> None:
    wide = replace(H200, l2_bandwidth=1e15, memory_bandwidth=1e15)
    found = cost.predict("channel_fc1", B16_CHANNEL, TileConfig(128, 128, 64), wide, SMALL._replace(**change))
    assert found.bound == bound


def test_slower_memory_and_caches_show_as_bounds() -> None:
    tiles = TileConfig(128, 128, 64)
    slow = replace(H200, memory_bandwidth=1e10)
    assert cost.predict("channel_fc1", B16_CHANNEL, tiles, slow, SMALL).bound == "memory"
    slow = replace(H200, l2_bandwidth=1e11)
    assert cost.predict("channel_fc1", B16_CHANNEL, tiles, slow, SMALL).bound == "L2"


@pytest.mark.parametrize("op", ["token_mixing", "channel_fc1", "channel_fc2", "token_half", "channel_half"])
def test_more_samples_never_take_less_time(op: str) -> None:
    problem = B16_TOKEN if op.startswith("token") else B16_CHANNEL
    choice = Library.REFERENCE if op.endswith("half") else TileConfig(64, 64, 64)
    times = [cost.predict(op, problem._replace(batch=1 << n), choice, H200, SMALL).seconds for n in range(11)]
    assert times == sorted(times) and times[-1] > 50 * times[0]


def test_products_that_wait_for_each_other_are_predicted_slower() -> None:
    tiles, one = TileConfig(128, 128, 64), B16_CHANNEL._replace(batch=1)
    plain, serialised = (
        cost.predict("channel_fc1", one, tiles, H200, SMALL._replace(serialised=flag))
        for flag in (False, True)
    )
    assert serialised.seconds > plain.seconds


def test_the_library_pays_for_its_passes() -> None:
    fc1, fc2 = (
        cost.predict(op, B16_CHANNEL, Library.ATEN, H200, None) for op in ("channel_fc1", "channel_fc2")
    )
    u = 64 * 196 * 768 * 2
    product = 2 * 64 * 196 * 768 * 3072
    peak = H200.tensor * H200.clock * 1e9 * H200.target.multiprocessors
    assert fc1.seconds > fc2.seconds > product / peak + LAUNCH
    assert fc1.seconds - fc2.seconds > (2 * 4 * u - u) / H200.memory_bandwidth  # 2 u + 8 u against 3 u


def test_what_a_product_does_itself_takes_no_pass() -> None:
    """Of fc1 GELU: the pre-activation is not written and read. Of fc2 the residual: y is written once."""
    u = 64 * 196 * 768 * 2
    saved = {}
    for op, library in (("channel_fc1", Library.ATEN_GELU), ("channel_fc2", Library.ADDMM)):
        aten, own = (cost.predict(op, B16_CHANNEL, one, H200, None) for one in (Library.ATEN, library))
        saved[op] = aten.seconds - own.seconds
    moved = H200.memory_bandwidth * cost.MEMORY_EFFICIENCY
    assert saved["channel_fc1"] == pytest.approx(8 * u / moved + LAUNCH)
    assert saved["channel_fc2"] == pytest.approx(3 * u / moved + LAUNCH)


def test_an_added_residual_is_read() -> None:
    n = 8192
    plain, added = (cost.library_gemm(n, n, 16, BF16, H200, added=added) for added in (False, True))
    assert added.seconds - plain.seconds > 0.9 * 2 * n * n / H200.memory_bandwidth


def test_a_librarys_product_takes_as_long_as_its_operations_or_its_bytes() -> None:
    n, units = 8192, H200.clock * 1e9 * H200.target.multiprocessors
    square = cost.library_gemm(n, n, n, torch.float32, H200)
    assert square.seconds == pytest.approx(n**3 / (H200.fp32 * units * cost.FP32_LIBRARY) + LAUNCH)
    assert cost.library_gemm(1, n, n, BF16, H200).seconds > 2 * n * n / H200.memory_bandwidth + LAUNCH


def test_what_cannot_be_predicted_is_an_error() -> None:
    with pytest.raises(ValueError, match="choice: expected tiles or a Library that runs 'token_mixing', got"):
        cost.predict("token_mixing", B16_TOKEN, Library.ATEN, H200, None)
    huge = SMALL._replace(shared_memory=228 * 1024)
    with pytest.raises(ValueError, match="choice: not one program of channel_fc1 .* fits"):
        cost.predict("channel_fc1", B16_CHANNEL, TileConfig(128, 128, 64), H200, huge)
    assert cost.predict_launch("token_mixing", B16_TOKEN, TileConfig(64, 32), INTERPRETER) is None


# --- Blocks: the column "predicted" of the benchmarks.


def block(shape: BlockShape, target: Target, batch: int, dtype=BF16, x_dtype=None, training=False) -> dict:
    token = Problem(batch, shape.tokens, shape.channels, shape.token_hidden, x_dtype or dtype, dtype)
    problems = {"token_half": token, "channel_half": token._replace(hidden=shape.channel_hidden)}
    halves = {half + TRAINING * training: problem for half, problem in problems.items()}
    return cost.predict_halves(halves, target, select)


def predicted(name: str, batch: int = 64, dtype=BF16, x_dtype=None, device="nvidia-h200", training=False):
    return block(MODEL_BLOCKS[name], target_named(device), batch, dtype, x_dtype, training)


def test_a_block_is_four_launches() -> None:
    assert list(predicted("B/16")) == ["row_moments", "token_mixing", "channel_fc1", "channel_fc2"]


@pytest.mark.parametrize("model", ["S/32", "B/32", "B/16", "H/14"])
def test_the_log_says_what_the_model_predicts_with_each_triton(model: str) -> None:
    """ "Predictions to check on the first GPU": microseconds at batch 256, Triton 3.6.0 / 3.9.0."""
    rows = (ROOT / "benchmarks" / "NOTES.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line for line in rows if line.startswith(f"| {model} | ") and line.count("|") == 8]
    said = [cell.strip() for cell in row.split("|")[2:7]]
    found = []
    for version in ("3.6.0", "3.9.0"):
        target = replace(H200.target, triton=version)
        launches = block(MODEL_BLOCKS[model], target, 256)
        times = [1e6 * prediction.seconds for prediction in launches.values()]
        found.append([f"{time:.0f}" for time in (*times, sum(times))])
    assert said == [old if old == new else f"{old} / {new}" for old, new in zip(*found, strict=True)]


def test_training_adds_the_backward() -> None:
    launches = predicted("B/16", training=True)
    backward = list(launches)[4:]
    assert {"token_dgrad", "token_wgrad_fc1", "token_wgrad_fc2", "channel_mlp_hidden_bwd"} <= set(backward)
    assert {"channel_dn", "channel_dw1", "channel_dw2", "channel_layer_norm_bwd"} <= set(backward)
    forward = sum(prediction.seconds for prediction in predicted("B/16").values())
    assert 2 < sum(prediction.seconds for prediction in launches.values()) / forward < 4


def test_a_half_that_pytorch_trains_is_one_prediction() -> None:
    launches = predicted("B/16", dtype=FP32, training=True)
    assert "token_half_training" in launches and not any(name.startswith("token_d") for name in launches)
    assert "channel_row_moments" in launches and "channel_mlp_hidden_bwd" in launches
    token = B16_TOKEN._replace(x_dtype=FP32, dtype=FP32)
    forward = cost.predict("token_half", token, Library.REFERENCE, H200, None)
    assert launches["token_half_training"].seconds == pytest.approx(3 * forward.seconds)


def test_an_unrecorded_length_is_not_judged_by_a_longer_one_that_does_not_fit() -> None:
    target = replace(DEVICES["nvidia-b200"].target, triton="3.6.0")
    problem = B16_TOKEN._replace(tokens=100)
    tiles = select("token_dgrad", problem, target)
    longest = resources.records(target)[resources.key_of("token_dgrad", problem._replace(tokens=256), tiles)]
    assert not resources.is_recorded("token_dgrad", problem, tiles, target)
    assert not longest.residency(target.arch, tiles.num_warps)
    assert cost.predict_launch("token_dgrad", problem, tiles, target) is not None


def test_long_sequences_take_two_passes() -> None:
    launches = block(BlockShape(784, 768, 384, 3072), H200.target, 8, training=True)
    assert "token_fc1" in launches and "token_mixing" not in launches
    assert "token_mlp_hidden_bwd_recompute" in launches and "token_dw1" in launches


def test_the_interpreter_has_no_predictions() -> None:
    assert block(MODEL_BLOCKS["B/16"], INTERPRETER, 8, FP32) == {}


@pytest.mark.parametrize("device", DEVICES)
def test_every_block_of_every_model_has_a_time_on_every_device(device: str) -> None:
    for name in MODEL_BLOCKS:
        for dtype, x_dtype in ((BF16, BF16), (torch.float16, FP32), (FP32, FP32)):
            launches = predicted(name, 8, dtype, x_dtype, device, training=True)
            assert launches and all(0 < prediction.seconds < 1 for prediction in launches.values())

"""The levels of the benchmark: shapes, FLOPs and bytes, who races there, and the launches of a block."""

import importlib.util
import types
from dataclasses import replace

import pytest
import torch
from benchmark_stubs import CPU, NAMES, REAL, SHAPE, TINY, TRAINING, bench, measure_one, no_inductor
from torch.utils.flop_counter import FlopCounterMode

import fastmixer
from benchmarks import cells, launches, levels, opponents, schema
from benchmarks.levels import make_call, make_cases, make_subject
from fastmixer.aot import record as aot_record
from fastmixer.configs import TARGETS, ops

__all__ = ["no_inductor"]


def test_a_failed_backward_leaves_no_gradients():
    subject = make_subject(replace(TRAINING, dtype="float64"), CPU)
    step, item = make_call(subject.eager, subject.case), subject.items[0]
    expected = step(item)

    def fails(gradient):
        raise RuntimeError("out of memory")

    with torch.enable_grad():

        def watch(module, args):
            args[0].register_hook(fails)

        hook = subject.eager.norm1.register_forward_pre_hook(watch)
        with pytest.raises(RuntimeError, match="out of memory"):
            step(item)
    hook.remove()
    assert all(p.grad is None for p in subject.eager.parameters())
    for name, tensor in step(item).items():
        torch.testing.assert_close(tensor, expected[name], msg=name)


def test_the_default_shapes_are_the_papers():
    cases = make_cases(["block"], ["S/32", "B/16", "H/14"], [1, 64], ["bfloat16"], ["forward"])
    assert len(cases) == 6
    shapes = {case.model: case.shape for case in cases}
    assert shapes["mixer_s32_224"] == levels.Shape(49, 512, 256, 2048, blocks=8, patch=32)
    assert shapes["mixer_b16_224"] == levels.Shape(196, 768, 384, 3072, blocks=12, patch=16)
    assert shapes["mixer_h14_224"] == levels.Shape(256, 1280, 640, 5120, blocks=32, patch=14)
    assert shapes["mixer_b16_224"].image == shapes["mixer_h14_224"].image == 224
    with pytest.raises(ValueError, match=r"unknown model 'B/17'; did you mean .*B/16"):
        make_cases(["block"], ["B/17"], [1], ["bfloat16"], ["forward"])


@pytest.mark.parametrize("level", ["token", "channel", "block", "model"])
@pytest.mark.parametrize("direction", schema.DIRECTIONS)
def test_flops_parameters_and_bytes_are_those_of_the_module(level, direction):
    case = replace(TINY, level=level, direction=direction, batch=3)
    subject = make_subject(case, CPU)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(case.trains):
        make_call(subject.eager, case)(subject.items[0])
    assert counter.get_total_flops() == case.flops
    parameters = sum(p.numel() for p in subject.eager.parameters())
    assert case.parameters == parameters
    x = 3 * SHAPE.tokens * SHAPE.channels
    if level == "model":
        x = 3 * 3 * SHAPE.image**2 + (SHAPE.blocks + 1) * x
    assert case.bytes == 4 * (5 * x + 3 * parameters if case.trains else 2 * x + parameters)
    # Off their start: a fresh norm has a deviation of 0, a fresh bias of timm's model one of 1e-6.
    assert all(p.ndim > 1 or p.std() > 1e-3 for p in subject.eager.parameters())
    assert subject.eager.training is case.trains


@pytest.mark.parametrize("level", ["token", "model"])
def test_a_cases_numbers_are_the_same_whatever_ran_before(level):
    def numbers():
        subject = make_subject(replace(TRAINING, level=level), CPU)
        modules = (subject.eager, subject.fused)
        parameters = [p for module in modules for p in module.parameters()]
        return [*parameters, *subject.items[0], *subject.draw(1)[0]]

    first = numbers()
    torch.randn(3)
    assert all(map(torch.equal, first, numbers()))


def test_under_autocast_tensors_are_fp32_and_products_16_bit():
    case = replace(TINY, dtype="autocast")
    assert (case.x_dtype, case.product_dtype) == (torch.float32, torch.bfloat16)
    assert case.bytes == TINY.bytes
    subject = make_subject(case, CPU)
    seen = []
    subject.eager.mlp_channels.fc1.register_forward_hook(
        lambda module, args, output: seen.append(output.dtype)
    )
    make_call(subject.eager, case)(subject.items[0])
    assert seen == [torch.bfloat16]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("level", ["token", "channel", "block", "model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_every_level_races_forward(level, dtype):
    case = replace(TINY, level=level, dtype=dtype)
    cell = measure_one(case, names=(*NAMES, "copy", "cublas"))
    assert cell["errors"] == {}
    assert cell["ok"] is True
    ceiling = {"token": {"copy"}, "channel": {"cublas"}}.get(level, set())
    assert set(cell["opponents"]) == {"fused", "eager", "compile"} | ceiling
    assert set(cell["parity"]) == ({"fused"} if level == "model" else {"fused", "eager", "compile"})
    images = cell["opponents"]["fused"]["images_per_s"]
    assert images == (2 / 1.0 * 1e3 if level == "model" else None)


@pytest.mark.parametrize("level", ["token", "channel", "model"])
def test_every_level_races_backward(level):
    """The block: ``test_bench_cells``."""
    shape = replace(SHAPE, blocks=1)
    cell = measure_one(replace(TRAINING, level=level, shape=shape), names=(*NAMES, "copy", "cublas"))
    assert cell["errors"] == {}
    assert cell["ok"] is True
    assert ("fused_lean" in cell["opponents"]) == (level != "token")
    judged = set(cell["parity"]["fused"]["ratios"])
    if level == "model":
        assert judged == {"output", "x"}
    else:
        names = {name for name, _ in levels.EagerHalf(levels.timm_block(SHAPE), level).named_parameters()}
        assert judged == {"output", "x"} | names


# ---- kernels ---------------------------------------------------------------------------------------------


def test_the_kernels_of_a_forward_are_timed_one_by_one():
    found = cells.measure_case(
        replace(TINY, level="kernel"), bench(names=("fused", "copy", "cublas", "eager"))
    )
    ops = ["pack_weights", "row_moments", "token_mixing", "channel_fc1", "channel_fc2"]
    assert [cell["op"] for cell in found] == ops
    assert [set(cell["opponents"]) for cell in found] == [{"fused", "copy"}] * 3 + [{"fused", "cublas"}] * 2
    work = 2 * TINY.batch * SHAPE.tokens * SHAPE.channels
    flops = [0, 0, 2 * work * SHAPE.token_hidden, work * SHAPE.channel_hidden, work * SHAPE.channel_hidden]
    assert [cell["flops"] for cell in found] == flops
    assert sum(flops) == TINY.flops
    x, moments = 4 * TINY.batch * SHAPE.tokens * SHAPE.channels, 4 * 2 * TINY.batch * SHAPE.tokens
    assert found[1]["bytes"] == x + moments
    assert all(cell["ok"] and cell["parity"]["fused"]["ok"] and not cell["errors"] for cell in found)
    schema.validate({**report(), "cells": found})


def test_the_kernels_of_a_step_have_names_of_their_own():
    found = cells.measure_case(replace(TRAINING, level="kernel"), bench(names=("fused",)))
    ops = [cell["op"] for cell in found]
    assert len(set(ops)) == len(ops)
    assert {"row_moments", "channel_fc1", "channel_mlp_hidden_bwd", "token_dgrad", "token_wgrad_fc1"} < set(
        ops
    )
    assert {"token_layer_norm_bwd", "channel_layer_norm_bwd", "channel_sum_partials"} < set(ops)
    assert {"pack_weights_1", "pack_weights_2"} < set(ops)
    assert all(cell["ok"] for cell in found)
    schema.validate({**report(), "cells": found})


@pytest.mark.parametrize("op", ops.TUNED)
def test_a_launch_has_the_name_of_its_op_and_the_products_of_its_kernel(op):
    target = TARGETS["sm_90"]
    launch = aot_record.recorded_launch(*next(aot_record.jobs(target, [op])), target)
    half = ops.half_of(op)
    assert launches.op_name(launch, half) == op
    assert launches.flops_of(launch, TINY, half) > 0


def test_kernels_are_not_timed_on_a_red_gate(monkeypatch):
    right = launches.RecordedBlock.__call__
    monkeypatch.setattr(launches.RecordedBlock, "__call__", lambda self, x: right(self, x) * 1.01)
    (cell,) = cells.measure_case(replace(TINY, level="kernel"), bench())
    assert cell["ok"] is False and cell["op"] is None
    assert cell["parity"]["fused"]["failed"] == ["output"]
    schema.validate({**report(), "cells": [cell]})


def test_a_recorded_launch_gives_the_same_again_and_again():
    """On the buffers it ran on, and never over what it reads."""
    case = replace(TRAINING, level="kernel")
    with torch.enable_grad(), fastmixer.backend("triton"):
        subject = make_subject(case, CPU)
        subject.fused = launches.RecordedBlock(subject.eager)
        subject.items += subject.draw(1)
        ops = launches.record(subject, make_call(subject.fused, case))
    for op in ops:
        assert len(op.launches) == 2
        tensors = list(op.launches[0].tensors())
        launches.execute(op.launches[0])
        before = [tensor.clone() for tensor in tensors]
        launches.execute(op.launches[0])
        for tensor, expected in zip(tensors, before, strict=True):
            torch.testing.assert_close(tensor, expected, rtol=0, atol=0, equal_nan=True, msg=op.name)
        # Another input has other buffers, but for the weights.
        first, second = ({t.data_ptr() for t in launch.tensors()} for launch in op.launches)
        assert second - first, op.name


def report() -> dict:
    from benchmark_stubs import HEADER

    from benchmarks import runs

    return runs.new_report(HEADER)


# ---- opponents -------------------------------------------------------------------------------------------


def test_who_races_where():
    def names(level, direction):
        case = replace(TINY, level=level, direction=direction)
        return set(opponents.choose(case, schema.OPPONENTS))

    ours, rivals = {"fused"}, set(schema.RIVALS)
    assert names("token", "forward") == ours | rivals | {"copy"}
    assert names("channel", "forward") == ours | rivals | {"cublas"}
    assert names("block", "forward") == ours | rivals | {"fused_frozen", "lucidrains", "flax"}
    assert names("model", "forward") == ours | rivals | {"fused_frozen", "lucidrains", "flax", "vit"}
    assert names("block", "forward_backward") == ours | rivals | {"fused_lean", "lucidrains"}
    assert names("token", "forward_backward") == ours | rivals | {"copy"}


def test_what_compiles_answers_by_the_names_that_its_module_has():
    case = replace(TRAINING, dtype="float64")
    subject = make_subject(case, CPU)
    compiled = torch.compile(subject.eager, backend="eager")
    assert any(name.startswith("_orig_mod.") for name, _ in compiled.named_parameters())
    names = {name for name, _ in subject.eager.named_parameters()}
    assert set(make_call(compiled, case)(subject.items[0])) == {"output", "x"} | names


def test_max_autotune_is_captured_and_weighed_without_its_own_cuda_graphs(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: asked.append(options) or module)
    subject = make_subject(TINY, CPU)
    opponent = REAL["compile_max_autotune"]
    for make in (opponent.make, opponent.plain):
        make(subject)
    modes = ["max-autotune", "max-autotune-no-cudagraphs"]
    assert asked == [{"mode": mode, "dynamic": False} for mode in modes]


def test_optional_opponents_that_are_absent_are_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = opponents.left_out(("fused", "lucidrains", "flax"), CPU)
    assert found == {"lucidrains": "mlp-mixer-pytorch not installed", "flax": "jax and flax not installed"}
    assert opponents.left_out(("fused", "eager", "vit"), CPU) == {}


@pytest.mark.parametrize(
    ("platform", "device", "reason"),
    [
        ("cpu", "cpu", None),
        ("cpu", "cuda", "jax runs on its cpu, not on a gpu"),
        (RuntimeError("no driver"), "cuda", "jax does not work: RuntimeError: no driver"),
    ],
)
def test_flax_races_where_the_others_do(monkeypatch, platform, device, reason):
    from benchmarks import flax_mixer

    def found():
        if isinstance(platform, Exception):
            raise platform
        return platform

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: types.SimpleNamespace())
    monkeypatch.setattr(flax_mixer, "platform", found)
    left_out = opponents.left_out(("flax",), torch.device(device))
    assert left_out == ({} if reason is None else {"flax": reason})


def test_the_vit_of_the_same_size_has_counts_of_its_own():
    (case,) = make_cases(["model"], ["S/32"], [2], ["float32"], ["forward"])
    found = opponents.own_counts("vit", case)
    assert found["parameters"] == 22_878_952  # timm's table for vit_small_patch32_224
    assert 2 * 2.2e9 < found["flops"] < 2 * 2.5e9  # 1.15 G multiply-adds an image
    assert opponents.own_counts("eager", case) == {"flops": None, "parameters": None}


def test_ceilings_do_the_work_they_stand_for():
    for direction in schema.DIRECTIONS:
        case = replace(TINY, level="channel", direction=direction, dtype="autocast")
        subject = make_subject(case, CPU)
        call = opponents.OPPONENTS["cublas"].make(subject)
        with FlopCounterMode(display=False) as counter:
            answer = call(subject.items[0])
        assert counter.get_total_flops() == case.flops
        assert (answer if direction == "forward" else answer[0]).dtype == torch.bfloat16
    subject = make_subject(replace(TRAINING, level="token"), CPU)
    x, given = subject.items[0]
    copied, added = opponents.OPPONENTS["copy"].make(subject)((x, given))
    assert torch.equal(copied, x) and torch.equal(added, x + given)


def need(name: str) -> None:
    """Skips unless the package is installed."""
    module, package = opponents.PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("level", ["block", "model"])
def test_lucidrains_mixer_has_the_cases_sizes(level):
    need("lucidrains")
    case = replace(TRAINING, level=level)
    subject = make_subject(case, CPU)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        answers = opponents.OPPONENTS["lucidrains"].make(subject)(subject.items[0])
    assert counter.get_total_flops() == case.flops
    assert sum(tensor.numel() for tensor in answers.values()) > case.parameters


@pytest.mark.parametrize("level", ["block", "model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "autocast"])
def test_flax_mixer_has_the_cases_shapes(level, dtype):
    need("flax")
    case = replace(TINY, level=level, dtype=dtype)
    subject = make_subject(case, CPU)
    call = opponents.OPPONENTS["flax"].make(subject)
    expected = make_call(subject.eager, case)(subject.items[0])
    assert call(subject.items[0]).shape == expected.shape

"""``verify --backward``: right gradients pass, each wrong one fails by name, and it says what it left out."""

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from fused_calls import replace_calls
from timm.models.mlp_mixer import MixerBlock, MlpMixer
from torch import nn

import fastmixer
from fastmixer import FallbackWarning, cli, parity
from fastmixer.blocks import surgery
from fastmixer.verify import measure, table
from fastmixer.verify import run as verify

PARAMETERS = [
    *(f"{norm}.{kind}" for norm in ("norm1", "norm2") for kind in ("weight", "bias")),
    *(
        f"{mlp}.{fc}.{kind}"
        for mlp in ("mlp_tokens", "mlp_channels")
        for fc in ("fc1", "fc2")
        for kind in ("weight", "bias")
    ),
]


def tiny(name: str = "tiny", blocks: int = 2) -> nn.Module:
    """timm's own classes, blocks of 49 tokens and 64 channels, on images of 224 pixels."""
    torch.manual_seed(0)
    return MlpMixer(num_classes=10, img_size=224, patch_size=32, num_blocks=blocks, embed_dim=64)


def a_block() -> tuple[nn.Module, nn.Module]:
    """A block that is nowhere trivial, and a fused copy."""
    torch.manual_seed(0)
    eager = MixerBlock(32, 16).eval()
    verify.randomise(eager)
    fused = copy.deepcopy(eager)
    fastmixer.fuse(fused, strict=True)
    return eager, fused


def verify_tiny(capsys, blocks: int = 2, **options) -> tuple[int, str]:
    code = verify.run("tiny", build=lambda name: tiny(name, blocks), **options)
    return code, capsys.readouterr().out


def lines(output: str) -> dict[str, dict[str, str]]:
    """The second table: part -> tensor -> verdict."""
    found: dict[str, dict[str, str]] = {}
    latest = ""
    pattern = r"^  (blocks\.\d+|end to end|) +([a-z]\S*) +(?:[\d.e+-]+|inf|nan) .* (\d+ of \d+ ok|FAILED) *$"
    for part, tensor, verdict in re.findall(pattern, output.partition("worst tensor")[2], re.MULTILINE):
        latest = part or latest
        found.setdefault(latest, {})[tensor] = verdict
    return found


def shown(tensors: dict[str, parity.Parity]) -> list[tuple[str, str]]:
    """The tensors and the verdicts of a block's rows in that table."""
    return [(tensor, verdict) for _, tensor, *_, verdict in table._gradient_rows("block", tensors)]


class Damage(torch.autograd.Function):
    """The identity, with another gradient than the identity's."""

    @staticmethod
    def forward(ctx, x, damage):
        ctx.damage = damage
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return ctx.damage(g), None


def damage_gradients(monkeypatch, half: str | None, name: str, damage) -> None:
    """Makes the fused block give another gradient of one parameter, or of x where ``half`` is None."""

    def wrong(run, x, halves):
        if half is None:
            x = Damage.apply(x, damage)
        else:
            parameter = Damage.apply(getattr(halves[half], name), damage)
            halves = halves | {half: halves[half]._replace(**{name: parameter})}
        return run(x, halves)

    replace_calls(monkeypatch, wrong)


# ---- right and wrong gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "batch"), [("bfloat16", 1), ("float16", 3), ("float32", 2)])
def test_a_sound_model_passes(dtype, batch, capsys):
    code, output = verify_tiny(capsys, dtype=dtype, batch=batch, gradients="auto")
    found = lines(output)
    assert {part: list(tensors.values()) for part, tensors in found.items()} == {
        "blocks.0": ["14 of 14 ok"],
        "blocks.1": ["14 of 14 ok"],
        "end to end": ["2 of 2 ok"],
    }
    assert "PASSED: 2 of 2 fused blocks, 30 of 30 gradients" in output
    assert "not compared" not in output
    assert code == 0


@pytest.mark.slow
def test_a_whole_model_in_a_new_process_passes_for_the_blocks_asked_for():
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMIXER_BACKEND")}
    command = [sys.executable, "-m", "fastmixer", "verify", "mixer_s32_224", "--backward", "--blocks", "1"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert set(lines(result.stdout)) == {"blocks.0"}
    assert "14 of 14 gradients" in result.stdout
    assert "gradients not compared: of 7 other fused blocks, nor end to end" in result.stdout


@pytest.mark.parametrize("memory", ["balanced", "lean"])
def test_it_compares_the_output_the_input_and_every_parameter(memory):
    eager, fused = a_block()
    with fastmixer.memory(memory):
        found = measure.block_gradients(eager, fused, torch.randn(2, 16, 32))
    assert set(found) == {"output", "x", *PARAMETERS}
    assert all(p.ok for p in found.values()), found
    assert all(p.error_fused > 0 and p.max_bound < float("inf") for p in found.values())


def test_parameters_that_are_frozen_have_no_gradient_to_compare():
    eager, fused = a_block()
    for block in (eager, fused):
        block.norm1.requires_grad_(False)
        block.mlp_channels.fc2.requires_grad_(False)
    found = measure.block_gradients(eager, fused, torch.randn(2, 16, 32))
    frozen = ("norm1.", "mlp_channels.fc2.")
    assert set(found) == {"output", "x", *(name for name in PARAMETERS if not name.startswith(frozen))}
    assert all(p.ok for p in found.values())


HALF_FIELDS = {"norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"}


@pytest.mark.parametrize("half", ["token", "channel"])
@pytest.mark.parametrize("field", sorted(HALF_FIELDS))
def test_every_single_wrong_gradient_is_named(half, field, monkeypatch):
    eager, fused = a_block()
    damage_gradients(monkeypatch, half, field, lambda g: g * 1.01)
    tensors = measure.block_gradients(eager, fused, torch.randn(2, 16, 32))
    layer, kind = field.split("_")
    if layer == "norm":
        expected = f"norm{1 if half == 'token' else 2}.{kind}"
    else:
        expected = f"mlp_{half}s.{layer}.{kind}"
    assert shown(tensors) == [(expected, table.FAILED)]
    assert max(tensors, key=lambda tensor: tensors[tensor].share_of_bound) == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda g: g.index_fill(-1, torch.tensor([3]), float("nan")),
        lambda g: g.index_fill(-1, torch.tensor([3]), float("inf")),
        lambda g: g + g.abs().mean(),
        lambda g: g.flip(-1),
        torch.zeros_like,
        lambda g: None,
    ],
    ids=["nan", "inf", "offset", "wrong order", "zeros", "none"],
)
def test_damage_of_any_kind_fails(damage, monkeypatch, capsys):
    damage_gradients(monkeypatch, "channel", "norm_bias", damage)
    code, output = verify_tiny(capsys, gradients=1)
    assert code == 1
    assert lines(output) == {"blocks.0": {"norm2.bias": "FAILED"}}
    assert "FAILED: 2 of 2 fused blocks, 13 of 14 gradients and the logits" in output


def test_a_wrong_gradient_of_the_input_fails_end_to_end_too(monkeypatch, capsys):
    damage_gradients(monkeypatch, None, "x", lambda g: g * 1.05)
    code, output = verify_tiny(capsys, gradients="all")
    assert code == 1
    assert lines(output) == {
        "blocks.0": {"x": "FAILED"},
        "blocks.1": {"x": "FAILED"},
        "end to end": {"images": "FAILED"},
    }
    assert "FAILED: 2 of 2 fused blocks, 27 of 30 gradients" in output


def test_an_output_that_is_wrong_in_training_only_fails(monkeypatch, capsys):
    def wrong(run, x, halves):
        return run(x, halves) * (1.02 if torch.is_grad_enabled() else 1.0)

    replace_calls(monkeypatch, wrong)
    code, output = verify_tiny(capsys, gradients=1)
    assert code == 1
    assert lines(output)["blocks.0"]["output"] == "FAILED"
    assert "2 of 2 fused blocks" in output


def test_agreeing_nans_do_not_pass():
    eager, fused = a_block()
    x = torch.randn(2, 16, 32)
    x[0, 0, 0] = float("nan")
    found = measure.block_gradients(eager, fused, x)
    assert not found["output"].ok and not found["x"].ok


def test_a_block_that_quietly_trains_unfused_is_an_error():
    eager, fused = a_block()
    fused.mlp_tokens.fc1.register_forward_hook(lambda *args: None)
    with pytest.raises(FallbackWarning, match="runs unfused"):
        measure.block_gradients(eager, fused, torch.randn(2, 16, 32))


def test_it_leaves_no_gradients_behind():
    eager, fused = a_block()
    x = torch.randn(2, 16, 32)
    measure.block_gradients(eager, fused, x)
    assert all(p.grad is None for block in (eager, fused) for p in block.parameters())
    assert not x.requires_grad


# ---- which blocks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, ""), (1, "a"), (2, "ag"), (3, "adg"), (4, "aceg"), (7, "abcdefg"), (99, "abcdefg")],
)
def test_blocks_are_spread_evenly(count, expected):
    assert "".join(verify.choose("abcdefg", count)) == expected


def test_what_was_not_compared_is_said(capsys):
    code, output = verify_tiny(capsys, blocks=5, gradients="auto")
    assert code == 0
    assert set(lines(output)) == {"blocks.0", "blocks.2", "blocks.4"}
    said = " ".join(output.split())
    assert "gradients not compared: of 2 other fused blocks, nor end to end (--blocks all)" in said
    assert "5 of 5 fused blocks, 42 of 42 gradients" in said


def test_all_means_all(capsys):
    code, output = verify_tiny(capsys, blocks=4, gradients="all")
    assert code == 0
    assert set(lines(output)) == {*(f"blocks.{i}" for i in range(4)), "end to end"}


def test_without_the_option_nothing_is_said_of_gradients(capsys):
    code, output = verify_tiny(capsys)
    assert code == 0
    assert "gradient" not in output and "worst" not in output


def test_inputs_are_what_the_blocks_got(monkeypatch):
    got = []
    replace_calls(monkeypatch, lambda run, x, halves: got.append(x) or run(x, halves))
    model = tiny().eval()
    fused = copy.deepcopy(model)
    report = surgery.fuse(fused)
    images = torch.zeros(1, 3, 224, 224)
    got.clear()
    _, inputs = measure.outputs(model, fused, report, images, lambda step: None, ["blocks.1"])
    assert list(inputs) == ["blocks.1"]
    assert torch.equal(inputs["blocks.1"], got[1]) and len(got) == 2
    assert not fused.blocks[1]._forward_pre_hooks and not fused.blocks[1]._forward_hooks


# ---- the command line and the table ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--backward"], {"gradients": "auto", "freeze": False}),
        (["--backward", "--blocks", "all"], {"gradients": "all", "freeze": False}),
        (["--blocks", "2", "--backward"], {"gradients": 2, "freeze": False}),
        ([], {"gradients": None, "freeze": False}),
        (["--freeze"], {"gradients": None, "freeze": True}),
    ],
)
def test_the_command_line_says_whose_gradients(options, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(verify, "run", lambda *args, **kwargs: asked.append(kwargs) or 0)
    assert cli.main(["verify", *options]) == 0
    assert asked == [expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--blocks", "2"], "give --backward too"),
        (["--backward", "--blocks", "0"], "expected all or a whole number above 0, got '0'"),
        (["--backward", "--blocks", "some"], "got 'some'"),
    ],
)
def test_bad_options_exit_with_2(options, message, capsys):
    assert cli.main(["verify", *options]) == 2
    assert message in capsys.readouterr().err


def with_error(error: float, largest: float = 0.0, misplaced: int = 0) -> parity.Parity:
    """A comparison whose bounds are 1 each."""
    return parity.Parity(error, 1.0, largest, 1.0, 1.0, 1.0, misplaced)


def test_the_worst_tensor_is_the_one_nearest_its_bound():
    tensors = {"a": with_error(0.5), "b": with_error(0.1, 0.9), "c": with_error(0.7)}
    assert shown(tensors) == [("b", "[green]3 of 3 ok[/]")]
    assert shown({**tensors, "d": with_error(0.0, 0.0, misplaced=1)}) == [("d", table.FAILED)]
    assert parity.Parity(0.0, 0.0, 0.0, 0.0, 0.0, 0.0).share_of_bound == 0.0
    assert parity.Parity(1.0, 0.0, 0.0, 0.0, 0.0, 0.0).share_of_bound == float("inf")


def test_every_failed_tensor_gets_a_line(capsys):
    good, bad = with_error(0.5), with_error(1.5)
    gradients = {
        "blocks.3": {"x": bad, "norm1.bias": good, "mlp_tokens.fc1.weight": bad},
        "blocks.4": {"x": good},
    }
    blocks = {"blocks.3": good, "blocks.4": good}
    result = measure.Result(blocks, good, {}, gradients)
    assert measure.Result(blocks, good, {}).ok and not result.ok
    with fastmixer.memory("lean"):
        table.render(result, "title", "weights")
    output = capsys.readouterr().out
    assert lines(output) == {
        "blocks.3": {"x": "FAILED", "mlp_tokens.fc1.weight": "FAILED"},
        "blocks.4": {"x": "1 of 1 ok"},
    }
    assert "memory lean" in output
    assert "2 of 4 gradients" in output


def test_nothing_compared_is_not_ok():
    good = with_error(0.5)
    assert not measure.Result({"blocks.0": good}, good, {}, gradients={}).ok


@pytest.mark.gpu
def test_on_a_gpu_all_blocks_are_compared(capsys):
    code, output = verify_tiny(capsys, blocks=4, gradients="auto", batch=2)
    assert code == 0
    assert set(lines(output)) == {*(f"blocks.{i}" for i in range(4)), "end to end"}

"""``verify``: it passes what is right, fails what is broken, and refuses when there is nothing to verify."""

import os
import re
import subprocess
import sys

import pytest
import torch
from fused_calls import replace_calls
from timm.models.mlp_mixer import MlpMixer
from torch import nn

from fastmixer import FallbackWarning, cli, interpreter, parity
from fastmixer.blocks import freezing, surgery
from fastmixer.usage import UsageError
from fastmixer.verify import measure, table
from fastmixer.verify import run as verify


def tiny(name: str = "tiny") -> nn.Module:
    """timm's own classes, two blocks of 49 tokens and 64 channels, on images of 224 pixels."""
    torch.manual_seed(0)
    return MlpMixer(num_classes=10, img_size=224, patch_size=32, num_blocks=2, embed_dim=64)


def verify_tiny(capsys, **options) -> tuple[int, str]:
    code = verify.run("tiny", build=tiny, **options)
    return code, capsys.readouterr().out


def verdicts(output: str) -> dict[str, str]:
    """The last word of every row of the table."""
    return dict(re.findall(r"^ +(\S*blocks\.\d+|logits) .* (ok|FAILED) *$", output, re.MULTILINE))


def test_the_default_command_passes_in_a_new_process():
    """mixer_b16_224 whole: every block and the logits, from the command line, without any setting."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMIXER_BACKEND")}
    result = subprocess.run(
        [sys.executable, "-m", "fastmixer", "verify"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert verdicts(result.stdout) == {**{f"blocks.{i}": "ok" for i in range(12)}, "logits": "ok"}
    assert "PASSED: 12 of 12 fused blocks" in result.stdout
    assert "random weights" in result.stdout


@pytest.mark.parametrize(("dtype", "batch"), [("bfloat16", 1), ("float16", 3), ("float32", 1)])
def test_a_sound_model_passes(dtype, batch, capsys):
    code, output = verify_tiny(capsys, dtype=dtype, batch=batch)
    assert verdicts(output) == {"blocks.0": "ok", "blocks.1": "ok", "logits": "ok"}
    assert code == 0
    assert f"tiny, {dtype}, batch {batch}" in output
    assert "top-5 classes in common: fused and eager" in output


def damage_second_block(monkeypatch, damage) -> None:
    """Makes the fused path of every second call return something else."""
    calls = []

    def wrong(run, x, halves):
        calls.append(None)
        output = run(x, halves)
        return damage(output) if len(calls) % 2 == 0 else output

    replace_calls(monkeypatch, wrong)


@pytest.mark.parametrize(
    "damage",
    [
        lambda y: y * 1.01,
        lambda y: y + 0.05,
        lambda y: y.index_fill(1, torch.tensor([48]), float("nan")),
        lambda y: torch.full_like(y, float("inf")),
        torch.zeros_like,
    ],
    ids=["factor", "offset", "nan in one token", "inf", "zeros"],
)
def test_a_broken_block_fails_and_is_named(damage, monkeypatch, capsys):
    damage_second_block(monkeypatch, damage)
    code, output = verify_tiny(capsys)
    found = verdicts(output)
    assert code == 1
    assert (found["blocks.0"], found["blocks.1"]) == ("ok", "FAILED")
    assert "FAILED: 1 of 2 fused blocks" in output


def test_a_frozen_model_is_compared_with_its_weights(capsys, monkeypatch):
    code, output = verify_tiny(capsys, freeze=True)
    assert code == 0 and "batch 1, frozen, on" in output and "stale" not in output

    def freeze_and_write(model: nn.Module, freeze=freezing.freeze) -> None:
        freeze(model)
        model.blocks[1].mlp_tokens.fc1.weight.data.mul_(1.5)

    monkeypatch.setattr(freezing, "freeze", freeze_and_write)
    code, output = verify_tiny(capsys, freeze=True)
    assert code == 1 and "stale: the packed weights of blocks.1 are not those of the model" in output


def test_agreeing_nans_do_not_pass(capsys):
    def poisoned(name: str) -> nn.Module:
        model = tiny()
        model.blocks[0].norm1.bias.data.fill_(float("nan"))
        return model

    assert verify.run("tiny", build=poisoned) == 1
    assert set(verdicts(capsys.readouterr().out).values()) == {"FAILED"}


def test_a_block_that_quietly_runs_unfused_is_an_error():
    eager = tiny().bfloat16().eval()
    fused = tiny().bfloat16().eval()
    report = surgery.fuse(fused)
    fused.blocks[1].mlp_tokens.fc1.register_forward_hook(lambda *args: None)
    images = verify.photographs(eager, 1).bfloat16()
    with pytest.raises(FallbackWarning, match="runs unfused"):
        measure.outputs(eager, fused, report, images, lambda step: None)
    assert not fused.blocks[0]._forward_hooks


def test_blocks_that_cannot_be_fused_are_shown_with_the_reason(capsys):
    def half(name: str) -> nn.Module:
        model = tiny()
        model.blocks[1].mlp_tokens.act = nn.SiLU()
        return model

    assert verify.run("tiny", build=half) == 0
    output = capsys.readouterr().out
    assert re.search(r"blocks\.1 .*not fused: .*SiLU", output)
    assert "PASSED: 1 of 1 fused blocks (1 not fused)" in output


@pytest.mark.parametrize(
    ("name", "reason"), [("gmixer_12_224", "SiLU"), ("resnet18", "no mixer block found")]
)
def test_nothing_to_verify_does_not_pass(name, reason, capsys):
    assert cli.main(["verify", name]) == 2
    message = capsys.readouterr().err
    assert f"no block of {name} can be fused" in message
    assert reason in message


# ---- checkpoints -----------------------------------------------------------------------------------------


def test_a_checkpoint_is_loaded_and_named(tmp_path, capsys):
    path = tmp_path / "tiny.pt"
    model = tiny()
    verify.randomise(model)
    torch.save(model.state_dict(), path)
    code, output = verify_tiny(capsys, checkpoint=str(path))
    assert code == 0
    assert f"weights from {path}" in output.replace("\n", "")


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    wrong, corrupt = tmp_path / "wrong.pt", tmp_path / "corrupt.pt"
    torch.save({"stem.proj.weight": torch.zeros(1), "extra": torch.zeros(1)}, wrong)
    corrupt.write_bytes(b"\x00\x01 no checkpoint")
    for path, message in [
        (wrong, "unexpected"),
        (corrupt, "is not a checkpoint"),
        (tmp_path / "absent.pt", "no file"),
    ]:
        with pytest.raises(UsageError, match=message):
            verify.run("tiny", build=tiny, checkpoint=str(path))


def test_the_command_line_reports_a_bad_checkpoint(tmp_path, capsys):
    path = tmp_path / "wrong.pt"
    torch.save({"extra": torch.zeros(1)}, path)
    assert cli.main(["verify", "mixer_s32_224", "--checkpoint", str(path)]) == 2
    message = capsys.readouterr().err
    assert "missing" in message and "stem.proj.weight" in message
    assert "unexpected (1)" in message and "extra" in message


# ---- model, photographs, packages ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mixer_b16_244", "did you mean mixer_b16_224"),
        ("mixer_b16_224.nope", "nope"),
        ("Q/99", "known are mixer_s32_224"),
    ],
)
def test_an_unknown_model_gets_the_nearest_one(name, hint, capsys):
    assert cli.main(["verify", name]) == 2
    message = capsys.readouterr().err
    assert f"unknown model {name!r}" in message
    assert hint in message


def test_models_have_timms_names_and_the_papers():
    with torch.device("meta"):
        assert len(verify.build_model("S/32").blocks) == 8
        assert verify.build_model("mixer_b16_224.goog_in21k").head.out_features == 21843
        huge = verify.build_model("mixer_h14_224")
    assert (len(huge.blocks), huge.stem.num_patches) == (32, 256)
    assert type(huge) is MlpMixer


def test_random_weights_are_nowhere_trivial_and_reproducible():
    first, second = tiny(), tiny()
    verify.randomise(first)
    verify.randomise(second)
    for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
        assert p.std() > 0.01, name
        assert torch.equal(p, q), name


def test_photographs_are_preprocessed_and_all_different():
    images = verify.photographs(tiny(), 7)
    assert images.shape == (7, 3, 224, 224)
    assert images.dtype == torch.float32
    assert -3 < images.min() < -1 and 1 < images.max() < 3
    assert len({image.numpy().tobytes() for image in images}) == 7


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UsageError, match=r'verify needs sklearn, rich: pip install "fastmixer\[demo\]"'):
        verify.run("tiny", build=tiny)


def test_an_interpreter_that_came_too_late_is_explained(monkeypatch):
    monkeypatch.setattr(interpreter, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="before TRITON_INTERPRET=1 was set"):
        verify.run("tiny", build=tiny)


# ---- the table -------------------------------------------------------------------------------------------


def test_top_classes_in_common():
    a = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0, 0], [9, 8, 7, 6, 5, 0, 0, 0]])
    b = torch.tensor([[9.0, 8, 7, 6, 5, 0, 0, 0], [0, 0, 0, 6, 7, 8, 9, 5]])
    assert measure.shared_top(a, a) == 5
    assert measure.shared_top(a, b) == 3.5
    assert measure.shared_top(a[:, :3], a[:, :3].flip(1)) == 3


def test_the_table_shows_times_and_every_long_cell_when_it_is_no_terminal(capsys):
    good = parity.Parity(1e-3, 1e-3, 1e-2, 1e-2, 2e-3, 2e-2)
    blocks = {"blocks.0": good, "blocks.1": "a long reason, " * 8}
    times = {"eager": 2.0, "torch.compile": "failed: no C compiler", "fused": 1.0}
    result = measure.Result(blocks, good, {"fused and eager": 5.0}, milliseconds=times)
    assert result.ok
    table.render(result, "title", "weights [of a file]")
    output = capsys.readouterr().out
    assert "weights [of a file]" in output
    assert " ".join(output.split()).count("a long reason,") == 8
    assert "eager 2.000 ms, torch.compile failed: no C compiler, fused 1.000 ms" in " ".join(output.split())


def test_a_result_without_a_compared_block_is_not_ok():
    good = parity.Parity(1e-3, 1e-3, 1e-2, 1e-2, 2e-3, 2e-2)
    assert not measure.Result({"blocks.0": "declined"}, good, {}).ok


def test_a_torch_compile_that_fails_does_not_stop_the_times(monkeypatch):
    def no_compiler(model):
        raise RuntimeError("no C compiler\nmore")

    monkeypatch.setattr(torch, "compile", no_compiler)
    monkeypatch.setattr(measure, "_median_ms", lambda call: float(call().shape[0]))
    steps, images = [], torch.zeros(3, 4)
    times = measure.time_on_gpu(nn.Identity(), nn.Identity(), images, steps.append)
    assert times == {"eager": 3.0, "torch.compile": "failed: no C compiler", "fused": 3.0}
    assert len(steps) == 3


@pytest.mark.gpu
def test_on_a_gpu_it_runs_natively_and_gives_times(capsys):
    assert verify.run("tiny", build=tiny) == 0
    output = capsys.readouterr().out
    assert "interpreter" not in output
    assert re.search(r"eager [\d.]+ ms, torch.compile .*, fused [\d.]+ ms", " ".join(output.split()))

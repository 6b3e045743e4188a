"""The command line: what it accepts, what it refuses and how, and ``info``."""

import os
import subprocess
import sys

import pytest
import torch

import fastmixer
from fastmixer import cli, info, versions
from fastmixer.aot import report
from fastmixer.verify import run as verify


def in_a_new_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    variables = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMIXER_BACKEND")}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**variables, **environment},
        timeout=300,
    )


@pytest.fixture
def asked(monkeypatch):
    """What the commands were asked to do, instead of doing it; each returns 1."""
    calls = []

    def run(*args, **options):
        calls.append((*args, *(name for name, value in options.items() if value)))
        return 1

    monkeypatch.setattr(verify, "run", run)
    monkeypatch.setattr(report, "run", lambda *args: calls.append(args) or 1)
    return calls


def test_without_a_command_help_is_printed():
    result = in_a_new_process("-m", "fastmixer")
    assert result.returncode == 0
    assert all(command in result.stdout for command in ("info", "verify", "compile"))
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("typed", "hint"),
    [("verfy", "did you mean verify?"), ("compil", "compile"), ("xyz", "info, verify, compile")],
)
def test_an_unknown_command_gets_the_nearest_one(typed, hint, capsys):
    assert cli.main([typed, "--batch", "2"]) == 2
    message = capsys.readouterr().err
    assert f"unknown command {typed!r}" in message
    assert hint in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--dtype", "int8"], "expected bf16, fp16 or fp32, got 'int8'"),
        (["verify", "--batch", "0"], "expected a whole number above 0, got '0'"),
        (["verify", "--batch", "many"], "'many'"),
        (["verify", "--nonsense"], "--nonsense"),
        (["verify", "--freeze", "--backward"], "a frozen block gives no gradients"),
        (["compile", "--jobs", "-1"], "--jobs"),
        (["--nonsense"], "command"),
    ],
)
def test_bad_options_exit_with_2(arguments, message, asked, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
    assert asked == []


def test_help_exits_with_0(capsys):
    assert cli.main(["verify", "--help"]) == 0
    assert "--checkpoint" in capsys.readouterr().out


def test_verify_gets_its_options_and_its_exit_code_is_passed_on(asked):
    assert cli.main(["verify"]) == 1
    assert (
        cli.main(["verify", "mixer_s32_224", "--dtype", "fp16", "--batch", "3", "--checkpoint", "f.pt"]) == 1
    )
    assert cli.main(["verify", "--freeze"]) == 1
    default = "mixer_b16_224", "bfloat16", 1, None
    assert asked == [default, ("mixer_s32_224", "float16", 3, "f.pt"), (*default, "freeze")]


@pytest.mark.parametrize(
    ("typed", "name"),
    [("bf16", "bfloat16"), ("torch.float16", "float16"), ("half", "float16"), ("FP32", "float32")],
)
def test_dtypes_have_short_and_torch_names(typed, name, asked):
    cli.main(["verify", "--dtype", typed])
    assert asked[0][1] == name


def test_compile_gets_its_options(asked):
    assert cli.main(["compile"]) == 1
    assert cli.main(["compile", "--arch", "sm_90", "gfx942", "--arch", "sm_80", "--json", "--jobs", "2"]) == 1
    assert asked == [([], False, None), (["sm_90", "gfx942", "sm_80"], True, 2)]


def test_an_unknown_arch_gets_the_nearest_one(capsys):
    assert cli.main(["compile", "--arch", "sm_9"]) == 2
    assert "did you mean sm_90" in capsys.readouterr().err


def test_compile_without_what_it_needs_says_so(monkeypatch, capsys):
    def refuse(*args):
        raise RuntimeError("compile needs Triton")

    monkeypatch.setattr(report, "run", refuse)
    assert cli.main(["compile"]) == 2
    assert capsys.readouterr().err == "fastmixer: compile needs Triton\n"


@pytest.mark.parametrize(
    ("gpus", "capability", "interpreted"), [(0, None, True), (1, (7, 5), True), (1, (8, 0), False)]
)
def test_verify_turns_the_interpreter_on_where_no_gpu_runs_the_kernels(
    gpus, capability, interpreted, asked, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    cli.main(["verify"])
    assert os.environ["TRITON_INTERPRET"] == ("1" if interpreted else "0")


def test_the_command_line_itself_imports_no_torch():
    code = "import sys, fastmixer.cli; print(*{'torch', 'triton', 'timm', 'rich'} & set(sys.modules))"
    assert in_a_new_process("-c", code).stdout.strip() == ""


# ---- info ------------------------------------------------------------------------------------------------


def test_info_in_a_new_process():
    result = in_a_new_process("-m", "fastmixer", "info", FASTMIXER_BACKEND="torch")
    assert result.returncode == 0
    assert torch.__version__ in result.stdout
    assert "FASTMIXER_BACKEND=torch" in result.stdout
    assert "TRITON_INTERPRET is not set" in result.stdout
    assert "asks for the reference" in result.stdout


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (None, ("torch", "on CPU tensors the reference runs")),
        ("auto", ("torch", "on CPU tensors the reference runs")),
        ("torch", ("torch", "asks for the reference")),
        ("triton", ("triton", "in Triton's interpreter")),
    ],
)
def test_info_says_which_backend_runs_on_the_cpu_and_why(setting, expected, monkeypatch):
    monkeypatch.delenv("FASTMIXER_BACKEND", raising=False)
    if setting is not None:
        monkeypatch.setenv("FASTMIXER_BACKEND", setting)
    backend, why = info.which_backend(torch.device("cpu"))
    assert backend == expected[0]
    assert expected[1] in why


@pytest.mark.parametrize(("setting", "backend"), [("auto", "torch"), ("triton", "none: an error")])
def test_info_gives_the_reason_when_the_kernels_cannot_run(setting, backend, monkeypatch):
    monkeypatch.setenv("FASTMIXER_BACKEND", setting)
    assert info.which_backend(torch.device("mps")) == (backend, "device type 'mps' is not supported")


def test_info_reports_a_backend_that_does_not_exist(monkeypatch, capsys):
    monkeypatch.setenv("FASTMIXER_BACKEND", "tritn")
    assert cli.main(["info"]) == 0
    assert "error: FASTMIXER_BACKEND must be one of" in capsys.readouterr().out


def test_info_says_where_a_checkout_lies(monkeypatch):
    """Whether pip knows of it or not; in an installed package kernels/ lies inside."""
    folder = os.path.dirname(fastmixer.__path__[0])
    monkeypatch.setattr(fastmixer, "__path__", [os.path.join(folder, "fastmixer"), folder])
    assert f"fastmixer   {fastmixer.__version__}, a checkout in {folder}" in "\n".join(info.lines())
    monkeypatch.setattr(fastmixer, "__path__", [os.path.join(folder, "fastmixer")])
    assert info.fastmixer_version() == fastmixer.__version__


def test_versions_of_absent_packages():
    assert versions.package_version("torch").split("+")[0] == torch.__version__.split("+")[0]
    assert versions.package_version("surely_no_such_package") == "not installed"
    assert versions.package_version("json") == "of unknown version"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100, 580.1'; echo 'NVIDIA A100, 580.1'", ["580.1", "580.1"]),
        ("echo 'garbled'", []),
        ("exit 9", []),
        (None, []),
    ],
)
def test_the_driver_is_read_from_nvidia_smi_if_it_answers(script, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin" if script else str(tmp_path))
    if script:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    assert [gpu["driver_version"] for gpu in versions.nvidia_smi("name", "driver_version")] == expected


def test_without_nvidia_smi_there_is_no_driver_to_be_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert any(line.startswith("  GPU driver  none seen") for line in info.lines())

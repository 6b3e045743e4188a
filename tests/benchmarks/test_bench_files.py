"""Where the benchmark's results go, and what stands at their head."""

import json
import subprocess
from types import SimpleNamespace

import pytest
import torch

from benchmarks import files, measure

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "new" / "report.json"
    files.write_atomically(path, {"a": 1})
    for unwritable in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            files.write_atomically(path, unwritable)
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


def test_names_of_folders(monkeypatch, tmp_path):
    assert files.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert files.slug("AMD Instinct™ MI300X") == "amd-instinct-mi300x"
    assert files.slug("—") == "unknown"
    assert files.results_folder("Sample GPU") == files.ROOT / "benchmarks" / "results" / "sample-gpu"
    monkeypatch.setattr(files, "ROOT", tmp_path)  # as where the package is installed
    assert str(files.results_folder("Sample GPU")) == "fastmixer-results/sample-gpu"


def test_the_environment_names_versions_and_commit(tmp_path, monkeypatch):
    found = files.environment(CPU)
    assert found["gpu"] == "cpu"
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {
        "torch", "triton", "timm", "fastmixer", "jax", "flax", "mlp-mixer-pytorch",
    }  # fmt: skip
    assert found["cpu"] == files.cpu_name()
    monkeypatch.setattr(files, "git_state", lambda: {"commit": None, "dirty": None})
    assert files.environment(CPU, "f00")["commit"] == "f00"
    # Installed, whatever repository the folder lies in is another one.
    monkeypatch.setattr(files, "git_state", lambda: {"commit": "of another", "dirty": False})
    monkeypatch.setattr(files, "ROOT", tmp_path)
    assert files.environment(CPU)["commit"] is None
    (tmp_path / "pyproject.toml").touch()  # so is it of a copy that has no .git
    assert files.environment(CPU, "f00")["commit"] == "f00"


def test_the_cpu_has_a_name(tmp_path):
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor : 0\nmodel name\t: Sample CPU @ 1.00GHz\nprocessor : 1\n")
    assert files.cpu_name(listing) == "Sample CPU @ 1.00GHz"
    assert files.cpu_name(tmp_path / "absent") == (files.platform.processor() or None)


def test_nvidia_smi_is_asked_for_the_gpu_that_torch_means(monkeypatch):
    """Whatever its place in nvidia-smi's list."""
    rows = [{"uuid": "GPU-aa", "name": "first"}, {"uuid": "GPU-bb", "name": "second"}]
    monkeypatch.setattr(files.versions, "nvidia_smi", lambda *fields: [dict(row) for row in rows])
    for uuid, expected in (("bb", {"name": "second"}), ("GPU-aa", {"name": "first"}), ("cc", None)):
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device, uuid=uuid: SimpleNamespace(uuid=uuid)
        )
        assert files.nvidia_smi(CUDA, "name") == expected
        assert measure.clocks(CUDA) == expected
    assert files.nvidia_smi(CPU, "name") is None


def test_the_state_of_the_clone(tmp_path):
    assert files.git_state(tmp_path) == {"commit": None, "dirty": None}
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    (tmp_path / "file").write_text("one")
    subprocess.run([*git, "add", "file"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    assert files.git_state(tmp_path)["dirty"] is False
    assert len(files.git_state(tmp_path)["commit"]) == 40
    (tmp_path / "file").write_text("two")
    assert files.git_state(tmp_path)["dirty"] is True

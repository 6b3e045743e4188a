"""The package builds with old and new setuptools: machines with GPUs often have an old one and no network."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
# All of them that setuptools 68 takes: PEP 621's. Later standards added some, and a license that is a string.
PROJECT_KEYS = {
    *("name", "version", "description", "readme", "requires-python", "license", "authors", "maintainers"),
    *("keywords", "classifiers", "urls", "scripts", "gui-scripts", "entry-points", "dependencies"),
    *("optional-dependencies", "dynamic"),
}
BUILD = """
import warnings
import setuptools
from setuptools import build_meta
warnings.simplefilter("error", setuptools.SetuptoolsDeprecationWarning)
build_meta.build_wheel("dist")
build_meta.build_editable("editable")
"""


def test_pyproject_is_one_that_setuptools_68_takes() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert content["build-system"]["requires"] == ["setuptools>=68"]
    assert set(content["project"]) <= PROJECT_KEYS
    assert not isinstance(content["project"].get("license"), str)


@pytest.mark.slow
@pytest.mark.parametrize("setuptools", ["setuptools==68.2.2", "setuptools"])
def test_wheel_and_editable_wheel_are_built(setuptools: str, tmp_path: Path) -> None:
    """Without a deprecation, which some later setuptools makes an error; the newest is the one pip finds."""
    tools, source = tmp_path / "tools", tmp_path / "source"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tools), setuptools, "wheel"]
    fetched = subprocess.run(pip, capture_output=True, text=True)
    if fetched.returncode:
        pytest.skip(f"pip cannot get {setuptools}: {fetched.stderr[-500:]}")
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__"))
    command = [sys.executable, "-c", BUILD]
    built = subprocess.run(
        command, cwd=source, env={"PYTHONPATH": str(tools)}, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr[-4000:]
    for folder in "dist", "editable":
        (wheel,) = (source / folder).glob("*.whl")
        files = zipfile.ZipFile(wheel)
        (metadata,) = (name for name in files.namelist() if name.endswith("/METADATA"))
        assert "\nLicense: MIT\n" in files.read(metadata).decode()
        assert any(name.endswith("/LICENSE") for name in files.namelist())

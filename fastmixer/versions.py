"""The versions of packages and of the GPU's driver, read without importing or initialising anything."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess


def package_version(name: str) -> str:
    """The version of an installed package, without importing it; "not installed" otherwise."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        # Some builds install the module under another distribution's name (pytorch-triton-rocm).
        return "not installed" if importlib.util.find_spec(name) is None else "of unknown version"


def nvidia_smi(*fields: str) -> list[dict[str, str]]:
    """``nvidia-smi --query-gpu`` for ``fields``, one dictionary per GPU; empty where it cannot say."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in result.stdout.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]

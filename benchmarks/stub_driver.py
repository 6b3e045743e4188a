"""A libcuda.so.1 without a GPU, over which Triton compiles for sm_90 and launches natively: ``cuda_stub.c``.

Neither torch nor Triton is imported here: a process has to find the stub before they are.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
from pathlib import Path

LIBRARY = "libcuda.so.1"


def build(folder: Path) -> None:
    """Compiles the stub driver into ``folder`` with Triton's headers, and does not import Triton."""
    (triton,) = importlib.util.find_spec("triton").submodule_search_locations
    headers = Path(triton, "backends", "nvidia", "include")
    source = Path(__file__).with_name("cuda_stub.c")
    command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-I", headers, source]
    subprocess.run([*command, "-o", folder / LIBRARY], check=True)


def variables(folder: Path) -> dict[str, str]:
    """The environment in which Triton finds the stub driver in ``folder``."""
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": str(folder)}

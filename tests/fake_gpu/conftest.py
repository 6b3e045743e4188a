"""Runs every test of this folder in a process of its own, on the fake CUDA device of ``fake_cuda.py``.

The test's process is pytest again: fixtures, parameters and reports are as everywhere. All of them share one
cache of compiled kernels, so that a kernel is compiled once.
"""

from __future__ import annotations

import os
import subprocess
import sys

import fake_cuda
import pytest
from filelock import FileLock

from benchmarks import stub_driver

HERE = "FASTMIXER_FAKE_CUDA"  # set in a test's own process
SECONDS = 240


@pytest.fixture(scope="session")
def gpu() -> fake_cuda.Gpu | None:
    """The fake device; None where the test does not run but is handed on."""
    return fake_cuda.install() if HERE in os.environ else None


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of the tests' own processes: the stub driver, and folders that are nobody else's."""
    if HERE in os.environ:
        return {}
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    folder /= "fake_gpu"
    with FileLock(f"{folder}.lock"):
        stub = folder / "stub"
        found = stub_driver.variables(stub)
        if not stub.exists():
            stub.mkdir(parents=True)
            stub_driver.build(stub)
    own = {"HOME": "home", "TRITON_CACHE_DIR": "triton"}
    own = {name: str(folder / place) for name, place in own.items()}
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | found | own | {HERE: "1"}


@pytest.fixture(autouse=True)
def _own_process(environment: dict[str, str], request: pytest.FixtureRequest) -> None:
    request.node.environment = environment


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Hands a test on to its own process, where this does nothing."""
    if HERE in os.environ:
        return None
    file, _, name = pyfuncitem.nodeid.partition("::")
    test = f"{pyfuncitem.path}::{name}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "slow or not slow", test]
    ran = subprocess.run(
        command, cwd=pyfuncitem.config.rootpath, env=pyfuncitem.environment, capture_output=True, text=True,
        timeout=SECONDS,
    )  # fmt: skip
    if ran.returncode:
        pytest.fail(
            f"in its own process, exit code {ran.returncode}:\n{ran.stdout}{ran.stderr}", pytrace=False
        )
    return True

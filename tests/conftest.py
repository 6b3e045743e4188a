"""Chooses how kernels run, before anything imports triton: interpreted on CPU tensors, or natively.

``pytest`` runs everything through Triton's interpreter; ``pytest -m gpu`` the same kernel tests on a GPU, and
``pytest -m "gpu and smoke"`` the few of them that launch every kernel.
"""

from __future__ import annotations

import functools
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import Any

# Before NumPy is loaded: the interpreter multiplies small matrices, where BLAS threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from marks import names_of, selects_gpu_tests


def pytest_configure(config: pytest.Config) -> None:
    marks = config.option.markexpr
    if "FASTMIXER_FAKE_CUDA" in os.environ:
        pass  # natively on a stub: fake_gpu/conftest.py
    elif not selects_gpu_tests(marks):
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise pytest.UsageError(
            f"-m {marks!r} needs a CUDA or ROCm GPU, and torch sees none: nothing was tested"
        )
    if "slow" not in names_of(marks):  # slow tests are run where they are asked for, and natively no less
        config.option.markexpr = f"({marks}) and not slow"
    # What the user has tuned on this machine must not steer the tests.
    folder = tempfile.TemporaryDirectory(prefix="fastmixer-tests-")
    config.add_cleanup(folder.cleanup)
    os.environ["FASTMIXER_CACHE_DIR"] = folder.name
    # cuBLAS needs it to be deterministic, which ``poisoned`` asks of the eager yardstick too.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("generated cases (tests/draws.py)")
    group.addoption(
        "--draws", default="0", metavar="SEED", help="which are drawn: any word; CI gives the commit"
    )
    group.addoption("--exhaustive", action="store_true", help="draw several times as many")


def pytest_report_header(config: pytest.Config) -> str:
    many = ", exhaustive" if config.getoption("exhaustive") else ""
    return f"generated cases: --draws {config.getoption('draws')}{many}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    import draws

    if marker := metafunc.definition.get_closest_marker("generated"):
        metafunc.parametrize("draw", draws.names(*marker.args, metafunc.config))
    if "drawn_arch" in metafunc.fixturenames:
        metafunc.parametrize("drawn_arch", draws.architectures(metafunc.config))


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Gives every test random numbers of its own: the same on any worker, in any order, alone or not."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernel tests run: the interpreter's CPU, and under ``-m gpu`` a GPU."""
    return torch.device(request.param)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Collects the arguments of every call that takes the fused path."""
    from fused_calls import replace_calls

    calls = []
    replace_calls(monkeypatch, lambda run, x, halves: calls.append((x, *halves.values())) or run(x, halves))
    return calls


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every launch of the test, in order, as it is made."""
    from fastmixer.ops import launch

    seen: list = []
    original = launch.execute

    def record(item: launch.Launch) -> None:
        seen.append(item)
        original(item)

    monkeypatch.setattr(launch, "execute", record)
    return seen


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects the name, in ``launch.kernels()``, of every kernel that is launched."""
    from fastmixer.ops import launch

    names: list[str] = []
    original = launch.execute

    def record(item: launch.Launch) -> None:
        names.append(item.kernel_name)
        original(item)

    monkeypatch.setattr(launch, "execute", record)
    return names


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict], list[str]]:
    """Makes the public functions run as on a GPU, with given choices; returns the launched kernels."""
    from support import with_library

    from fastmixer import dispatch
    from fastmixer.configs import INTERPRETER
    from fastmixer.ops import launch, plan

    monkeypatch.setattr(dispatch, "use_triton", lambda *args: True)
    real = launch.execute

    def install(choices: dict) -> list[str]:
        launched: list[str] = []

        def execute(item: Any) -> None:
            launched.append(item.kernel_name)
            real(item)

        plan.clear()  # of other choices
        context = with_library(launch.Context(INTERPRETER), choices)
        monkeypatch.setattr(launch, "Context", functools.partial(launch.Context, choose=context.choose))
        monkeypatch.setattr(launch, "execute", execute)
        return launched

    return install


@pytest.fixture(autouse=True)
def _plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Plans outlive a test, and with them what it put in place of a choice. None may have computed."""
    from only_memory import guard

    from fastmixer.ops import plan

    guard(monkeypatch)
    yield
    plan.clear()

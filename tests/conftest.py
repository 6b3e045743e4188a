"""Chooses how kernels run, before anything imports triton: interpreted on CPU tensors, or natively.

``pytest`` runs everything through Triton's interpreter; ``pytest -m gpu`` the same kernel tests on a GPU.
"""

from __future__ import annotations

import os

# Before NumPy is loaded: the interpreter multiplies small matrices, where BLAS threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    if "FASTMIXER_FAKE_CUDA" in os.environ:
        pass  # natively on a stub: fake_gpu/conftest.py
    elif config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        raise pytest.UsageError("-m gpu needs a CUDA or ROCm GPU, and torch sees none: nothing was tested")
    # cuBLAS needs it to be deterministic, which ``poisoned`` asks of the eager yardstick too.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where kernel tests run: the interpreter's CPU, and under ``-m gpu`` a GPU."""
    return torch.device(request.param)


@pytest.fixture
def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Collects the arguments of every call that takes the fused path."""
    from fastmixer import functional

    calls = []
    original = functional.mixer_block

    def record(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(functional, "mixer_block", record)
    return calls

"""What fuse decides does not depend on what the caller has switched on, nor does fuse disturb it."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator

import numpy
import pytest
import torch
from foreign_blocks import DIM, SEQ, ConsumesRandomNumbers, Plain, PostNorm, make_model
from foreign_families import FAMILIES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastmixer

pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")  # of autocast without a GPU


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


@contextlib.contextmanager
def default_device(name: str) -> Iterator[None]:
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def errors_for_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def anomalies() -> Iterator[None]:
    with torch.autograd.set_detect_anomaly(True):
        yield


class Recorder(torch.overrides.TorchFunctionMode):
    """A mode that is in nobody's way."""

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        return func(*args, **(kwargs or {}))


STATES = {
    "meta": lambda: torch.device("meta"),
    "cuda": lambda: torch.device("cuda"),  # a GPU need not be there
    "meta by default": lambda: default_device("meta"),
    "cuda by default": lambda: default_device("cuda"),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast of the GPU": lambda: torch.autocast("cuda", torch.float16),
    "deterministic": deterministic,
    "anomalies": anomalies,
    "fake tensors": FakeTensorMode,
    "a function mode": Recorder,
    "tensors saved on the CPU": torch.autograd.graph.save_on_cpu,
    "errors for warnings": errors_for_warnings,
}


class MakesTensors(Plain):
    """Whose forward asks for tensors without saying where and in which dtype, and warns."""

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
        ones = torch.ones(x.shape[-1], device=x.device)
        return super().forward(x * ones.to(x.dtype)) + torch.zeros(1).to(x)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_what_is_fused_is_the_same_everywhere(state: Callable) -> None:
    kinds = Plain, PostNorm, MakesTensors, *(FAMILIES[n].make for n in ("lucidrains", "patchtsmixer"))
    model = nn.Sequential(*(kind() for kind in kinds), *make_model(drop_path_rate=0.2).blocks)
    expected = [(row.fused, row.reason) for row in fastmixer.fuse(model)]
    assert [fused for fused, _ in expected] == [True, False, True, True, True, True, True]
    fastmixer.unfuse(model)
    with state():
        assert [(row.fused, row.reason) for row in fastmixer.fuse(model)] == expected


@pytest.mark.parametrize(
    "state", ["meta", "meta by default", "fake tensors", "inference mode", "float16 by default"]
)
def test_a_model_made_there_is_fused_there(state: str) -> None:
    with STATES[state]():
        model = make_model()
        assert fastmixer.fuse(model, strict=True)


def test_a_model_fused_in_inference_mode_trains() -> None:
    model, twin = make_model(), make_model()
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 16, 16)
    with torch.inference_mode():
        fastmixer.fuse(model, strict=True)
        model(x)
    for each in (model, twin):
        each(x).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_a_first_call_in_inference_mode_and_then_training() -> None:
    """Own blocks look at themselves at the first call."""

    class Same(fastmixer.blocks.block.Mlp):
        pass

    block, x = fastmixer.MixerBlock(DIM, SEQ, mlp_layer=Same), torch.randn(2, SEQ, DIM)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        block(x)
    with torch.device("meta"):
        assert block.why_not_fused() is None
    block(x).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


class Draws(ConsumesRandomNumbers):
    """From every generator that there is."""

    def forward(self, x: Tensor) -> Tensor:
        random.random()
        numpy.random.rand()
        return super().forward(x)


def test_no_generator_and_no_switch_is_left_changed() -> None:
    model = nn.Sequential(Draws(), *make_model(drop_path_rate=0.2).blocks)

    def states() -> list[object]:
        return [
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            torch.get_default_dtype(),
            torch._C._len_torch_function_stack(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.are_deterministic_algorithms_enabled(),
            torch.is_anomaly_enabled(),
        ]

    for state in (contextlib.nullcontext, *STATES.values()):
        if state is FakeTensorMode:  # under which no state of a generator can be read
            continue
        with state():
            before = states()
            assert len(fastmixer.fuse(model, strict=True)) == 3
            fastmixer.unfuse(model)
            assert states() == before


def test_a_seed_changes_no_verdict() -> None:
    reasons = set()
    for seed in range(3):
        torch.manual_seed(seed)
        reasons.add(fastmixer.fuse(PostNorm()).rows[0].reason)
    assert len(reasons) == 1


def test_fusing_inside_a_transform_of_torch_func() -> None:
    block = Plain()

    def mapped(x: Tensor) -> Tensor:
        fastmixer.unfuse(block)
        assert fastmixer.fuse(block, strict=True)
        return block(x[None])[0]

    x = torch.randn(3, SEQ, DIM)
    torch.testing.assert_close(torch.vmap(mapped)(x), Plain.forward(block, x))

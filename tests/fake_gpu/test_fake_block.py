"""A fused block on the fake device: what is launched natively, how often and in which order."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch
from fake_cuda import SHARED_MEMORY, Gpu

import fastmixer
from fastmixer import configs
from fastmixer.ops import launch, plan

BF16 = torch.bfloat16
# Inference: up to 256 tokens, and above.
ONE_PASS = ["pack_weights", "row_moments", "token_mixing", "fc1", "fc2"]
TWO_PASS = ["pack_weights", "row_moments", "fc1", "fc2", "fc1", "fc2"]
# The backward of the halves, the channels' first. Last the gradient of x, then all sums of partial results.
FINISH = ["layer_norm_bwd", "sum_partials"]
CHANNELS = ["layer_norm_fwd", "pack_weights", "mlp_hidden_bwd", "layer_norm_fwd", *FINISH]
CHANNELS_LEAN = ["layer_norm_fwd", "pack_weights", "layer_norm_fwd", "mlp_hidden_bwd", *FINISH]
TOKENS = ["pack_weights", "layer_norm_fwd", "token_wgrad", "token_dgrad", *FINISH]


@pytest.fixture(autouse=True)
def fused() -> Iterator[None]:
    with fastmixer.backend("triton"):
        yield


def block(tokens: int = 21, dtype: torch.dtype = BF16, **options: float) -> fastmixer.MixerBlock:
    return fastmixer.MixerBlock(40, tokens, device="cuda", dtype=dtype, **options)


def inputs(tokens: int = 21, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(2, tokens, 40, device="cuda", dtype=dtype, requires_grad=True)


def test_tensors_are_on_the_device(gpu: Gpu) -> None:
    x = inputs()
    assert x.is_cuda and x.device == block().norm1.weight.device == torch.device("cuda", 0)
    assert torch.empty(2, device="meta").device.type == "meta" and not torch.empty(2, device="meta").is_cuda
    with torch.autocast("cuda", BF16):
        assert torch.is_autocast_enabled("cuda") and (x.float() @ x.float().mT).dtype == BF16
    with pytest.raises(NotImplementedError, match="not emulated"):
        torch.cuda.ipc_collect()


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_inference(gpu: Gpu, dtype: torch.dtype) -> None:
    model, x = block(dtype=dtype).eval(), inputs(dtype=dtype)
    with torch.no_grad():
        y = model(x)
        first = gpu.launches()
        again = model(x), gpu.launches()
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    for launches in (first, again[1]):
        assert [one.kernel for one in launches] == ONE_PASS, "five: weights are packed by one, in every call"
    assert all(0 < one.shared_memory <= SHARED_MEMORY for one in again[1][2:])
    assert not any(one.captured for one in again[1])


def backward(model: fastmixer.MixerBlock, x: torch.Tensor, gpu: Gpu) -> tuple[list[str], list[str]]:
    """What the forward launches, and what the backward does; every gradient is there, in its dtype."""
    y = model(x)
    forward = gpu.launched()
    y.sum().backward()
    for tensor in (x, *model.parameters()):
        assert tensor.grad.shape == tensor.shape and tensor.grad.dtype == tensor.dtype
    return forward, gpu.launched()


@pytest.mark.parametrize("memory, channels", [("balanced", CHANNELS), ("lean", CHANNELS_LEAN)])
def test_training(gpu: Gpu, memory: str, channels: list[str]) -> None:
    with fastmixer.memory(memory):
        forward, back = backward(block(), inputs(), gpu)
    assert forward == ONE_PASS
    assert back == [*channels, *TOKENS]


def test_training_with_drop_path(gpu: Gpu) -> None:
    """The scale goes to the kernels; the gradient of the token half's branch takes a launch more."""
    model = block(drop_path=0.5)
    forward, back = backward(model, inputs(), gpu)
    assert forward == ONE_PASS
    assert back == [*CHANNELS, TOKENS[0], "layer_norm_fwd", *TOKENS[1:]]
    steps = [step for made in plan._plans.values() for step in made.steps]
    launches = [step.launch for step in steps if isinstance(step, plan.Native)]
    scaled = [item.kernel_name for item in launches if item.args.get("scale_ptr") is not None]
    assert scaled.count("token_mixing") == scaled.count("fc2") == 1
    assert scaled.count("layer_norm_bwd") == 2


def test_two_passes(gpu: Gpu) -> None:
    forward, back = backward(block(300), inputs(300), gpu)
    assert forward == TWO_PASS
    assert back[: len(CHANNELS)] == CHANNELS
    rest = back[len(CHANNELS) :]
    assert rest == ["pack_weights", "layer_norm_fwd", "layer_norm_fwd", "mlp_hidden_bwd", *FINISH]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_training_in_other_dtypes(gpu: Gpu, dtype: torch.dtype) -> None:
    _, back = backward(block(dtype=dtype), inputs(dtype=dtype), gpu)
    assert back.count("token_dgrad") == back.count("mlp_hidden_bwd") == 1
    assert back.count("pack_weights") == back.count("layer_norm_bwd") == 2 and back[-2:] == FINISH


def test_tiles_that_need_too_much_shared_memory_are_an_error(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = configs.TileConfig(128, 128, 128, num_warps=8, num_stages=4)  # 4 x (A and B, 32 KB each)

    def select(op: str, problem: configs.Problem, target: configs.Target) -> configs.Choice:
        return huge if op == "channel_fc2" else configs.choose_kernels(op, problem, target)

    monkeypatch.setattr(launch, "context_of", lambda device, kept=None, **_: launch.Context(
        configs.target_of(device), kept, select
    ))  # fmt: skip
    from triton.runtime.errors import OutOfResources

    model, x = block().eval(), inputs()
    with (
        torch.no_grad(),
        pytest.raises(OutOfResources, match=rf"shared memory.*Hardware limit: {SHARED_MEMORY}"),
    ):
        model(x)
    assert gpu.launched() == [], "nor is what comes before it"


class Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [(f"{of}{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "XYZ"]
    _fields_ += [("shared", ctypes.c_uint), ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p)]
    _fields_ += [("count", ctypes.c_uint)]


def test_the_driver_refuses_shared_memory(gpu: Gpu) -> None:
    """48 KB, and more only where it was asked for first, up to the device's limit."""
    driver, function, attribute = gpu.driver, ctypes.c_void_p(), 8  # MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert driver.cuModuleGetFunction(ctypes.byref(function), None, b"_some_kernel") == 0

    def refuses(shared: int) -> bool:
        config = Config(7, 1, 1, 128, 1, 1, shared)
        return driver.cuLaunchKernelEx(ctypes.byref(config), function, None, None) != 0

    assert not refuses(48 * 1024) and refuses(48 * 1024 + 1)
    assert driver.cuFuncSetAttribute(function, attribute, SHARED_MEMORY + 1) != 0 and refuses(48 * 1024 + 1)
    assert driver.cuFuncSetAttribute(function, attribute, SHARED_MEMORY) == 0
    assert not refuses(SHARED_MEMORY) and refuses(SHARED_MEMORY + 1)
    assert gpu.launched() == ["some", "some"]

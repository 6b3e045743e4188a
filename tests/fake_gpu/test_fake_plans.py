"""Plans on the fake device: launched without Triton's JIT, seen by its hooks, never stale."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from fake_cuda import Gpu
from test_fake_block import BF16, CHANNELS, ONE_PASS, TOKENS, block, inputs

import fastmixer
from fastmixer import configs
from fastmixer.configs import Problem, TileConfig, tables
from fastmixer.configs.table_file import Entry
from fastmixer.ops import launch, plan

OURS = str(Path(fastmixer.__file__).parent)
TRAINING = [*ONE_PASS, *CHANNELS, *TOKENS]


@pytest.fixture(autouse=True)
def fused():
    with fastmixer.backend("triton"):
        yield


def train(model: fastmixer.MixerBlock, x: torch.Tensor) -> None:
    model(x).sum().backward()


def test_after_the_first_call_triton_only_launches(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the first call is launched by the JIT: it compiles for the plan."""
    from triton.runtime.jit import JITFunction

    asked: list[bool] = []
    run = JITFunction.run

    def noted(self, *args, warmup: bool, **kwargs):
        asked.append(warmup)
        return run(self, *args, warmup=warmup, **kwargs)

    monkeypatch.setattr(JITFunction, "run", noted)
    model, x = block(), inputs()
    train(model, x)
    assert gpu.launched() == TRAINING and asked == [True] * len(TRAINING)
    for _ in range(2):
        asked.clear()
        train(model, x)
        assert gpu.launched() == TRAINING and not asked
    # Other blocks of the same shape use the same plans.
    train(block(), x)
    assert gpu.launched() == TRAINING and not asked


def test_a_triton_that_does_not_compile_without_a_launch(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the JIT launches, in every call."""
    from triton.runtime.jit import JITFunction, KernelInterface

    monkeypatch.delattr(KernelInterface, "warmup")
    launched, run = [], JITFunction.run
    monkeypatch.setattr(
        JITFunction, "run", lambda *args, **kwargs: launched.append(1) or run(*args, **kwargs)
    )
    model, x = block(), inputs()
    for _ in range(2):
        train(model, x)
        assert gpu.launched() == TRAINING and len(launched) == len(TRAINING)
        launched.clear()


def test_launch_hooks_see_every_launch(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """As profilers set them, before a plan is made or after."""
    from triton import knobs

    model, x = block().eval(), inputs()
    entered, left = [], []
    with torch.no_grad():
        model(x)
        monkeypatch.setattr(
            knobs.runtime, "launch_enter_hook", lambda data: entered.append(data.get()["name"])
        )
        monkeypatch.setattr(knobs.runtime, "launch_exit_hook", lambda data: left.append(data.get()["name"]))
        model(x)
        model(x[:1])
    names = [f"_{name}_kernel" for name in ONE_PASS]
    assert entered == left == names * 2


def test_the_way_to_a_kernel_is_short(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """From ``MixerBlock.forward`` to Triton's launcher: four frames in three files."""
    from triton import knobs

    model, x = block().eval(), inputs()
    ways: list[list[tuple[str, str]]] = []

    def hook(data: object) -> None:
        frame, way = sys._getframe(1), []
        while frame.f_code.co_name != "_call_impl":
            way.append((frame.f_code.co_filename, frame.f_code.co_name))
            frame = frame.f_back
        ways.append([(Path(file).name, name) for file, name in reversed(way) if file.startswith(OURS)])

    with torch.no_grad():
        model(x)
        monkeypatch.setattr(knobs.runtime, "launch_enter_hook", hook)
        model(x)
    assert len(ways) == len(ONE_PASS) and len({tuple(way) for way in ways}) == 1
    files = ["block.py", "fused_forward.py", "plan.py", "plan.py"]
    names = ["forward", "__call__", "first", "__call__"]
    assert ways[0] == [*zip(files, names, strict=True)]


@pytest.mark.parametrize("trains, most", [(False, 60), (True, 140)])
def test_a_call_enters_few_functions_of_ours(gpu: Gpu, trains: bool, most: int) -> None:
    """A plan decides nothing: what a call costs the host is few calls, whatever the machine."""
    model, x = block(), inputs().requires_grad_(trains)
    entered: list[str] = []

    def profile(frame, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            entered.append(frame.f_code.co_name)

    with torch.set_grad_enabled(trains):
        for _ in range(2):
            entered.clear()
            sys.setprofile(profile)
            y = model(x)
            if trains:
                y.backward(x)
            sys.setprofile(None)
    assert 5 < len(entered) <= most, (len(entered), entered)


# ---- nothing is stale ------------------------------------------------------------------------------------


def test_a_table_that_changes_changes_the_next_call(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTMIXER_CACHE_DIR", str(tmp_path))
    tables.table_of.cache_clear()
    model, x = block().eval(), inputs()
    target, problem = configs.target_of(x.device), Problem(2, 21, 40, 160, BF16, BF16)

    def programs() -> int:
        """Of fc2, whose output is 42 by 40."""
        with torch.no_grad():
            model(x)
        return gpu.launches()[-1].programs

    before = programs()
    small = TileConfig(32, 32, 32, num_warps=4, num_stages=2)
    tables.record(target.name, Entry("channel_fc2", problem, small, 1.0))
    assert programs() == programs() == 4 != before


def test_triton_s_own_switches_count(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those by which it compiles other code, and hooks that only its JIT calls."""
    from triton import knobs

    model, x = block().eval(), inputs()
    with torch.no_grad():
        model(x)
        gpu.compiled()
        monkeypatch.setattr(knobs.runtime, "debug", True)
        model(x)
        assert sorted(gpu.compiled()) == sorted(ONE_PASS)
        monkeypatch.setattr(knobs.runtime, "debug", False)
        model(x)
        gpu.launched()
        called: list[object] = []
        launch.kernels().fc2.add_pre_run_hook(lambda *args, **kwargs: called.append(kwargs["y_ptr"]))
        model(x)
        assert len(called) == 1 and isinstance(called[0], torch.Tensor)
        assert gpu.launched() == ONE_PASS


def test_the_tf32_switch_counts(gpu: Gpu) -> None:
    model, x = block(dtype=torch.float32), inputs(dtype=torch.float32)
    precision = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        train(model, x)
        train(model, x)
        gpu.compiled()
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        train(model, x)
        assert {"token_mixing", "fc1", "fc2", "mlp_hidden_bwd", "token_dgrad"} <= set(gpu.compiled())
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        train(model, x)
        assert not gpu.compiled()
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


def test_parameters_are_read_where_they_are(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced, moved and at another alignment: the launches get their addresses of now."""
    model, x = block().eval(), inputs()
    given: list[int] = []

    def noted() -> int:
        """The address of the weight that packing reads first."""
        given.clear()
        with torch.no_grad():
            model(x)
        return given[0]

    call = plan._bound

    def bound(content: tuple, addresses: list[int]) -> tuple:
        found = call(content, addresses)
        if isinstance(found[0], tuple):
            given.append(found[0][0])
        return found

    monkeypatch.setattr(plan, "_bound", bound)
    linear = model.mlp_tokens.fc1
    assert noted() == linear.weight.data_ptr()
    linear.weight = torch.nn.Parameter(linear.weight.detach().clone())
    assert noted() == linear.weight.data_ptr()
    kept = linear.weight.data
    linear.weight.data = torch.empty(kept.numel() + 1, dtype=BF16, device="cuda")[1:].view(kept.shape)
    gpu.compiled()
    assert noted() == linear.weight.data_ptr() and linear.weight.data_ptr() % 16
    assert gpu.compiled() == ["pack_weights"], "for an address that is not aligned"


def test_descriptors_are_bound_to_the_memory_of_each_call(gpu: Gpu) -> None:
    """The driver is told of every matrix in every call: where it lies, its rows, and tiles of a box."""
    model = fastmixer.MixerBlock(64, 32, device="cuda", dtype=BF16).eval()
    with torch.no_grad(), configs.forced(channel_fc1="tma_128x256", channel_fc2="tma_128x128"):
        first, second = (torch.randn(3, 32, 64, device="cuda", dtype=BF16) for _ in range(2))
        outputs = [model(x) for x in (first, second, first)]
        assert gpu.launched() == ["pack_weights", "row_moments", "token_mixing", "fc1", "fc2"] * 3
        maps = gpu.tensor_maps()
        assert len(maps) == 3 * 7
        for call, output in enumerate(outputs):
            x, w, hidden, read, w2, residual, y = maps[7 * call : 7 * call + 7]
            assert (x.rows, x.columns, x.row_bytes, x.box_rows, x.box_columns) == (96, 64, 128, 128, 64)
            assert (w.rows, w.columns, w.box_rows, w.box_columns) == (256, 64, 256, 64)
            assert (hidden.rows, hidden.columns, hidden.box_rows, hidden.box_columns) == (96, 256, 128, 64)
            assert read.address == hidden.address and w2.address == model.mlp_channels.fc2.weight.data_ptr()
            assert residual.address == x.address and y.address == output.data_ptr()
            assert len({x.address, hidden.address, y.address}) == 3
            assert (y.rows, y.columns, y.box_columns) == (96, 64, 64)

"""What users do around a fused model: threads, averages, parametrizations, copies, streams, several GPUs."""

from __future__ import annotations

import copy
import io
import pickle
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm.utils
import torch
from foreign_blocks import DIM, SEQ
from timm.models.mlp_mixer import MixerBlock as TimmBlock
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import swa_utils

import fastmixer

FP32, BF16 = torch.float32, torch.bfloat16
KINDS = TimmBlock, fastmixer.MixerBlock


@pytest.fixture(autouse=True)
def triton_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("triton"):
        yield


def fused(device: torch.device | str = "cpu", kind: type[nn.Module] = TimmBlock) -> nn.Module:
    """A fused block in a container, in eval, with weights that are not trivial."""
    made = nn.Sequential(kind(DIM, SEQ)).to(device).eval()
    change(made)
    fastmixer.fuse(made, strict=True)
    return made


def change(model: nn.Module) -> None:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)


@torch.no_grad()
def change_and_back(model: nn.Module) -> None:
    """What was packed does not count any more."""
    for parameter in model.parameters():
        parameter.neg_().neg_()


def tokens(device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(2, SEQ, DIM, device=device)


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def run_anew(model: nn.Module, x: Tensor) -> Tensor:
    """What the weights are worth now, of a copy."""
    return run(copy.deepcopy(model), x)


# ---- threads -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_model(kind: type[nn.Module], device: torch.device) -> None:
    """In fp32 and under autocast at once, from the first call on and after every change of the weights."""
    model, x = fused(device, kind), tokens(device)

    def call(autocast: bool, model: nn.Module = model) -> Tensor:
        with fastmixer.backend("triton"), torch.autocast(device.type, BF16, enabled=autocast):
            return run(model, x)

    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            change(model)
            twin = copy.deepcopy(model)
            expected = [call(autocast, twin) for autocast in (False, True)]
            assert not torch.equal(*expected)
            for found, wanted in zip(pool.map(call, [False, True] * 4), expected * 4, strict=True):
                assert torch.equal(found, wanted)


def test_threads_train_a_model(device: torch.device) -> None:
    model, inputs = fused(device).train(), [tokens(device) for _ in range(2)]

    def gradients(x: Tensor) -> tuple[Tensor, ...]:
        with fastmixer.backend("triton"):
            return torch.autograd.grad(model(x).square().sum(), list(model.parameters()))

    expected = [gradients(x) for x in inputs]
    change_and_back(model)
    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(gradients, inputs * 2), expected * 2, strict=True):
            assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


# ---- never a stale packed weight ---------------------------------------------------------------------------


def in_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in model.parameters():
            parameter.mul_(1.5)


@torch.no_grad()
def for_each(model: nn.Module) -> None:
    torch._foreach_mul_(list(model.parameters()), 1.5)


@torch.no_grad()
def through_the_state_dict(model: nn.Module) -> None:
    for tensor in model.state_dict().values():
        tensor.mul_(1.5)


def from_a_vector(model: nn.Module) -> None:
    vector = nn.utils.parameters_to_vector(model.parameters()).detach()
    nn.utils.vector_to_parameters(vector * 1.5, model.parameters())


def swap_tensors(model: nn.Module) -> None:
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach() * 1.5))


def load_by_swapping(model: nn.Module) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def there_and_back(model: nn.Module) -> None:
    """Rounded in between: the same parameters in new memory."""
    model.to(BF16).to(FP32)


CHANGES = (
    in_inference_mode, for_each, through_the_state_dict, from_a_vector, swap_tensors, load_by_swapping,
    there_and_back,
)  # fmt: skip


@pytest.mark.parametrize("changed", CHANGES)
def test_changed_weights_are_used(changed: Callable[[nn.Module], None], device: torch.device) -> None:
    """Beside those of ``test_packing``: twice, as what PyTorch does at first may differ."""
    model, x = fused(device), tokens(device)
    results = [run(model, x)]
    for _ in range(1 if changed is there_and_back else 2):
        changed(model)
        results.append(run(model, x))
        assert torch.equal(results[-1], run_anew(model, x))
        assert not torch.equal(results[-1], results[-2])


def test_weights_of_one_call_are_used_in_it_alone(fused_calls: list) -> None:
    model, x = fused(), tokens()
    before = run(model, x)
    other = {name: tensor * 1.5 for name, tensor in model.state_dict().items()}
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(other)
    with torch.no_grad():
        found = torch.func.functional_call(model, other, (x,))
    assert len(fused_calls) == 2 and torch.equal(found, run(loaded, x)) and not torch.equal(found, before)
    assert torch.equal(run(model, x), before)


AVERAGES = {
    "torch": (BF16, swa_utils.AveragedModel),
    "torch, ema": (
        FP32,
        lambda model: swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5)),
    ),
    "torch, one by one": (
        FP32,
        lambda model: swa_utils.AveragedModel(model, avg_fn=swa_utils.get_ema_avg_fn(0.5)),
    ),
    "timm v2": (FP32, lambda model: timm.utils.ModelEmaV2(model, decay=0.5)),
    "timm v3": (FP32, lambda model: timm.utils.ModelEmaV3(model, decay=0.5)),
    "timm v3, rounding stochastically": (BF16, lambda model: timm.utils.ModelEmaV3(model, decay=0.5)),
    "timm v3, one by one": (FP32, lambda model: timm.utils.ModelEmaV3(model, decay=0.5, foreach=False)),
}


@pytest.mark.parametrize(("dtype", "average"), AVERAGES.values(), ids=AVERAGES)
def test_averages_of_a_model_are_fused_and_current(
    dtype: torch.dtype, average: Callable[[nn.Module], nn.Module], fused_calls: list, device: torch.device
) -> None:
    model, x = fused(device).to(dtype), tokens(device).to(dtype)
    result = run(model, x)
    averaged = average(model).eval()
    update = getattr(averaged, "update_parameters", None) or averaged.update
    update(model)
    assert torch.equal(run(averaged.module, x), result)
    for _ in range(2):
        change(model)
        update(model)
        fused_calls.clear()
        previous, result = result, run(averaged.module, x)
        assert len(fused_calls) == 1 and not torch.equal(result, previous)
        assert torch.equal(result, run_anew(averaged.module, x))
        assert torch.equal(run(model, x), run_anew(model, x))
    model.load_state_dict(averaged.module.state_dict())
    assert torch.equal(run(model, x), result)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "undone"])
@pytest.mark.filterwarnings("ignore::fastmixer.FallbackWarning")  # asked for by fused_calls
def test_a_parametrization_comes_and_goes(keep: bool, kind: type[nn.Module], fused_calls: list) -> None:
    model, x = fused(kind=kind), tokens()
    linear = model[0].mlp_channels.fc1
    before, original = run(model, x), linear.weight.detach().clone()
    parametrize.register_parametrization(linear, "weight", Doubled())
    eager = nn.Sequential(TimmBlock(DIM, SEQ)).eval()
    for factor in (1, 3):  # the second time with the original changed
        with torch.no_grad():
            linear.parametrizations.weight.original.copy_(factor * original)
        weights = {
            name: tensor for name, tensor in model.state_dict().items() if "parametrizations" not in name
        }
        eager.load_state_dict(weights | {"0.mlp_channels.fc1.weight": 2 * factor * original})
        assert torch.equal(run(model, x), run(eager, x))
    assert len(fused_calls) == 1, "unfused while it is there"
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=keep)
    assert torch.equal(linear.weight, (6 if keep else 3) * original)
    after = run(model, x)
    assert len(fused_calls) == 2 and torch.equal(after, run_anew(model, x)) and not torch.equal(after, before)


# ---- copies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_a_model_carry_nothing_but_the_model(kind: type[nn.Module]) -> None:
    model, x = fused(kind=kind), tokens()
    expected = run(model, x)
    file = io.BytesIO()
    torch.save(model, file)
    stored = [name for name in zipfile.ZipFile(file).namelist() if "/data/" in name]
    assert len(stored) == len(list(model.parameters()))
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(run(other, x), expected)


# ---- devices and streams -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("trains", [False, True], ids=["inference", "training"])
def test_launches_go_to_the_current_stream(trains: bool) -> None:
    """On another stream the kernels would read x before it is there."""
    model, x = fused("cuda"), tokens("cuda")

    def step(x: Tensor) -> list[Tensor]:
        if not trains:
            return [run(model, x)]
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    expected, late, stream = step(x), torch.zeros_like(x), torch.cuda.Stream()
    change_and_back(model)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(x)
        found = step(late)
    stream.synchronize()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_moves_to_a_gpu_that_is_not_the_current_one(fused_calls: list) -> None:
    model = fused("cuda:0").train()
    x = tokens("cuda:0")
    results = []
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        change_and_back(model.to(device))
        y = model(x.to(device))
        gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()))
        assert torch.cuda.current_device() == 0 and y.device == torch.device(device)
        results.append([tensor.detach().cpu() for tensor in (y, *gradients)])
    assert len(fused_calls) == 3
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        for other in results[1:]:
            assert all(torch.equal(mine, its) for mine, its in zip(other, results[0], strict=True))


# ---- deterministic algorithms ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_deterministic_algorithms_are_what_runs_anyway(kind: type[nn.Module], device: torch.device) -> None:
    """Nothing refuses, and every bit is the same; memory that nobody has written would be NaN."""
    model, x = fused(device, kind).train(), tokens(device)

    def step() -> list[Tensor]:
        change_and_back(model)
        y = model(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]

    expected = step()
    torch.use_deterministic_algorithms(True)
    try:
        found = step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))

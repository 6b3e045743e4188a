"""Success means that the model holds the file's values; after an error it is what it was, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_checkpoint import assert_equal_weights, make_model
from test_checkpoint_files import refusal, saved
from torch import nn

from fastmixer import load_checkpoint


def bits(model: nn.Module) -> dict[str, bytes]:
    """Of every parameter and buffer, those that no state dict has included."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, value in tensors.items()
    }


def assert_unchanged(model: nn.Module, path: Path, message: str, **kwargs: object) -> None:
    before, gelus = bits(model), [m.approximate for m in model.modules() if isinstance(m, nn.GELU)]
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model, path, **kwargs)
    assert bits(model) == before
    assert [m.approximate for m in model.modules() if isinstance(m, nn.GELU)] == gelus


def test_a_model_without_values_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, make_model().state_dict())
    with torch.device("meta"):
        meta = make_model()
    with pytest.raises(ValueError, match=r"stem.proj.weight is on the meta device.*to_empty"):
        load_checkpoint(meta, path)
    lazy = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(
        ValueError, match="the model's 0.weight is not initialised: call the model on a batch"
    ):
        load_checkpoint(lazy, path)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got .*Path"):
        load_checkpoint(path, make_model())


def test_a_file_without_values_is_refused(tmp_path: Path) -> None:
    with torch.device("meta"):
        path = saved(tmp_path, make_model().state_dict())
    assert "entry 'stem.proj.weight' was saved from the meta device" in refusal(path)


class Stateful(nn.Linear):
    """A module with a state of its own beside its tensors."""

    def __init__(self, state: object = None) -> None:
        super().__init__(2, 2)
        self.state = state

    def get_extra_state(self) -> object:
        return self.state

    def set_extra_state(self, state: object) -> None:
        self.state = state


@pytest.mark.parametrize("state", [{"scale": 2.0, "count": 3}, torch.ones(3)], ids=str)
def test_extra_state_is_loaded(tmp_path: Path, state: object) -> None:
    source, target = nn.Sequential(Stateful(state)), nn.Sequential(Stateful("before"))
    load_checkpoint(target, saved(tmp_path, source.state_dict()))
    assert torch.equal(target[0].weight, source[0].weight)
    torch.testing.assert_close(target[0].state, state)


def test_extra_state_that_is_missing_or_that_nothing_takes_is_listed(tmp_path: Path) -> None:
    weights = Stateful({"scale": 2.0}).state_dict()
    assert "unexpected (1):\n  _extra_state" in refusal(saved(tmp_path, weights), nn.Linear(2, 2))
    del weights["_extra_state"]
    model = Stateful("before")
    assert_unchanged(model, saved(tmp_path, weights), r"missing \(1\):\n  _extra_state")
    assert model.state == "before"


# ---- all or nothing ----------------------------------------------------------------------------------------


def fail_late(model: nn.Module) -> None:
    """A hook of the last module: everything before it is written by then."""

    def hook(module: nn.Module, *args: object) -> None:
        raise RuntimeError("a hook that raises")

    model.head.register_load_state_dict_pre_hook(hook)


def fail_after(model: nn.Module) -> None:
    def hook(module: nn.Module, keys: object) -> None:
        module.head.register_parameter("bias", nn.Parameter(torch.zeros(3)))
        raise RuntimeError("a hook that raises")

    model.register_load_state_dict_post_hook(hook)


def refuse_copy(model: nn.Module) -> None:
    """A parameter whose elements share memory cannot be written."""
    model.head.weight = nn.Parameter(torch.zeros(1, 8).expand(3, 8))


def change_values(model: nn.Module) -> None:
    def hook(module: nn.Module, weights: dict, prefix: str, *args: object) -> None:
        weights[f"{prefix}bias"] = weights[f"{prefix}bias"] + 1

    model.head.register_load_state_dict_pre_hook(hook)


@pytest.mark.parametrize(
    "obstacle, message",
    [
        (fail_late, "RuntimeError: a hook that raises"),
        (fail_after, "RuntimeError: a hook that raises"),
        (refuse_copy, "could not be loaded into the MlpMixer, which is unchanged.*head.weight"),
        (change_values, r"did not hold the values of .* \(head.bias\): a hook changed them"),
    ],
)
def test_what_fails_half_way_leaves_everything_as_it_was(
    tmp_path: Path, obstacle: Callable[[nn.Module], None], message: str
) -> None:
    source, target = make_model(), make_model()
    with torch.no_grad():
        target.norm.bias[0] = float("nan")
        target.register_buffer("scratch", torch.ones(2), persistent=False)
    obstacle(target)
    path = saved(tmp_path, {name: value + 1 for name, value in source.state_dict().items()})
    assert_unchanged(target, path, f"(?s){message}", gelu="tanh")


def test_an_interrupt_half_way_too(tmp_path: Path) -> None:
    model = make_model()
    before = bits(model)

    def hook(*args: object) -> None:
        raise KeyboardInterrupt

    model.head.register_load_state_dict_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(model, saved(tmp_path, make_model().state_dict()))
    assert bits(model) == before


def test_an_extra_state_goes_back_too(tmp_path: Path) -> None:
    model = nn.Sequential(Stateful({"scale": [1.0]}), nn.Linear(2, 2))
    weights = nn.Sequential(Stateful("other"), nn.Linear(2, 2)).state_dict()

    def hook(*args: object) -> None:
        raise RuntimeError("a hook that raises")

    model[1].register_load_state_dict_pre_hook(hook)
    assert_unchanged(model, saved(tmp_path, weights), "a hook that raises")
    assert model[0].state == {"scale": [1.0]}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_tied_parameters(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    source, target = Tied(), Tied()
    save_model(source, tmp_path / "tied.safetensors")  # keeps them under one name
    load_checkpoint(target, tmp_path / "tied.safetensors")
    assert_equal_weights(target, source)
    weights = source.state_dict()
    weights["first.weight"] = weights["first.weight"] + 1
    path = saved(tmp_path, weights)
    assert_unchanged(target, path, r"\(first.weight\).* or they are tied and the file has two values")


def test_parameters_made_in_inference_mode(tmp_path: Path) -> None:
    with torch.inference_mode():
        target = make_model()
    source = make_model()
    load_checkpoint(target, saved(tmp_path, source.state_dict()))
    assert_equal_weights(target, source)
    assert target.head.weight.is_inference() and target.head.weight.requires_grad


def test_a_model_that_is_mapped_from_the_very_file(tmp_path: Path) -> None:
    source, target = make_model(), make_model()
    path = saved(tmp_path, source.state_dict())
    before = path.read_bytes()
    target.load_state_dict(torch.load(path, mmap=True, weights_only=True), assign=True)
    load_checkpoint(target, path)
    assert_equal_weights(target, source)
    assert path.read_bytes() == before


# ---- numbers -----------------------------------------------------------------------------------------------


def test_nan_and_infinity_are_values(tmp_path: Path) -> None:
    model = nn.Linear(2, 2, bias=False)
    values = torch.tensor([[float("nan"), float("inf")], [-float("inf"), -0.0]])
    load_checkpoint(model, saved(tmp_path, {"weight": values}))
    torch.testing.assert_close(model.weight.detach(), values, rtol=0, atol=0, equal_nan=True)


class Holder(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(3).to(dtype))


F8 = torch.float8_e4m3fn


@pytest.mark.parametrize(
    "theirs, ours, fits",
    [
        (torch.tensor([0.5, 1.0, 2.0]), torch.int64, False),
        (torch.tensor([3.0, 1.0, 2.0]), torch.int64, True),  # an averaged num_batches_tracked
        (torch.tensor([3, 1, 300]), torch.int8, False),
        (
            torch.tensor([3, 1, 127], dtype=torch.int8),
            torch.float32,
            False,
        ),  # quantised, its scales elsewhere
        (torch.tensor([1j, 0, 0]), torch.float32, False),
        (torch.tensor([1e6, 0.0, 0.0]), torch.float16, False),
        (torch.tensor([0.1, float("inf"), float("nan")]), torch.float16, True),
        (torch.tensor([0.1, 0.5, 2.0]).to(F8), torch.float32, True),
        (torch.tensor([0.1, 0.5, 2.0]), F8, True),
        (torch.tensor([1e4, 0.5, 2.0]), F8, False),
        (torch.tensor([True, False, True]), torch.float32, False),
        (torch.tensor([1, 0, 1], dtype=torch.uint8), torch.bool, True),
    ],
    ids=str,
)
def test_numbers_are_rounded_and_never_lost(
    tmp_path: Path, theirs: torch.Tensor, ours: torch.dtype, fits: bool
) -> None:
    model = Holder(ours)
    path = saved(tmp_path, {"value": theirs})
    if not fits:
        message = f"out of range \\(1\\):\n  value: {theirs.dtype} in the file, {ours} in the model"
        assert_unchanged(model, path, message)
        return
    load_checkpoint(model, path)
    found = model.value.float()
    torch.testing.assert_close(found, theirs.to(ours).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*sparse:UserWarning", "ignore:Sparse:UserWarning")
def test_sparse_entries_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path, {"weight": torch.eye(2).to_sparse()})
    assert "entry 'weight' is quantised or sparse_coo" in refusal(path, nn.Linear(2, 2, bias=False))


# ---- GELUs -------------------------------------------------------------------------------------------------


class Renamed(nn.Module):
    """An MLP whose activation has another name than timm's."""

    def __init__(self, activation: nn.Module | None) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2, 2), nn.Linear(2, 2)
        if activation is not None:
            self.nonlinearity = activation


def test_gelus_of_any_name_are_set(tmp_path: Path) -> None:
    model = nn.Sequential(Renamed(nn.GELU()), nn.Sequential(nn.Linear(2, 2), nn.GELU()))
    report = load_checkpoint(model, saved(tmp_path, model.state_dict()), gelu="tanh")
    assert report.gelus == 2 and model[0].nonlinearity.approximate == model[1][1].approximate == "tanh"


@pytest.mark.parametrize("model", [nn.Sequential(Renamed(None)), nn.Sequential(nn.Linear(2, 2))])
def test_a_model_whose_gelus_cannot_be_set_is_refused(tmp_path: Path, model: nn.Module) -> None:
    """As of an MLP that calls torch.nn.functional.gelu."""
    path = saved(tmp_path, {name: value + 1 for name, value in model.state_dict().items()})
    assert_unchanged(model, path, "torch.nn.GELU.*gelu='keep'", gelu="tanh")
    load_checkpoint(model, path, gelu="keep")


def test_a_sharded_model_is_referred_to_what_loads_it(tmp_path: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DeviceMesh, distribute_module

    path = saved(tmp_path, nn.Linear(2, 2).state_dict())
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = distribute_module(nn.Linear(2, 2), DeviceMesh("cpu", [0]))
        with pytest.raises(ValueError, match="weight is a DTensor: load before .*set_model_state_dict"):
            load_checkpoint(model, path)
    finally:
        dist.destroy_process_group()

"""Putting weights into a model: all of them, proven afterwards, or the model as it was."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def expected_of(model: nn.Module) -> dict[str, object]:
    """The model's state dict, extra states included; ValueError if a tensor of it cannot hold values yet."""
    expected = model.state_dict()
    for name, value in expected.items():
        if is_lazy(value):
            problem = "is not initialised: call the model on a batch first, which sizes its lazy modules"
        elif hasattr(value, "device_mesh"):
            problem = (
                "is a DTensor: load before the model is sharded, or with "
                "torch.distributed.checkpoint.state_dict.set_model_state_dict"
            )
        elif isinstance(value, Tensor) and value.is_meta:
            problem = (
                "is on the meta device, which holds no values: make the model on a real one, or call "
                "model.to_empty(device='cpu') first"
            )
        else:
            continue
        raise ValueError(f"the model's {name} {problem}. The model is unchanged.")
    return expected


def with_tied(weights: dict[str, Tensor], expected: Mapping[str, object]) -> dict[str, Tensor]:
    """``weights``, and for a name that they lack those of another name of the very same parameter.

    safetensors' save_model keeps tied weights under one name only.
    """
    places = {
        name: (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        for name, value in expected.items()
        if isinstance(value, Tensor) and value.numel() and value.data_ptr()
    }
    names = {place: name for name, place in reversed(places.items()) if name in weights}
    tied = {name: names[place] for name, place in places.items() if name not in weights and place in names}
    return {**weights, **{name: weights[other] for name, other in tied.items()}}


def can_hold(dtype: torch.dtype, value: Tensor) -> bool:
    """Whether ``dtype`` is for the same kind of numbers, and they are in its range."""
    if dtype == value.dtype:
        return True
    if not dtype.is_floating_point and not dtype.is_complex:
        # Floats that are whole numbers will do: an average of counters.
        return not value.is_complex() and bool(_same(value.to(dtype).to(value.dtype), value).all())
    if dtype.is_complex or not value.is_floating_point():
        return dtype.is_complex and value.is_complex()
    limits, wide = torch.finfo(dtype), value.double()  # float8 saturates, or becomes NaN
    return not bool(((wide.abs() > limits.max * (1 + limits.eps)) & wide.isfinite()).any())


def load(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """``load_state_dict``, and a comparison of every tensor afterwards.

    Raises:
        ValueError: a hook or a parameter refused, or something holds other values than the file's, as tied
            parameters with two values do. The model is then as it was, bit for bit.
    """
    # A parameter that was made in inference mode can be written in that mode only.
    tensors = [*model.parameters(), *model.buffers()]
    inference = torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in tensors)
    with torch.inference_mode(inference), torch.no_grad(), _restored_on_error(model):
        try:
            model.load_state_dict(weights, strict=True)
        except Exception as error:
            lines = "\n".join(str(error).splitlines()[:8])
            raise ValueError(
                f"{path} could not be loaded into the {type(model).__name__}, which is unchanged: "
                f"{type(error).__name__}: {lines}"
            ) from error
        now = model.state_dict()
        wrong = [name for name, value in weights.items() if not _holds(now.get(name), value)]
        if wrong:
            raise ValueError(
                f"after loading, {len(wrong)} tensors of the {type(model).__name__} did not hold the values "
                f"of {path} ({', '.join(wrong[:4])}): a hook changed them, or they are tied and the "
                "file has two values for them. The model is unchanged."
            )


def _holds(own: object, value: object) -> bool:
    """Whether a tensor of the model has the file's values in its own dtype; extra states are the module's."""
    if not isinstance(value, Tensor) or not isinstance(own, Tensor):
        return True
    return own.shape == value.shape and bool(_same(own, value.to(own.device, own.dtype)).all())


def _same(one: Tensor, other: Tensor) -> Tensor:
    """Elementwise, NaN being equal to NaN."""
    if one.dtype.itemsize == 1 and one.is_floating_point():  # float8 has no comparison
        one, other = one.float(), other.float()
    return torch.isclose(one, other, rtol=0, atol=0, equal_nan=True)


@contextlib.contextmanager
def _restored_on_error(model: nn.Module) -> Iterator[None]:
    """Puts parameters, buffers and extra states back if the body raises, an interrupt included."""
    slots = [slot for module in model.modules() for slot in (module._parameters, module._buffers)]
    contents = [dict(slot) for slot in slots]
    copies = {
        tensor: tensor.detach().to("cpu", copy=True)  # a GPU may be full
        for content in contents
        for tensor in content.values()
        if tensor is not None and not tensor.is_meta and not is_lazy(tensor)
    }
    extras = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    try:
        yield
    except BaseException:
        for slot, before in zip(slots, contents, strict=True):
            slot.clear()
            slot.update(before)
        for tensor, before in copies.items():
            if not _same_bits(tensor, before):  # what refuses to be written was not
                tensor.copy_(before)
        for module, state in extras:
            module.set_extra_state(state)
        raise


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = (t.detach().cpu().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)

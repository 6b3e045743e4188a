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
            raise ValueError(
                f"the model's {name} is not initialised: call the model on a batch first, which gives its "
                "lazy modules their sizes. The model is unchanged."
            )
        if hasattr(value, "device_mesh"):
            raise ValueError(
                f"the model's {name} is a DTensor: load before the model is sharded, or with "
                "torch.distributed.checkpoint.state_dict.set_model_state_dict. The model is unchanged."
            )
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(
                f"the model's {name} is on the meta device, which holds no values: make the model on a real "
                "one, or call model.to_empty(device='cpu') first. The model is unchanged."
            )
    return expected


def with_tied(weights: dict[str, Tensor], expected: Mapping[str, object]) -> dict[str, Tensor]:
    """``weights``, and for a name that they lack those of another name of the very same parameter.

    safetensors' save_model keeps tied weights under one name only.
    """
    found = dict(weights)
    names: dict[object, str] = {}
    for name, value in expected.items():
        if name in weights and isinstance(value, Tensor) and value.numel() and value.data_ptr():
            names.setdefault(_place(value), name)
    for name, value in expected.items():
        if name not in weights and isinstance(value, Tensor) and _place(value) in names:
            found[name] = weights[names[_place(value)]]
    return found


def _place(value: Tensor) -> object:
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def lossy(expected: Mapping[str, object], weights: Mapping[str, Tensor]) -> list[str]:
    """Entries that the model's dtype cannot hold: of another kind of number, or out of its range."""
    found = []
    for name, value in weights.items():
        own = expected.get(name)
        if not isinstance(own, Tensor) or not isinstance(value, Tensor) or own.dtype == value.dtype:
            continue
        if _kind(own) == _kind(value) == "floating-point":
            limits = torch.finfo(own.dtype)  # float8 saturates, or becomes NaN
            kept = ~(value.double().abs() > limits.max * (1 + limits.eps)) | value.double().isinf()
        elif _kind(own) in (
            "integer",
            "bool",
        ):  # floats that are whole numbers will do: an average of counters
            kept = _same(value.to(own.dtype).to(value.dtype), value) if _kind(value) != "complex" else False
        else:
            kept = _kind(own) == _kind(value)
        if not torch.as_tensor(kept).all():
            found.append(f"{name}: {value.dtype} in the file, {own.dtype} in the model")
    return found


def _kind(value: Tensor) -> str:
    if value.is_complex():
        return "complex"
    if value.dtype == torch.bool:
        return "bool"
    return "floating-point" if value.is_floating_point() else "integer"


def load(model: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    """``load_state_dict``, and a comparison of every tensor afterwards.

    Raises:
        ValueError: a hook or a parameter refused, or something holds other values than the file's, as tied
            parameters with two values do. The model is then as it was, bit for bit.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # A parameter that was made in inference mode can be written in that mode only.
    mode = torch.inference_mode() if any(t.is_inference() for t in tensors) else contextlib.nullcontext()
    with mode, torch.no_grad(), _restored_on_error(model):
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
    tensors = {
        id(tensor): (tensor, tensor.detach().to("cpu", copy=True))  # a GPU may be full
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and not tensor.is_meta and not is_lazy(tensor)
    }
    places = [
        (slots, dict(slots)) for module in model.modules() for slots in (module._parameters, module._buffers)
    ]
    extras = [
        (module, copy.deepcopy(module.get_extra_state()))
        for module in model.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]
    try:
        yield
    except BaseException:
        for slots, before in places:
            slots.clear()
            slots.update(before)
        for tensor, before in tensors.values():
            if not _same_bits(tensor, before):  # what refuses to be written was not
                tensor.copy_(before)
        for module, state in extras:
            module.set_extra_state(state)
        raise


def _same_bits(one: Tensor, other: Tensor) -> bool:
    one, other = (t.detach().cpu().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(one, other)

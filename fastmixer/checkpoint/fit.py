"""Whether the weights in a file are those that the model has, and what to do where they are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastmixer.checkpoint import flax, resize
from fastmixer.checkpoint.files import Content
from fastmixer.checkpoint.resize import Weights

SHOWN = 20  # keys of each kind that an error message lists


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict, extra states included; ValueError if a tensor of it cannot hold values yet."""
    state = model.state_dict()
    for name, value in state.items():
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
    return state


def stripped(weights: Weights, prefix: str, state: Weights, path: Path) -> dict[str, Tensor]:
    """The weights whose names begin with ``prefix``, without it; ValueError if there are none."""
    under = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    if not under:
        other = _prefix_of(weights, state)
        names = f"they begin with {other!r}" if other else f"the first is {next(iter(weights), None)!r}"
        raise ValueError(f"strip_prefix={prefix!r}: no name in {path} begins with it; {names}")
    return under


def with_tied(weights: Weights, state: Weights) -> dict[str, Tensor]:
    """``weights``, and for a name that they lack those of another name of the very same parameter.

    safetensors' save_model keeps tied weights under one name only.
    """
    places = {
        name: (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        for name, value in state.items()
        if isinstance(value, Tensor) and value.numel() and value.data_ptr()
    }
    values = {places[name]: value for name, value in weights.items() if name in places}
    return {name: values[place] for name, place in places.items() if place in values} | dict(weights)


def check(model: nn.Module, state: Weights, weights: Weights, file: Content) -> None:
    """Raises ValueError listing missing and unexpected keys, wrong shapes and kinds, if there are any.

    state: the model's state dict. weights: the file's by the model's names.
    """
    missing = [name for name in state if name not in weights]
    unexpected = [name for name in weights if name not in state]
    pairs = {
        name: (weights[name], own)
        for name, own in state.items()
        if isinstance(own, Tensor) and isinstance(weights.get(name), Tensor)
    }
    reshaped = {name: pair for name, pair in pairs.items() if pair[0].shape != pair[1].shape}

    def label(name: str) -> str:
        flax_name = flax.flax_name(name) if file.flax else None
        return f"{name} ({flax_name})" if flax_name else name

    problems = {
        "missing": [label(name) for name in missing],
        "unexpected": [label(name) for name in unexpected],
        "of another shape": [
            f"{label(name)}: {tuple(value.shape)} in the file, {tuple(own.shape)} in the model"
            for name, (value, own) in reshaped.items()
        ],
        "of another kind of number, or out of range": [
            f"{name}: {value.dtype} in the file, {own.dtype} in the model"
            for name, (value, own) in pairs.items()
            if not _can_hold(own.dtype, value)
        ],
    }
    if not any(problems.values()):
        return
    lines = [f"{file.where} does not fit the {type(model).__name__}, which is unchanged."]
    for title, items in problems.items():
        if items:
            lines += [f"{title} ({len(items)}):", *(f"  {item}" for item in items[:SHOWN])]
        if len(items) > SHOWN:
            lines.append(f"  ... and {len(items) - SHOWN} more")
    only_head = {*missing, *unexpected, *reshaped} <= {*flax.HEAD}
    raise ValueError("\n".join([*lines, *_advice(model, weights, state, file.path, only_head)]))


def _can_hold(dtype: torch.dtype, value: Tensor) -> bool:
    """Whether ``dtype`` is for the same kind of numbers, and they are in its range."""
    if dtype == value.dtype:
        return True
    if not dtype.is_floating_point and not dtype.is_complex:
        # Floats that are whole numbers will do: an average of counters.
        return not value.is_complex() and same_values(value.to(dtype).to(value.dtype), value)
    if dtype.is_complex or not value.is_floating_point():
        return dtype.is_complex and value.is_complex()
    limits, wide = torch.finfo(dtype), value.double()  # float8 saturates, or becomes NaN
    return not bool(((wide.abs() > limits.max * (1 + limits.eps)) & wide.isfinite()).any())


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same values, NaN being equal to NaN."""
    if a.dtype.itemsize == 1 and a.is_floating_point():  # float8 has no comparison
        a, b = a.float(), b.float()
    return a.shape == b.shape and bool(torch.isclose(a, b, rtol=0, atol=0, equal_nan=True).all())


def _advice(model: nn.Module, weights: Weights, state: Weights, path: Path, only_head: bool) -> list[str]:
    """Lines for the error message; none where nothing is known that helps."""
    if prefix := _prefix_of(weights, state):
        return [
            f"The names in the file begin with {prefix!r}: load it with strip_prefix={prefix!r}, which takes "
            "what stands under it."
        ]
    if hint := advice_on_model(weights, state):
        return [hint]
    hints = [resize.advice(weights, state, resize.grid_of(model))]
    classes, wanted = (len(values.get("head.weight", ())) for values in (weights, state))
    if only_head and classes != wanted:
        hints.append(
            f"The head in the file has {classes} classes, the model's has {wanted}: create the model with "
            f"num_classes={classes}, load, and then replace model.head if you want another one."
        )
    if re.search(r"-\d+-of-\d+$", path.stem):
        hints.append(
            f"By its name {path.name} is one of several files of a sharded checkpoint: put all of them into "
            "one."
        )
    return [hint for hint in hints if hint]


def _prefix_of(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What more than half of the ``wanted`` names have before them in ``names``; "" if nothing."""
    names, wanted = set(names), set(wanted)
    prefixes = Counter(
        name[: dot.end()]
        for name in names - wanted
        for dot in re.finditer(r"\.", name)
        if name[dot.end() :] in wanted
    )
    [(prefix, count)] = prefixes.most_common(1) or [("", 0)]
    return prefix if count > max(len(wanted) / 2, len(names & wanted)) else ""


def advice_on_model(names: Iterable[str], state: Iterable[str]) -> str:
    """What to do if it is the model that is wrapped, and not the one that the file is of."""
    prefix = _prefix_of(state, names)
    if not prefix:
        return ""
    return (
        f"The names in the model begin with {prefix!r}, those in the file do not: load into "
        f"model.{prefix.removesuffix('.')}."
    )

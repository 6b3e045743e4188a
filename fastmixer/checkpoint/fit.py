"""Whether the weights in a file are those that the model has, and what to do where they are not."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from fastmixer.checkpoint import apply, flax, resize
from fastmixer.checkpoint.files import Content
from fastmixer.checkpoint.resize import Weights

SHOWN = 20  # keys of each kind that an error message lists


def check(
    model: nn.Module, state: Mapping[str, object], weights: Mapping[str, object], file: Content
) -> None:
    """Raises ValueError listing missing and unexpected keys, wrong shapes and kinds, if there are any.

    state: the model's state dict. weights: the file's by the model's names.
    """
    label = flax.with_flax_name if file.flax else str
    missing = [name for name in state if name not in weights]
    unexpected = [name for name in weights if name not in state]
    expected, tensors = (
        {name: value for name, value in values.items() if isinstance(value, Tensor)}
        for values in (state, weights)
    )
    pairs = {name: (tensors[name], value) for name, value in expected.items() if name in tensors}
    shapes = {name: (tuple(value.shape), tuple(own.shape)) for name, (value, own) in pairs.items()}
    reshaped = [name for name, (shape, own) in shapes.items() if shape != own]
    problems = {
        "missing": [label(name) for name in missing],
        "unexpected": [label(name) for name in unexpected],
        "of another shape": [
            "{}: {} in the file, {} in the model".format(label(name), *shapes[name]) for name in reshaped
        ],
        "of another kind of number, or out of range": [
            f"{name}: {value.dtype} in the file, {own.dtype} in the model"
            for name, (value, own) in pairs.items()
            if not apply.can_hold(own.dtype, value)
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
    raise ValueError("\n".join([*lines, *_advice(model, tensors, expected, file.path, only_head)]))


def _advice(model: nn.Module, weights: Weights, expected: Weights, path: Path, only_head: bool) -> list[str]:
    """Lines for the error message; none where nothing is known that helps."""
    if prefix := prefix_of(weights, expected):
        return [
            f"The names in the file begin with {prefix!r}: load it with strip_prefix={prefix!r}, which takes "
            "what stands under it."
        ]
    if hint := advice_on_model(weights, expected):
        return [hint]
    hints = [resize.advice(weights, expected, resize.grid_of(model))]
    classes, wanted = (len(tensors.get("head.weight", ())) for tensors in (weights, expected))
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


def prefix_of(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What more than half of the ``wanted`` names have before them in ``names``; "" if nothing."""
    names, wanted = set(names), set(wanted)
    counts: Counter[str] = Counter()
    for name in names - wanted:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in wanted:
                counts[".".join(parts[:cut]) + "."] += 1
    prefix, count = max(counts.items(), key=lambda item: item[1], default=("", 0))
    return prefix if count > max(len(wanted) / 2, len(names & wanted)) else ""


def advice_on_model(names: Iterable[str], expected: Iterable[str]) -> str:
    """What to do if it is the model that is wrapped, and not the one that the file is of."""
    prefix = prefix_of(expected, names)
    if not prefix:
        return ""
    return (
        f"The names in the model begin with {prefix!r}, those in the file do not: load into "
        f"model.{prefix.removesuffix('.')}."
    )

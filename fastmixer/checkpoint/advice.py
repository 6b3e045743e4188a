"""What to do about a file that does not fit: the prefix in the way, the head, the shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from fastmixer.checkpoint import files, resize

WRAPPED = {"module.": ".module", "_orig_mod.": "._orig_mod"}  # of DataParallel and DDP, of torch.compile
HEAD = {"head.weight", "head.bias"}


def advice(
    model: nn.Module, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> list[str]:
    """Lines for the error message; none where nothing is known that helps."""
    if prefix := prefix_of(weights, expected):
        return [
            f"The names in the file begin with {prefix!r}: load it with strip_prefix={prefix!r}, which takes "
            "what stands under it."
        ]
    if hint := advice_on_model(weights, expected):
        return [hint]
    wrong = weights.keys() ^ expected.keys()
    wrong |= {
        name for name in weights.keys() & expected.keys() if weights[name].shape != expected[name].shape
    }
    hints = [
        resize.advice(weights, expected, resize.grid_of(model)),
        _advice_on_head(weights, expected) if wrong <= HEAD else "",
        files.shard_of(path),
    ]
    return [hint for hint in hints if hint]


def prefix_of(names: Iterable[str], wanted: Iterable[str]) -> str:
    """What more than half of the ``wanted`` names have before them in ``names``; "" if nothing."""
    names, wanted = set(names), set(wanted)
    found: Counter[str] = Counter()
    for name in names - wanted:
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in wanted:
                found[".".join(parts[:cut]) + "."] += 1
    prefix, count = max(found.items(), key=lambda item: item[1], default=("", 0))
    return prefix if count > max(len(wanted) / 2, len(names & wanted)) else ""


def advice_on_model(names: Iterable[str], expected: Iterable[str]) -> str:
    """What to do if it is the model that is wrapped, and not the one that the file is of."""
    prefix = prefix_of(expected, names)
    if not prefix:
        return ""
    inner, rest = "model", prefix
    while step := next((step for step in WRAPPED if rest.startswith(step)), None):
        inner, rest = inner + WRAPPED[step], rest.removeprefix(step)
    inner += f".{rest.removesuffix('.')}" if rest else ""
    return f"The names in the model begin with {prefix!r}, those in the file do not: load into {inner}."


def _advice_on_head(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """What to do if the head in the file has another number of classes than the model's; 0: no head."""
    classes, asked = (len(tensors.get("head.weight", ())) for tensors in (weights, expected))
    if classes == asked:
        return ""
    return (
        f"The head in the file has {classes} classes, the model's has {asked}: create the model with "
        f"num_classes={classes}, load, and then replace model.head if you want another one."
    )

"""``fastmixer.explain``: what a fused model would run on a GPU, and why; no GPU needed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastmixer import configs
from fastmixer.blocks.block import fused_blocks
from fastmixer.configs import Library, Problem, Target, TileConfig, resources, tables
from fastmixer.configs.choice import bucketed
from fastmixer.configs.device_code import triton_version
from fastmixer.configs.predict import cost
from fastmixer.dtypes import product_dtype
from fastmixer.ops import packing
from fastmixer.ops.launch import Context
from fastmixer.params import MixingParams

PACK, ROW_MOMENTS = "pack_weights", "row_moments"


@dataclass(frozen=True)
class ExplainedLaunch:
    """One launch of a block's forward.

    Attributes:
        op: as ``configs.select`` knows it, "row_moments", or "pack_weights": see ``freeze``.
        choice: its tiles, a Library, or None for a pass that has no choice.
        source: where the choice is from: "shipped table", "user's cache", "cost model", "rule" or "fixed".
        predicted_ms: milliseconds, PREDICTED by the cost model, not measured; None where nothing is known of
            the GPU.
        bound: what the prediction says takes longest.
        why: why this choice, if there is more to say.
        record: the Triton whose compiled code the prediction reads, as "3.6.0"; "none" where the tiles were
            compiled for no such problem and what they need is estimated; "" where there are no tiles.
    """

    op: str
    choice: TileConfig | Library | None
    source: str
    predicted_ms: float | None
    bound: str
    why: str
    record: str


@dataclass(frozen=True)
class ExplainedBlock:
    """The launches of one shape of block.

    Attributes:
        names: the blocks of the model that have it.
        tokens, channels: S and C.
        token_hidden, channel_hidden: D and E.
        batch: B.
        x_dtype, dtype: of x and of the products.
        launches: those of one forward, in order; of a frozen block without packing.
    """

    names: tuple[str, ...]
    tokens: int
    channels: int
    token_hidden: int
    channel_hidden: int
    batch: int
    x_dtype: torch.dtype
    dtype: torch.dtype
    launches: tuple[ExplainedLaunch, ...]

    @property
    def predicted_ms(self) -> float | None:
        """The sum of the launches' predictions in milliseconds; None if one is missing."""
        times = [one.predicted_ms for one in self.launches]
        return None if None in times else sum(times)


@dataclass(frozen=True)
class Explanation:
    """What ``explain`` returns: a block of every distinct shape. ``print`` shows it as tables.

    Attributes:
        gpu: its name, or the arch where that is all that is known.
        target: what the tiles were chosen for.
        blocks: one of every distinct shape.
    """

    gpu: str
    target: Target
    blocks: tuple[ExplainedBlock, ...]

    def __str__(self) -> str:
        title = f"on {self.gpu}; times are predicted by the cost model, not measured"
        return "\n\n".join(["\n".join([title, *_stand_in(self.target)]), *map(_table, self.blocks)])


def explain(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> Explanation:
    """What the forward of a fused model would run on a GPU: for each launch the choice, whence, and why.

    Args:
        model: a module with fused blocks: after ``fuse``, or built of ``fastmixer.MixerBlock``.
        input_shape: of the model's input, batch first; of a single block's input (B, S, C). Of a whole
            model's only the batch and the number of axes are read: its blocks know their S and C.
        dtype: that the model and its input would be cast to: float16, bfloat16 or float32; by default the
            model's own.
        device: a torch.device of type "cuda", an arch ("sm_90", "gfx942") or a GPU of ``configs.DEVICES`` by
            name ("nvidia-h200", "NVIDIA H200"): a named one need not be there. By default the model's
            device, or for a model on the CPU the current GPU.
        autocast: the dtype of autocast around the calls: that of the products, and behind the convolution of
            a whole model (an input_shape of images, 4 numbers) that of the activations too; a single block's
            input (3 numbers) keeps its own. By default autocast's as it is set now, which without a GPU is
            never.

    Returns:
        An object whose ``str()`` is a table for every distinct shape of fused block; times in milliseconds.

    Raises:
        TypeError: model is not a module, or another argument is of the wrong type.
        ValueError: no block of the model is fused, input_shape is not two or more positive numbers or not a
            single block's, dtype or autocast has no tiles, or the device is not known or not there.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    shape = _checked_shape(input_shape)
    for argument, value in (("dtype", dtype), ("autocast", autocast)):
        if value is not None and not isinstance(value, torch.dtype):
            raise TypeError(f"{argument} must be a torch.dtype or None, got {type(value).__name__}")
    gpu, target = _target(model, device)
    by_shape: dict[tuple, list[str]] = {}
    for name, forward, structure in fused_blocks(model):
        token, channel = structure.token, structure.channel
        x_dtype = weight_dtype = dtype or token.fc1.weight.dtype
        product = autocast or product_dtype(torch.device("cuda"), x_dtype)
        _check_dtypes(name, x_dtype, product)
        if len(shape) == 4:  # the stem's convolution has returned autocast's dtype
            x_dtype = product
        sizes = token.width, channel.width, token.hidden
        key = (*sizes, channel.hidden, x_dtype, product, weight_dtype, forward.frozen is not None)
        by_shape.setdefault(key, []).append(name)
    if not by_shape:
        raise ValueError(f"model: no block of this {type(model).__name__} is fused: see fastmixer.fuse")
    _check_block_input(model, shape, by_shape)
    blocks = (_block(tuple(names), shape[0], *key, target) for key, names in by_shape.items())
    return Explanation(gpu, target, tuple(blocks))


def _checked_shape(input_shape: Sequence[int]) -> tuple[int, ...]:
    if isinstance(input_shape, (str, bytes)) or not isinstance(input_shape, Sequence):
        raise TypeError(f"input_shape must be a sequence of ints, got {type(input_shape).__name__}")
    shape = tuple(input_shape)
    if len(shape) < 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape):
        raise ValueError(f"input_shape must be two or more positive ints, batch first, got {shape}")
    return shape


def _target(model: nn.Module, device: torch.device | str | None) -> tuple[str, Target]:
    """The GPU's name and target."""
    if device is None:
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device.type != "cuda":
            if not torch.cuda.is_available():
                raise ValueError(
                    "device: the model is not on a GPU and there is none here; name one of "
                    f"{', '.join([*configs.TARGETS, *configs.DEVICES])}"
                )
            device = torch.device("cuda", torch.cuda.current_device())
    elif not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be a name or a torch.device, got {type(device).__name__}")
    elif isinstance(device, str) and not device.startswith(("cuda", "cpu")):
        target = configs.target_named(device)
        known = configs.DEVICES.get(target.name)
        return (known.name if known else device), target
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device: expected a GPU that is there, or the name of one, got {str(device)!r}")
    if device.index is None:  # the current GPU as it is now: target_of remembers its answers
        device = torch.device("cuda", torch.cuda.current_device())
    return torch.cuda.get_device_name(device), configs.target_of(device)


def _check_dtypes(name: str, x_dtype: torch.dtype, product: torch.dtype) -> None:
    for dtype in (x_dtype, product):
        if dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ValueError(f"dtype: expected float16, bfloat16 or float32, got {dtype} in {name}")
    if x_dtype not in (product, torch.float32):
        raise ValueError(f"dtype: {name} with {x_dtype} activations and products in {product} runs unfused")


def _check_block_input(model: nn.Module, shape: tuple[int, ...], by_shape: dict[tuple, list[str]]) -> None:
    """A single block says what its input is."""
    alone = [key for key, names in by_shape.items() if names == ["(model)"]]
    if alone and shape[1:] != alone[0][:2]:
        raise ValueError(f"input_shape must be (B, {alone[0][0]}, {alone[0][1]}) for this block, got {shape}")


def _block(
    names: tuple[str, ...],
    batch: int,
    tokens: int,
    channels: int,
    token_hidden: int,
    channel_hidden: int,
    x_dtype: torch.dtype,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    frozen: bool,
    target: Target,
) -> ExplainedBlock:
    token = Problem(batch, tokens, channels, token_hidden, x_dtype, dtype)
    channel = token._replace(hidden=channel_hidden)
    launches = _half("token_half", token, target)
    fused = all(one.op != "token_half" for one in launches)  # then it leaves the moments
    launches += _half("channel_half", channel, target, moments=not fused)
    if not frozen:
        left = {one.op for one in launches}
        problems = {"token": token, "channel": channel}
        problems = {of: problem for of, problem in problems.items() if f"{of}_half" not in left}
        launches = [*_packing(problems, weight_dtype, target), *launches]
    sizes = tokens, channels, token_hidden, channel_hidden
    return ExplainedBlock(names, *sizes, batch, x_dtype, dtype, tuple(launches))


def _half(op: str, problem: Problem, target: Target, *, moments: bool = True) -> list[ExplainedLaunch]:
    table = tables.table_of(target)
    launches = []
    for name in cost.half_ops(op, problem, target, configs.chooser(target), moments=moments):
        if name == ROW_MOMENTS:
            choice, source, why = None, "fixed", ""
        else:
            choice, source, why = configs.explained(name, problem, target, table)
        found = cost.predict_launch(name, problem, choice, target)
        milliseconds, bound = (None, "?") if found is None else (1e3 * found.seconds, found.bound)
        source = _source(name, problem, target) if source == "table" else _SOURCES.get(source, source)
        record = _record(name, problem, choice, target)
        launches.append(ExplainedLaunch(name, choice, source, milliseconds, bound, why, record))
    return launches


def _packing(
    problems: dict[str, Problem], weight_dtype: torch.dtype, target: Target
) -> list[ExplainedLaunch]:
    """The launch that packs for these halves, if there is something to pack."""
    context = Context(target, select=configs.chooser(target))
    layouts: layouts.Layouts = {}
    for of, problem in problems.items():
        width, hidden = (problem.tokens if of == "token" else problem.channels), problem.hidden
        sizes = (
            (problem.channels,),
            (problem.channels,),
            (hidden, width),
            (hidden,),
            (width, hidden),
            (width,),
        )
        params = MixingParams(*(torch.empty(size, dtype=weight_dtype, device="meta") for size in sizes))
        layouts |= packing.forward_layouts(of, params, problem, context)
    layouts = {role: layout for role, layout in layouts.items() if layout.as_it_lies() is None}
    if not layouts:
        return []
    moved = sum(
        one.weight.nbytes + math.prod(one.packed_shape) * one.dtype.itemsize for one in layouts.values()
    )
    found = cost.predict_pass(moved, target)
    milliseconds, bound = (None, "?") if found is None else (1e3 * found.seconds, found.bound)
    why = f"{', '.join(layouts)}: {moved / 1e6:.2g} MB moved in every call, unless frozen"
    return [ExplainedLaunch(PACK, None, "fixed", milliseconds, bound, why, "")]


def _record(op: str, problem: Problem, choice: TileConfig | Library | None, target: Target) -> str:
    if not isinstance(choice, TileConfig):
        return ""
    found = resources.find(op, problem, choice, target)
    return "none" if found is None else resources.recorded_triton(target)


def _stand_in(target: Target) -> list[str]:
    """A line that says so where the records are not the running Triton's."""
    running, recorded = target.triton or triton_version(), resources.recorded_triton(target)
    if recorded is None or resources.release(recorded) == resources.release(running):
        return []
    return [f"compiled by Triton {recorded}: there is no record of the running one ({running})"]


_SOURCES = {"model": "cost model"}


def _source(op: str, problem: Problem, target: Target) -> str:
    shipped = tables.source((op, bucketed(problem)), target) == "shipped"
    return "shipped table" if shipped else "user's cache"


def _table(block: ExplainedBlock) -> str:
    rows = [("launch", "runs", "from", "predicted ms", "bound", "record", "")]
    for launch in block.launches:
        milliseconds = "?" if launch.predicted_ms is None else f"{launch.predicted_ms:.4f}"
        cells = launch.op, _choice(launch), launch.source, milliseconds, launch.bound, launch.record
        rows.append((*cells, launch.why))
    total = "?" if block.predicted_ms is None else f"{block.predicted_ms:.4f}"
    rows.append(("block", "", "", total, "", "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([_title(block), *(f"  {line}".rstrip() for line in lines)])


def _title(block: ExplainedBlock) -> str:
    count = len(block.names)
    which = block.names[0] if count == 1 else f"{count} blocks, {block.names[0]} to {block.names[-1]}"
    dtypes = Counter(str(d).removeprefix("torch.") for d in (block.dtype, block.x_dtype))
    dtype = " products, x ".join(dtypes)
    return (
        f"{which}: batch {block.batch}, {block.tokens} tokens, {block.channels} channels, hidden "
        f"{block.token_hidden} and {block.channel_hidden}, {dtype}"
    )


def _choice(launch: ExplainedLaunch) -> str:
    tiles = launch.choice
    if tiles is None:
        return "one pass over weights" if launch.op == PACK else "one pass over x"
    if isinstance(tiles, Library):
        return {Library.ATEN: "PyTorch's product and passes", Library.REFERENCE: "PyTorch, unfused"}[tiles]
    sides = [tiles.block_m, tiles.block_n, *([tiles.block_k] if tiles.block_k else [])]
    return f"{' x '.join(map(str, sides))}, {tiles.num_warps} warps, {tiles.num_stages} stages"

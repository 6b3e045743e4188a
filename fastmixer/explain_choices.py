"""``fastmixer.explain``: what a fused model would run on a GPU, and why; no GPU needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fastmixer import configs
from fastmixer.aot.recording import meta_params
from fastmixer.blocks.block import fused_blocks
from fastmixer.configs import Library, Problem, Target, TileConfig, resources, tables
from fastmixer.configs.designs import forced_names, name_of
from fastmixer.configs.device_code import triton_version
from fastmixer.configs.ops import OPS, half_of
from fastmixer.configs.predict import cost
from fastmixer.configs.problem import measured_as
from fastmixer.dtypes import dtype_name, product_dtype
from fastmixer.ops import packing
from fastmixer.ops.launch import Call, Context
from fastmixer.ops.layouts import Layouts

PACK, ROW_MOMENTS = "pack_weights", "row_moments"
LIBRARIES = {
    Library.ATEN: "PyTorch's product and passes",
    Library.ATEN_GELU: "PyTorch's product with GELU",
    Library.ADDMM: "PyTorch's product into x",
    Library.REFERENCE: "PyTorch, unfused",
}
SOURCES = {"shipped": "shipped table", "user": "user's cache", "model": "cost model"}


@dataclass(frozen=True)
class ExplainedLaunch:
    """One launch of a block's forward.

    Attributes:
        op: as ``configs.select`` knows it, "row_moments", or "pack_weights": see ``freeze``.
        choice: its tiles, a Library, or None for a pass that has no choice.
        design: the name of the choice among the op's designs, ``configs.designs_of``; "" where it has none.
        source: where the choice is from: "shipped table", "user's cache", "cost model", "rule", "fixed" or
            "forced".
        predicted_ms: milliseconds, PREDICTED by the cost model, not measured; None where nothing is known of
            the GPU.
        bound: what the prediction says takes longest.
        why: why this choice, if there is more to say.
        record: the Triton whose compiled code the prediction reads, as "3.6.0"; "none" where the tiles were
            compiled for no such problem and what they need is estimated; "" where there are no tiles.
    """

    op: str
    choice: TileConfig | Library | None
    design: str
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
        times = [launch.predicted_ms for launch in self.launches]
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
        running, recorded = self.target.triton or triton_version(), resources.recorded_triton(self.target)
        if recorded and resources.release(recorded) != resources.release(running):
            title += f"\ncompiled by Triton {recorded}: there is no record of the running one ({running})"
        return "\n\n".join([title, *map(_table, self.blocks)])


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
        size = token.width, channel.width
        if name == "(model)" and shape[1:] != size:  # a single block says what its input is
            raise ValueError(f"input_shape must be (B, {size[0]}, {size[1]}) for this block, got {shape}")
        halves = tuple(
            Problem(shape[0], *size, half.hidden, x_dtype, product, half.approximate)
            for half in (token, channel)
        )
        key = *halves, weight_dtype, forward.frozen is not None
        by_shape.setdefault(key, []).append(name)
    if not by_shape:
        raise ValueError(f"model: no block of this {type(model).__name__} is fused: see fastmixer.fuse")
    blocks = (_block(tuple(names), *key, target) for key, names in by_shape.items())
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
            device = torch.device("cuda")
            if not torch.cuda.is_available():
                names = ", ".join([*configs.TARGETS, *configs.DEVICES])
                raise ValueError(
                    f"device: the model is not on a GPU and there is none here; name one of {names}"
                )
    elif not isinstance(device, torch.device) and not str(device).startswith(("cuda", "cpu")):
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


def _block(
    names: tuple[str, ...], token: Problem, channel: Problem, weight_dtype: torch.dtype, frozen: bool,
    target: Target,
) -> ExplainedBlock:  # fmt: skip
    halves = {"token_half": token, "channel_half": channel}
    ops = cost.forward_ops(halves, target, configs.choose)
    launches = [_launch(op, problem, target) for op, problem in ops]
    if not frozen:
        in_kernels = {half: problem for half, problem in halves.items() if (half, problem) not in ops}
        launches = [*_packing(in_kernels, weight_dtype, target), *launches]
    sizes = token.tokens, token.channels, token.hidden, channel.hidden
    return ExplainedBlock(names, *sizes, token.batch, token.x_dtype, token.dtype, tuple(launches))


def _launch(op: str, problem: Problem, target: Target) -> ExplainedLaunch:
    choice, design, source, why, record = None, "", "fixed", "", ""
    if op != ROW_MOMENTS:
        now = tables.table_of(target), forced_names()
        choice, source, why = configs.explained(op, problem, target, *now)
    if source == "table":
        found = (tables.source(op, known, target) for known in measured_as(problem))
        source = next(filter(None, found), "user")
    if op in OPS:
        design = name_of(op, problem, target, choice)
    if isinstance(choice, TileConfig):
        is_recorded = resources.find(op, problem, choice, target) is not None
        record = resources.recorded_triton(target) if is_recorded else "none"
    time = _time(cost.predict_launch(op, problem, choice, target))
    return ExplainedLaunch(op, choice, design, SOURCES.get(source, source), *time, why, record)


def _packing(halves: dict[str, Problem], weight_dtype: torch.dtype, target: Target) -> list[ExplainedLaunch]:
    """The launch that packs for these halves, if there is something to pack."""
    layouts: Layouts = {}
    for half, problem in halves.items():
        name = half_of(half)
        cast = problem._replace(x_dtype=weight_dtype, dtype=weight_dtype)
        params = meta_params(name, cast, approximate=problem.approximate)
        layouts |= packing.forward_layouts(Call(name, params, problem, Context(target)))
    packed = {role: layout for role, layout in layouts.items() if layout.as_it_lies() is None}
    if not packed:
        return []
    read = sum(layout.weight.nbytes for layout in packed.values())
    written = sum(math.prod(layout.packed_shape) * layout.dtype.itemsize for layout in packed.values())
    moved, device = read + written, configs.device_data(target)
    why = f"{', '.join(packed)}: {moved / 1e6:.2g} MB moved in every call, unless frozen"
    return [
        ExplainedLaunch(PACK, None, "", "fixed", *_time(device and cost.passes([moved], device)), why, "")
    ]


def _time(prediction: cost.Prediction | None) -> tuple[float | None, str]:
    """Milliseconds, and what takes longest."""
    return (1e3 * prediction.seconds, prediction.bound) if prediction else (None, "?")


def _table(block: ExplainedBlock) -> str:
    rows = [("launch", "runs", "design", "from", "predicted ms", "bound", "record", "")]
    for launch in block.launches:
        figures = _figure(launch.predicted_ms), launch.bound, launch.record
        rows.append((launch.op, _choice(launch), launch.design, launch.source, *figures, launch.why))
    rows.append(("block", "", "", "", _figure(block.predicted_ms), "", "", ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)) for row in rows]
    return "\n".join([_title(block), *(f"  {line}".rstrip() for line in lines)])


def _figure(milliseconds: float | None) -> str:
    return "?" if milliseconds is None else f"{milliseconds:.4f}"


def _title(block: ExplainedBlock) -> str:
    count = len(block.names)
    which = block.names[0] if count == 1 else f"{count} blocks, {block.names[0]} to {block.names[-1]}"
    dtypes = " products, x ".join(dict.fromkeys(map(dtype_name, (block.dtype, block.x_dtype))))
    return (
        f"{which}: batch {block.batch}, {block.tokens} tokens, {block.channels} channels, hidden "
        f"{block.token_hidden} and {block.channel_hidden}, {dtypes}"
    )


def _choice(launch: ExplainedLaunch) -> str:
    tiles = launch.choice
    if tiles is None:
        return "one pass over weights" if launch.op == PACK else "one pass over x"
    if isinstance(tiles, Library):
        return LIBRARIES[tiles]
    sides = " x ".join(str(side) for side in (tiles.block_m, tiles.block_n, tiles.block_k) if side)
    return f"{sides}, {tiles.num_warps} warps, {tiles.num_stages} stages"

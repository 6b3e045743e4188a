"""``fuse`` and ``unfuse``: make the Mixer blocks of somebody else's model run fused, in place."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from torch import nn

from fastmixer.blocks.block import MixerBlock, fused_forward_of
from fastmixer.blocks.families import layout_of
from fastmixer.blocks.freezing import check_freezable, check_module
from fastmixer.blocks.freezing import freeze as freeze_blocks
from fastmixer.blocks.fused_forward import FusedForward
from fastmixer.blocks.structure import Structure


@dataclass(frozen=True)
class FuseRow:
    """What became of one block.

    Attributes:
        name: of the block in the model; "(model)" if it is the model itself.
        kind: the name of its class.
        fused: whether it runs fused.
        reason: why not, or a remark; "" for none.
    """

    name: str
    kind: str
    fused: bool
    reason: str = ""


@dataclass(frozen=True)
class FuseReport:
    """The rows of a ``fuse`` call, in the model's order, to iterate over. ``print(report)`` shows a table."""

    rows: tuple[FuseRow, ...]

    @property
    def fused(self) -> tuple[FuseRow, ...]:
        """The rows of the blocks that run fused."""
        return tuple(row for row in self.rows if row.fused)

    @property
    def declined(self) -> tuple[FuseRow, ...]:
        """The rows of the blocks that were left as they are."""
        return tuple(row for row in self.rows if not row.fused)

    def __iter__(self) -> Iterator[FuseRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "no mixer block found"
        table = [("block", "class", "fused", "")]
        table += [(row.name, row.kind, "yes" if row.fused else "no", row.reason) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([*lines, f"{len(self.fused)} of {len(self.rows)} blocks fused"])


def fuse(model: nn.Module, *, strict: bool = False, freeze: bool = False) -> FuseReport:
    """Makes every Mixer block of ``model`` that fastmixer can compute run fused, in place.

    A block is recognised by its structure, not by its class, and its own forward is first tried out on a
    float64 copy with random weights, on the CPU, whatever the caller has switched on: a block whose forward
    computes something else, gives other gradients or stores something is declined. Only instance attributes
    of a fused block are set: ``forward``, and what ``nn.DataParallel`` and copies ask for. So the parameters
    stay the same objects, and ``state_dict``, ``named_modules``, ``isinstance``, hooks on the block,
    ``train``, ``to``, ``copy``, ``deepcopy`` and ``torch.save`` of the model work as before (loading a saved
    one needs fastmixer installed).

    What is changed afterwards, a module inside, an attribute that the forward may read or a class, is noticed
    at the next call. If the block is then no Mixer block any more, or x has another shape than the block was
    made for, the block's own forward runs and a warning names it, once per reason. A compiled block notices
    what its trace could guard: no new attribute, and no change inside of a list, dict, object or tensor.

    Args:
        model: any module; it may itself be a block, or be wrapped by ``DistributedDataParallel``,
            ``DataParallel`` or ``torch.compile``, which compiles itself anew at its next call.
        strict: raise, before anything is changed, unless every block found can be fused.
        freeze: also pack the weights once and keep them, see :func:`fastmixer.freeze`.

    Returns:
        A report with one row per block: fused, or why not.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
        ValueError: strict, and a block was declined or none was found; freeze, and the model is in training
            mode or none of its blocks can be fused. Nothing was changed.
    """
    check_module(model)
    rows: list[FuseRow] = []
    accepted: list[tuple[FusedForward, Structure]] = []
    verdicts: dict[Hashable, str | None] = {}
    for name, module in model.named_modules():
        if not isinstance(module, MixerBlock) and layout_of(module) is None:
            continue
        row, fresh = _judge(name or "(model)", module, verdicts)
        rows.append(row)
        if fresh is not None:
            accepted.append(fresh)
    report = FuseReport(tuple(rows))
    if strict and not report.rows:
        raise ValueError(f"no mixer block found in the {type(model).__name__} given as model")
    if strict and report.declined:
        reasons = "\n".join(f"  {row.name} ({row.kind}): {row.reason}" for row in report.declined)
        count = f"{len(report.declined)} of {len(report)}"
        raise ValueError(f"{count} blocks of model cannot be fused, nothing was changed:\n{reasons}")
    if freeze:
        if not report.fused:
            raise ValueError(
                f"no block of the {type(model).__name__} given as model can be frozen:\n{report}"
            )
        for row in report.fused:
            check_freezable(row.name, model if row.name == "(model)" else model.get_submodule(row.name))
    for forward, structure in accepted:
        forward.install(structure)
    if freeze:
        freeze_blocks(model)
    return report


def unfuse(model: nn.Module) -> int:
    """Restores the forward of every block that ``fuse`` changed in ``model``.

    Blocks that are ``fastmixer.MixerBlock`` stay what they are. A wrapper that was put around a fused forward
    since, such as a hook of accelerate, stays in place, and what it wraps runs unfused.

    Args:
        model: any module, wrapped or not, as for ``fuse``.

    Returns:
        How many there were.

    Raises:
        TypeError: model is not a ``torch.nn.Module``.
    """
    check_module(model)
    return sum(FusedForward.remove(module) for module in model.modules())


def _judge(
    name: str, module: nn.Module, verdicts: dict[Hashable, str | None]
) -> tuple[FuseRow, tuple[FusedForward, Structure] | None]:
    """The row of one block, and the forward to give it, for its structure, if it is to be fused now.

    ``verdicts`` remembers, by settings, how blocks of this call behaved when tried out.
    """
    kind, replaced = type(module).__qualname__, module.__dict__.get("forward")
    if FusedForward.of(module) is None and not isinstance(replaced, (FusedForward, type(None))):
        return FuseRow(name, kind, False, "its forward has been replaced on the instance"), None
    forward, remarks = fused_forward_of(module), []
    fresh = forward is None
    if fresh:
        forward = FusedForward(module)
    else:
        own = type(module).forward is MixerBlock.forward
        remarks.append("fastmixer.MixerBlock, fused already" if own else "already fused")
    forward.name, forward.verdicts = name, verdicts
    structure = forward.decide()
    if isinstance(structure, str):
        return FuseRow(name, kind, False, structure), None
    dropout = max((dropout.p for dropout in structure.dropouts), default=0.0)
    if dropout > 0:
        remarks.append(f"unfused in training: dropout with p={dropout:g}")
    return FuseRow(name, kind, True, "; ".join(remarks)), (forward, structure) if fresh else None

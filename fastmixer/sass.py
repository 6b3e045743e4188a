"""Reading compiled GPU code: what the assembly of a kernel says about how it will run.

Text in, counts out: nothing here imports Triton or needs a GPU. ``nvdisasm -c`` prints the SASS that
:func:`count_sass` reads; :func:`count_amdgcn` reads LLVM's assembly for AMD GPUs.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class InstructionCounts:
    """Static counts, over all instructions of a kernel; nothing is weighted by how often it runs."""

    instructions: int
    loop_instructions: int  # those that lie on a cycle of the control flow
    spill_stores: int
    spill_loads: int
    loop_spills: int  # the spill stores and loads among loop_instructions
    hgmma: int  # wgmma, sm_90
    hmma: int  # mma.sync in 16-bit and tf32
    imma: int
    dmma: int
    tcgen05: int  # sm_100
    mfma: int  # AMD
    wgmma_waits: int
    serialised: bool  # the wgmmas wait for each other: see is_serialised

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


class Instruction(NamedTuple):
    opcode: str
    operands: str
    targets: tuple[str, ...] = ()  # the labels it names, where control may go next
    falls_through: bool = True


_LABEL = re.compile(r"^([.$\w]+):")
_SASS = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)")
_SASS_TARGET = re.compile(r"`\(([.$\w]+)\)")
_AMDGCN = re.compile(r"^\s+((?:v|s|ds|buffer|global|flat|scratch)_\w+)\s*([^;]*)")


def parse_sass(text: str) -> list[Instruction | str]:
    """The instructions of an ``nvdisasm -c`` listing, with its labels (as strings) between them."""
    listing: list[Instruction | str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            listing.append(label[1])
        elif found := _SASS.match(line):
            guard, opcode, operands = found[1], found[2], found[3].strip()
            # "BRA.U UP0, `(L)" and "BRA.DIV UR4, `(L)" carry their condition as an operand.
            always = guard is None and not (opcode.startswith("BRA.") and operands.startswith("U"))
            kind = opcode.split(".")[0]
            ends = kind in {"BRA", "BRX", "JMP", "JMX", "EXIT", "RET"}
            # RET names the function it returns to, not the place.
            targets = () if kind == "RET" else tuple(_SASS_TARGET.findall(operands))
            listing.append(Instruction(opcode, operands, targets, not (ends and always)))
    return listing


def parse_amdgcn(text: str) -> list[Instruction | str]:
    """The instructions of LLVM's AMDGPU assembly, with its labels (as strings) between them."""
    listing: list[Instruction | str] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            listing.append(label[1])
        elif found := _AMDGCN.match(line):
            opcode, operands = found[1], found[2].strip()
            targets = (operands,) if opcode.startswith(("s_branch", "s_cbranch")) else ()
            listing.append(Instruction(opcode, operands, targets, opcode not in {"s_branch", "s_endpgm"}))
    return listing


def in_loop(listing: Iterable[Instruction | str]) -> list[bool]:
    """For every instruction, whether control can come back to it: it lies on a cycle of the flow graph.

    Searching cycles rather than backward branches matters on sm_100, where the waits for a barrier
    are laid out behind the kernel's end and branch back into code that is no loop at all.
    """
    block_of: list[int] = []  # of each instruction
    blocks_at: dict[str, int] = {}
    exits: list[list[str]] = [[]]
    falls: list[bool] = [True]

    def open_block() -> None:
        exits.append([])
        falls.append(True)

    for item in listing:
        if isinstance(item, str):
            open_block()
            blocks_at[item] = len(exits) - 1
            continue
        block_of.append(len(exits) - 1)
        exits[-1].extend(item.targets)
        if item.targets or not item.falls_through:
            falls[-1] = item.falls_through
            open_block()

    successors = [{blocks_at[label] for label in labels if label in blocks_at} for labels in exits]
    for block, falls_through in enumerate(falls[:-1]):
        if falls_through:
            successors[block].add(block + 1)

    cyclic = [block in _reachable(successors, block) for block in range(len(successors))]
    return [cyclic[block] for block in block_of]


def _reachable(successors: list[set[int]], start: int) -> set[int]:
    """The blocks that one or more steps lead to from ``start``."""
    seen: set[int] = set()
    todo = list(successors[start])
    while todo:
        block = todo.pop()
        if block not in seen:
            seen.add(block)
            todo.extend(successors[block])
    return seen


def is_serialised(instructions: Iterable[Instruction]) -> bool:
    """Whether ptxas made the wgmma products of a kernel wait for each other.

    One ``tl.dot`` becomes a chain of HGMMA on one accumulator, a link for each 16 of K, and one
    WARPGROUP.DEPBAR behind the whole chain. Where ptxas cannot keep the accumulator in place it puts
    a wait behind every link. So: of all HGMMAs that continue an accumulator, do more than half wait
    for everything that was issued before them? A product that is a single HGMMA long continues
    nothing, and a wait that leaves groups in flight (``gsb0, 0x1``) is a pipeline, not a stall.
    Kernels seen so far lie at 2 of 15 and 2 of 21, or at all of them.
    """
    waits = 0
    waits_at_last_use: dict[str, int] = {}  # by accumulator
    continued = waited = 0
    for instruction in instructions:
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            waits += instruction.operands.endswith(" 0x0")
        elif instruction.opcode.startswith("HGMMA"):
            accumulator = instruction.operands.split(",")[0]
            if accumulator in waits_at_last_use:
                continued += 1
                waited += waits > waits_at_last_use[accumulator]
            waits_at_last_use[accumulator] = waits
    return 2 * waited > continued


def count_sass(text: str) -> InstructionCounts:
    """Counts over the SASS of one kernel. Triton makes no local arrays: every STL and LDL is a spill."""
    return _count(
        parse_sass(text),
        spill_store=lambda opcode: opcode.startswith("STL"),
        spill_load=lambda opcode: opcode.startswith("LDL"),
    )


def count_amdgcn(text: str) -> InstructionCounts:
    """Counts over the assembly of one AMD kernel; scratch accesses are the spills."""
    return _count(
        parse_amdgcn(text),
        spill_store=lambda opcode: opcode.startswith("scratch_store"),
        spill_load=lambda opcode: opcode.startswith("scratch_load"),
    )


# UTCHMMA (16-bit, tf32), UTCQMMA (8-bit), UTCIMMA, UTCOMMA (4-bit): the tcgen05.mma of each type.
_PRODUCTS = {
    "hgmma": re.compile(r"HGMMA\b"),
    "hmma": re.compile(r"HMMA\b"),
    "imma": re.compile(r"IMMA\b"),
    "dmma": re.compile(r"DMMA\b"),
    "tcgen05": re.compile(r"UTC[A-Z]MMA\b"),
    "mfma": re.compile(r"v_s?mfma"),
    "wgmma_waits": re.compile(r"WARPGROUP\.DEPBAR\b"),
}


def _count(
    listing: list[Instruction | str],
    spill_store: Callable[[str], bool],
    spill_load: Callable[[str], bool],
) -> InstructionCounts:
    instructions = [item for item in listing if isinstance(item, Instruction)]
    looping = in_loop(listing)
    products: Counter[str] = Counter()
    stores = loads = loop_spills = 0
    for instruction, loops in zip(instructions, looping, strict=True):
        opcode = instruction.opcode
        products.update(name for name, pattern in _PRODUCTS.items() if pattern.match(opcode))
        stores += spill_store(opcode)
        loads += spill_load(opcode)
        loop_spills += loops and (spill_store(opcode) or spill_load(opcode))
    return InstructionCounts(
        instructions=len(instructions),
        loop_instructions=sum(looping),
        spill_stores=stores,
        spill_loads=loads,
        loop_spills=loop_spills,
        serialised=is_serialised(instructions),
        **{name: products[name] for name in _PRODUCTS},
    )

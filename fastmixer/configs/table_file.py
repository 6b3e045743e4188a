"""What a table file holds: its entries, and how they are read, checked and written as JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from fastmixer.configs.device_code import kernels_hash, triton_version
from fastmixer.configs.ops import HALVES, ONE_PASS_TOKENS, OPS, WHOLE_HALVES
from fastmixer.configs.problem import (
    Choice,
    Library,
    Problem,
    TileConfig,
    next_power_of_2,
)

SCHEMA = 1  # of the files: raise it when a field changes its meaning

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
USES = {  # what an entry's "use" may say of which ops
    "tiles": tuple(OPS),
    "aten": tuple(name for name, op in OPS.items() if op.library),
    "reference": WHOLE_HALVES,
    "fused": WHOLE_HALVES,
}

# What no kernel exceeds on any GPU.
WARPS = 32  # 1024 threads a program; of a wave's 64 lanes see ``resources.why_not``
ELEMENTS = 1 << 20  # of a tensor in Triton (TRITON_MAX_TENSOR_NUMEL)
MOST = {"num_stages": 16, "group_m": 1 << 12}
MILLISECONDS = 1e9  # and errors as a multiple: far beyond what was ever measured

Key = tuple[str, Problem]  # an op, and a problem whose batch is a power of two


class TableError(ValueError):
    """The file is not a table that this version can read; the message names the file and what is wrong."""


class OtherSchemaError(TableError):
    """The file says that it is of another schema: it belongs to another version of fastmixer."""


@dataclass(frozen=True)
class Entry:
    """One measured choice.

    ms, default_ms: medians of the choice and of what would run without it, in one run; of the op's own launch
    ("timed" is "kernel") or of all of its half ("half"). parity: the error of the choice as a multiple of
    eager's. when: ISO time. kernels, triton: the device code and Triton it was measured with.
    """

    op: str
    problem: Problem
    choice: Choice
    ms: float | None = None
    default_ms: float | None = None
    parity: float | None = None
    timed: str = "kernel"
    when: str = ""
    kernels: str = ""
    triton: str = ""

    @property
    def key(self) -> Key:
        return key_of(self.op, self.problem)

    @property
    def is_current(self) -> bool:
        """Whether it was measured on the code that would run now."""
        return (self.kernels, self.triton) == (kernels_hash(), triton_version())


class Row(NamedTuple):
    """An entry as it stands in the file, and what it says: or, if ``entry`` is None, why it is refused."""

    raw: object
    entry: Entry | None
    refusal: str = ""


@dataclass(frozen=True)
class Table:
    """One file's content. versions, kernels: those of the last writer; each entry has its own."""

    device: str
    slug: str
    versions: Mapping[str, str]
    kernels: str
    rows: tuple[Row, ...]

    @functools.cached_property
    def all_entries(self) -> tuple[Entry, ...]:
        """Those that can be read, in the file's order."""
        return tuple(row.entry for row in self.rows if row.entry is not None)

    @functools.cached_property
    def entries(self) -> dict[Key, Choice]:
        """The choices that were measured on the code that would run now; of two for one key the later."""
        return {entry.key: entry.choice for entry in self.all_entries if entry.is_current}

    @property
    def code(self) -> dict[str, str]:
        """What an entry that does not name its device code and Triton was measured with."""
        return {"kernels": self.kernels, "triton": self.versions.get("triton", "")}


def key_of(op: str, problem: Problem) -> Key:
    """What an entry is found by: the op, and the problem with its batch rounded up to a power of two."""
    return op, problem._replace(batch=next_power_of_2(problem.batch))


def load(path: Path) -> Table:
    """Reads and checks a table.

    Raises:
        OtherSchemaError: it is of another schema.
        TableError: it is no table, of another GPU than its name says, or damaged. A single entry that says
            something impossible is no error: it is refused in ``Table.rows``.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_bytes())
        schema = content.get("schema") if isinstance(content, dict) else None
        if schema not in (None, SCHEMA):
            raise OtherSchemaError(
                f"{path} is another version's: schema: expected {SCHEMA}, got {schema!r:.80}"
            )
        table = _table(content)
        slug = path.name.partition(".")[0]
        _expect(table.slug == slug, f"slug: expected {slug!r} as in the file's name, got {table.slug!r}")
    except OtherSchemaError:
        raise
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path} is not a table of tuned tiles: {error}") from error
    return table


def _expect(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def _field(values: dict, name: str, kind: type, where: str = "") -> object:
    value = values.get(name)
    _expect(type(value) is kind, f"{where}{name}: expected {kind.__name__}, got {value!r:.80}")
    return value


def _table(content: object) -> Table:
    _expect(isinstance(content, dict), f"expected an object, got {type(content).__name__}")
    _expect(content.get("schema") == SCHEMA, f"schema: expected {SCHEMA}, got {content.get('schema')!r:.80}")
    versions = _field(content, "versions", dict)
    _expect(all(isinstance(v, str) for v in versions.values()), f"versions: expected strings, got {versions}")
    kernels = _field(content, "kernels", str)
    table = Table(_field(content, "device", str), _field(content, "slug", str), versions, kernels, ())
    entries = _field(content, "entries", list)
    rows = tuple(_row(values, f"entries[{i}].", table.code) for i, values in enumerate(entries))
    return dataclasses.replace(table, rows=rows)


def _row(values: object, where: str, code: dict[str, str]) -> Row:
    try:
        return Row(values, _entry(values, where, code))
    except ValueError as error:
        return Row(values, None, str(error))


def _entry(values: object, where: str, code: dict[str, str]) -> Entry:
    _expect(isinstance(values, dict), f"{where[:-1]}: expected an object, got {values!r:.80}")
    values = {"timed": "kernel", "when": "", **code, **values}
    texts = {name: _field(values, name, str, where) for name in ("op", "timed", "when", "kernels", "triton")}
    use = _field(values, "use", str, where)
    _expect(use in USES, f"{where}use: expected one of {', '.join(USES)}, got {use!r:.80}")
    op = texts["op"]
    _expect(op in OPS or op in HALVES, f"{where}op: expected one of {', '.join(OPS)}, got {op!r:.80}")
    _expect(op in USES[use], f"{where}use: {use!r} is not for op {op!r:.80}")
    choice = _tiles(values.get("tiles"), f"{where}tiles") if use == "tiles" else None
    if use in ("aten", "reference"):
        choice = Library(use)
    numbers = {name: _number(values.get(name), where + name) for name in ("ms", "default_ms", "parity")}
    problem = _problem(_field(values, "problem", dict, where), f"{where}problem.")
    if isinstance(choice, TileConfig):
        _check_kernel(op, problem, choice, where)
    return Entry(problem=problem, choice=choice, **texts, **numbers)


def _problem(values: dict, where: str) -> Problem:
    _expect(
        set(values) == set(Problem._fields),
        f"{where[:-1]}: expected {list(Problem._fields)}, got {[*values]}",
    )
    sizes = {name: _field(values, name, int, where) for name in Problem._fields[:4]}
    for name, size in sizes.items():
        _expect(size >= 1, f"{where}{name}: expected at least 1, got {size}")
    _expect(_is_power_of_2(sizes["batch"]), f"{where}batch: expected a power of two, got {sizes['batch']}")
    dtypes = {name: _field(values, name, str, where) for name in Problem._fields[4:]}
    for name, dtype in dtypes.items():
        _expect(dtype in DTYPES, f"{where}{name}: expected one of {', '.join(DTYPES)}, got {dtype!r:.80}")
    return Problem(**sizes, **{name: DTYPES[dtype] for name, dtype in dtypes.items()})


def _tiles(values: object, where: str) -> TileConfig:
    """TileConfig's fields by name: blocks and warps are powers of two, block_k may be 0."""
    _expect(isinstance(values, dict), f"{where}: expected an object, got {values!r:.80}")
    fields = {field.name: field for field in dataclasses.fields(TileConfig)}
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    _expect(required <= set(values) <= set(fields), f"{where}: expected {[*fields]}, got {[*values]}")
    for name, value in values.items():
        kind = int if fields[name].default is dataclasses.MISSING else type(fields[name].default)
        _field(values, name, kind, f"{where}.")
        if name.startswith("block_") or name == "num_warps":
            unused = name == "block_k" and value == 0
            _expect(
                unused or _is_power_of_2(value), f"{where}.{name}: expected a power of two, got {value!r:.80}"
            )
        elif kind is int:
            _expect(
                1 <= value <= MOST[name], f"{where}.{name}: expected 1 to {MOST[name]}, got {value!r:.80}"
            )
    return TileConfig(**values)


def _check_kernel(op: str, problem: Problem, tiles: TileConfig, where: str) -> None:
    """What the kernel of ``op`` can run on any GPU: sides from 16, tiles that Triton takes, whole rows."""
    M, N, K = tiles.block_m, tiles.block_n, tiles.block_k
    elements = max(M * N, M * K, N * K)
    message = f"{where}tiles: expected at most {ELEMENTS} elements, got {elements!r:.80}"
    _expect(elements <= ELEMENTS, message)
    _expect(
        tiles.num_warps <= WARPS, f"{where}tiles.num_warps: expected at most {WARPS}, got {tiles.num_warps}"
    )
    if op == "layer_norm_bwd":
        message = f"{where}tiles.block_n: expected at least the {problem.channels} channels for {op}, got {N}"
        _expect(problem.channels <= N, message)
    if OPS[op].one_pass:
        most = ONE_PASS_TOKENS
        message = f"{where}problem.tokens: expected at most {most} for {op}, got {problem.tokens}"
        _expect(problem.tokens <= most, message)
    sides = ("block_m", "block_n") if OPS[op].one_pass else ("block_m", "block_n", "block_k")
    for name in sides if OPS[op].tuned else ():
        size = getattr(tiles, name)
        _expect(size >= 16, f"{where}tiles.{name}: expected at least 16 for {op}, got {size}")


def _number(value: object, where: str) -> float | None:
    # Compared, for an int may be too large to be made a float; NaN fails both comparisons.
    valid = value is None or (type(value) in (int, float) and 0 <= value < MILLISECONDS)
    _expect(valid, f"{where}: expected a number from 0 to {MILLISECONDS:g} or null, got {value!r:.80}")
    return value


def _is_power_of_2(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


def as_json(entry: Entry) -> dict:
    """The entry as it stands in a file; ValueError for what would be refused when it is read."""
    choice = entry.choice
    use = choice.value if isinstance(choice, Library) else "fused" if choice is None else "tiles"
    problem = {
        name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
        for name, value in entry.problem._asdict().items()
    }
    values = {"op": entry.op, "problem": problem, "use": use}
    values["tiles"] = dataclasses.asdict(choice) if use == "tiles" else None
    rest = ("ms", "default_ms", "parity", "timed", "when", "kernels", "triton")
    values |= {name: getattr(entry, name) for name in rest}
    _entry(values, "entry.", {})
    return values

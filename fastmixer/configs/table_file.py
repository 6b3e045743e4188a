"""What a table file holds: its entries, and how they are read, checked and written as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastmixer.configs.ops import HALVES, ONE_PASS_TOKENS, OPS, WHOLE_HALVES, libraries
from fastmixer.configs.problem import Choice, Library, Problem, TileConfig, bucketed
from fastmixer.dtypes import dtype_name

SCHEMA = 2  # of the files: raise it when a field changes its meaning

DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32", "float64")}
USES = {  # what an entry's "use" may say of which ops
    "tiles": tuple(OPS),
    **{one.value: tuple(name for name, op in OPS.items() if one in op.library) for one in Library},
    "reference": WHOLE_HALVES,
    "fused": WHOLE_HALVES,
}

# What no kernel exceeds on any GPU.
WARPS = 32  # 1024 threads per program; of a wave's 64 lanes see ``resources.why_not``
ELEMENTS = 1 << 20  # of a tensor in Triton (TRITON_MAX_TENSOR_NUMEL)
MILLISECONDS = 1e9  # and errors as a multiple: far beyond what was ever measured


class Field(NamedTuple):
    """What a value in the file must be: its type, and what else is expected of it."""

    kind: type
    expected: str = ""
    accepts: Callable[[Any], bool] = lambda value: True


def _one_of(names: Collection[str]) -> Field:
    return Field(str, f"one of {', '.join(names)}", lambda name: name in names)


# Of the header, an entry, its problem and its tiles: no two fields share a name and differ in what they hold.
FIELDS = {
    **dict.fromkeys(("device", "slug", "kernels", "triton", "timed", "when"), Field(str)),
    "versions": Field(dict, "strings", lambda versions: all(isinstance(v, str) for v in versions.values())),
    "entries": Field(list),
    "problem": Field(dict),
    "op": _one_of((*OPS, *HALVES)),
    "use": _one_of(USES),
    # Compared, for an int may be too large to be made a float; NaN fails both comparisons.
    **dict.fromkeys(("ms", "default_ms", "parity"), Field(
        object, f"a number from 0 to {MILLISECONDS:g} or null",
        lambda value: value is None or (type(value) in (int, float) and 0 <= value < MILLISECONDS),
    )),
    **dict.fromkeys(("tokens", "channels", "hidden"), Field(int, "at least 1", lambda n: n >= 1)),
    **dict.fromkeys(("x_dtype", "dtype"), _one_of(DTYPES)),
    "approximate": _one_of(("none", "tanh")),
    **dict.fromkeys(
        ("batch", "block_m", "block_n", "num_warps"),
        Field(int, "a power of two", lambda n: n >= 1 and n & (n - 1) == 0),
    ),
    "block_k": Field(int, "a power of two", lambda n: n >= 0 and n & (n - 1) == 0),
    "num_stages": Field(int, "1 to 16", lambda n: 1 <= n <= 16),
    "group_m": Field(int, "1 to 4096", lambda n: 1 <= n <= 4096),
    **dict.fromkeys(("descriptors", "persistent"), Field(bool)),
}  # fmt: skip
HEADER = ("versions", "kernels", "device", "slug", "entries")
MEASURED = ("ms", "default_ms", "parity", "timed", "when", "kernels", "triton")
TILES = tuple(field.name for field in dataclasses.fields(TileConfig))

Key = tuple[str, Problem]  # an op, and a problem whose batch is a power of two


class TableError(ValueError):
    """The file is not a table that this version can read; the message names the file and what is wrong."""


class OtherSchemaError(Exception):
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
        """What it is found by."""
        return self.op, bucketed(self.problem)


class Row(NamedTuple):
    """An entry as it stands in the file, and what it says: or, if ``entry`` is None, why it is refused."""

    raw: object
    entry: Entry | None
    refusal: str = ""


class Table(NamedTuple):
    """One file's content. code: the kernels and Triton of entries that do not name their own."""

    path: Path
    device: str
    code: Mapping[str, str]
    rows: tuple[Row, ...]

    @property
    def entries(self) -> list[Entry]:
        """Those that can be read, in the file's order."""
        return [row.entry for row in self.rows if row.entry is not None]


def load(path: Path) -> Table:
    """Reads and checks a table.

    Raises:
        OtherSchemaError: it is of another schema.
        TableError: it is no table, of another GPU than its name says, or damaged. A single entry that says
            something impossible is no error: it is refused in ``Table.rows``.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        schema = content.get("schema")
        if schema not in (None, SCHEMA):
            raise OtherSchemaError(
                f"{path} is another version's: schema: expected {SCHEMA}, got {schema!r:.80}"
            )
        _expect(schema is not None, "schema", str(SCHEMA), schema)
        header = _checked(content, HEADER)
        slug = path.name.partition(".")[0]
        _expect(header["slug"] == slug, "slug", f"{slug!r} as in the file's name", header["slug"])
    except (ValueError, RecursionError) as error:
        raise TableError(f"{path} is not a table of tuned tiles: {error}") from error
    code = {"kernels": header["kernels"], "triton": header["versions"].get("triton", "")}
    rows = []
    for i, values in enumerate(header["entries"]):
        try:
            rows.append(Row(values, _entry(values, f"entries[{i}]", code)))
        except ValueError as error:
            rows.append(Row(values, None, str(error)))
    return Table(path, header["device"], code, tuple(rows))


def _expect(holds: bool, name: str, expected: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")


def _checked(values: dict, names: Iterable[str], where: str = "") -> dict[str, Any]:
    """The values of the fields; ValueError names the first that is not what it must be."""
    for name in names:
        kind, expected, accepts = FIELDS[name]
        value = values.get(name)
        _expect(kind in (object, type(value)), where + name, kind.__name__, value)
        _expect(accepts(value), where + name, expected, value)
    return {name: values.get(name) for name in names}


def _entry(values: object, where: str, code: Mapping[str, str]) -> Entry:
    _expect(isinstance(values, dict), where, "an object", values)
    values = {"timed": "kernel", "when": "", **code, **values}
    fields = _checked(values, ("op", "use", "problem", *MEASURED), f"{where}.")
    op, use = fields["op"], fields.pop("use")
    if op not in USES[use]:
        raise ValueError(f"{where}.use: {use!r} is not for op {op!r}")
    problem = fields["problem"]
    _expect(set(problem) == set(Problem._fields), f"{where}.problem", str([*Problem._fields]), [*problem])
    problem = Problem(**_checked(problem, Problem._fields, f"{where}.problem."))
    problem = problem._replace(x_dtype=DTYPES[problem.x_dtype], dtype=DTYPES[problem.dtype])
    choice = next((library for library in Library if library.value == use), None)
    if choice and op in OPS and choice not in libraries(op, problem):
        raise ValueError(f"{where}.use: {use!r} does not serve {op} with these dtypes and this GELU")
    if use == "tiles":
        tiles = values.get("tiles")
        _expect(isinstance(tiles, dict), f"{where}.tiles", "an object", tiles)
        _expect({"block_m", "block_n"} <= set(tiles) <= set(TILES), f"{where}.tiles", str([*TILES]), [*tiles])
        choice = TileConfig(**_checked(tiles, tiles, f"{where}.tiles."))
        _check_kernel(op, problem, choice, where)
    return Entry(**fields | {"problem": problem, "choice": choice})


def _check_kernel(op: str, problem: Problem, tiles: TileConfig, where: str) -> None:
    """What the kernel of ``op`` can run: sides from 16, tiles that Triton takes, whole rows, descriptors."""
    M, N, K = tiles.block_m, tiles.block_n, tiles.block_k
    elements = max(M * N, M * K, N * K)
    _expect(elements <= ELEMENTS, f"{where}.tiles", f"at most {ELEMENTS} elements", elements)
    _expect(tiles.num_warps <= WARPS, f"{where}.tiles.num_warps", f"at most {WARPS}", tiles.num_warps)
    if op == "layer_norm_bwd":
        whole = f"at least the {problem.channels} channels for {op}"
        _expect(problem.channels <= N, f"{where}.tiles.block_n", whole, N)
    sides = {"block_m": M, "block_n": N, "block_k": K} if OPS[op].tuned else {}
    if OPS[op].one_pass:
        tokens, most = problem.tokens, ONE_PASS_TOKENS
        _expect(tokens <= most, f"{where}.problem.tokens", f"at most {most} for {op}", tokens)
        del sides["block_k"]
    matrix = OPS[op].is_matrix
    channel = matrix and OPS[op].half == "channel"
    _expect(channel or not tiles.persistent, f"{where}.tiles.persistent", f"false for {op}", True)
    one_dtype = problem.dtype.itemsize == 2 and problem.x_dtype == problem.dtype
    described = matrix and op != "token_fc1" and one_dtype  # whose operand is normalised on its way
    expected = f"false for {op} with these dtypes"
    _expect(described or not tiles.descriptors, f"{where}.tiles.descriptors", expected, True)
    for name, size in sides.items():
        _expect(size >= 16, f"{where}.tiles.{name}", f"at least 16 for {op}", size)


def as_json(entry: Entry) -> dict:
    """The entry as it stands in a file; ValueError for what would be refused when it is read."""
    choice, problem = entry.choice, entry.problem
    use = choice.value if isinstance(choice, Library) else "fused" if choice is None else "tiles"
    dtypes = {name: dtype_name(getattr(problem, name)) for name in ("x_dtype", "dtype")}
    values = {"op": entry.op, "problem": problem._asdict() | dtypes, "use": use}
    values["tiles"] = dataclasses.asdict(choice) if use == "tiles" else None
    values |= {name: getattr(entry, name) for name in MEASURED}
    _entry(values, "entry", {})
    return values

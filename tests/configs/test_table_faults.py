"""Table files that are damaged, another version's or a trickster's: what is refused, kept and said."""

from __future__ import annotations

import itertools
import json
import os
import re
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_tables import BF16, ENTRY, PROBLEM, SLUG, TARGET, TILES, edited, entries_of, folders, ship

from fastmixer import configs
from fastmixer.configs import DEVICES, TARGETS, Library, Problem, Target, TileConfig, resources, tables
from fastmixer.configs.designs import DESIGNS, candidates
from fastmixer.configs.ops import OPS
from fastmixer.configs.tables import TableWarning

__all__ = ["folders"]  # the fixture, of every test here

DAMAGE = {
    "empty": (b"", "Expecting value"),
    "half a file": (b'{"schema": 2, "dev', "Unterminated string"),
    "binary": (b"\xff\xfe\x00\x01", "not a table"),
    "a list": (b"[]", "expected an object, got list"),
    "no object of ours": (b'{"schema": 2, "x": NaN}', "versions: expected dict, got None"),
    "deep": (b"[" * 100_000, "not a table"),
    "foreign": (b'{"name": "my notes"}', "schema: expected 2, got None"),
    "too many digits": (b'{"schema": 2, "device": ' + b"9" * 5000 + b"}", "not a table"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_left_by_a_lookup_and_set_aside_by_a_measurement(name: str, folders: Path) -> None:
    content, message = DAMAGE[name]
    folders.parent.mkdir(parents=True)
    folders.write_bytes(content)
    taken = folders.with_name(f"{folders.name}.corrupt-1")
    taken.write_text("an earlier one")
    with pytest.warns(TableWarning, match=message) as warned:
        assert tables.table_of(TARGET) == tables.table_of(TARGET) == {}
    assert len(warned) == 1 and set(folders.parent.iterdir()) == {folders, taken}, "not even a lock"
    assert folders.read_bytes() == content
    with pytest.warns(TableWarning, match="corrupt-2"):
        tables.record(SLUG, ENTRY)
    assert taken.read_text() == "an earlier one"
    assert folders.with_name(f"{folders.name}.corrupt-2").read_bytes() == content
    assert tables.table_of(TARGET) == {ENTRY.key: TILES}


def test_a_file_that_is_being_written_is_read_when_it_is_whole(folders: Path) -> None:
    """As by cp or rsync from another machine, which do not rename."""
    tables.record(SLUG, ENTRY)
    whole = folders.read_bytes()
    folders.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(TableWarning, match="is not used"):
        assert tables.table_of(TARGET) == {}
    folders.write_bytes(whole)
    tables.table_of.cache_clear()
    assert tables.table_of(TARGET) == {ENTRY.key: TILES}


def test_a_folder_that_may_only_be_read(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a container: what was tuned is used, and a measurement says why it is not kept."""
    tables.record(SLUG, ENTRY)
    before = {path: path.read_bytes() for path in folders.parent.iterdir()}

    def refuse(path: Path) -> None:
        raise PermissionError(f"read-only: {path}")

    monkeypatch.setattr(tables, "locked", refuse)
    assert tables.table_of(TARGET) == {ENTRY.key: TILES}
    with pytest.raises(OSError, match="read-only"):
        tables.record(SLUG, replace(ENTRY, op="channel_fc2"))
    assert {path: path.read_bytes() for path in folders.parent.iterdir()} == before


# ---- another version's file --------------------------------------------------------------------------------

OTHERS = ['{"schema": 1, "tiles": []}', '{"schema": "2.1"}', '{"schema": 0, "entries": NaN}']


@pytest.mark.parametrize("content", OTHERS)
def test_another_schemas_file_stays_and_ours_lies_beside_it(content: str, folders: Path) -> None:
    folders.parent.mkdir(parents=True)
    folders.write_text(content)
    with pytest.warns(
        TableWarning, match="another version's, of another schema.*sample-gpu.schema-2.json"
    ) as warned:
        assert tables.table_of(TARGET) == {}
    assert len(warned) == 1 and [*folders.parent.iterdir()] == [folders]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tables.record(SLUG, ENTRY, "Sample GPU")
        tables.record(SLUG, replace(ENTRY, op="channel_fc2"))
        assert set(tables.table_of(TARGET)) == {ENTRY.key, ("channel_fc2", PROBLEM)}
    assert folders.read_text() == content
    beside = folders.with_name("sample-gpu.schema-2.json")
    assert tables.user_path(SLUG) == beside and json.loads(beside.read_text())["slug"] == SLUG
    folders.unlink()  # the other version is gone: what was tuned is not
    tables.table_of.cache_clear()
    assert len(tables.table_of(TARGET)) == 2


def test_another_version_that_comes_first_to_the_name(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes between the choice of a name and the lock."""
    original = tables.locked

    def late(path: Path):
        if path == folders:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(OTHERS[0])
        return original(path)

    monkeypatch.setattr(tables, "locked", late)
    tables.record(SLUG, ENTRY)
    assert folders.read_text() == OTHERS[0] and tables.table_of(TARGET) == {ENTRY.key: TILES}


def test_a_table_of_another_gpu_under_this_name_is_kept(folders: Path) -> None:
    tables.record("another-gpu", ENTRY)
    os.replace(tables.user_path("another-gpu"), folders)
    content = folders.read_bytes()
    with pytest.warns(TableWarning, match="slug: expected 'sample-gpu' .* got 'another-gpu'"):
        assert tables.table_of(TARGET) == {}
    assert folders.read_bytes() == content
    with pytest.warns(TableWarning, match="corrupt-1"):
        tables.record(SLUG, ENTRY)
    assert folders.with_name(f"{folders.name}.corrupt-1").read_bytes() == content


def test_a_shipped_table_of_another_schema_is_named() -> None:
    tables.shipped_path(SLUG).write_text(OTHERS[0])
    with pytest.warns(TableWarning, match="a shipped table is not used: .* another version's"):
        assert tables.table_of(TARGET) == {}


# ---- single entries ----------------------------------------------------------------------------------------

FC1 = {"block_m": 64, "block_n": 64, "block_k": 64}
LONG = PROBLEM._replace(tokens=257)._asdict() | {"x_dtype": "bfloat16", "dtype": "bfloat16"}
WRONG = {
    "use": (
        {"use": "magic"},
        r"entries\[0\].use: expected one of tiles, aten, aten_gelu, addmm, reference, fused, got 'magic'",
    ),
    "use of the op": ({"use": "reference"}, "use: 'reference' is not for op 'channel_fc1'"),
    "a product of the other op": ({"use": "addmm"}, "use: 'addmm' is not for op 'channel_fc1'"),
    "tanh's product for erf": (
        {"use": "aten_gelu"},
        "use: 'aten_gelu' does not serve channel_fc1 with these",
    ),
    "op": ({"op": 3}, r"entries\[0\].op: expected str, got 3"),
    "unknown op": ({"op": "conv"}, r"entries\[0\].op: expected one of channel_fc1, .*, got 'conv'"),
    "tiles": ({"tiles": None}, r"entries\[0\].tiles: expected an object, got None"),
    "unknown tile field": ({"tiles": {"block_m": 64, "block_n": 64, "size": 1}}, "tiles: expected"),
    "missing tile field": ({"tiles": {"block_m": 64}}, "tiles: expected"),
    "odd tile": ({"tiles": {"block_m": 48, "block_n": 64}}, "block_m: expected a power of two, got 48"),
    "true tile": ({"tiles": {"block_m": True, "block_n": 64}}, "block_m: expected int, got True"),
    "stages": (
        {"tiles": {"block_m": 64, "block_n": 64, "num_stages": 0}},
        "num_stages: expected 1 to 16, got 0",
    ),
    "many stages": ({"tiles": FC1 | {"num_stages": 10**9}}, "num_stages: expected 1 to 16, got 1000000000"),
    "huge group": ({"tiles": FC1 | {"group_m": 1 << 40}}, "group_m: expected 1 to 4096"),
    "many warps": ({"tiles": FC1 | {"num_warps": 64}}, "num_warps: expected at most 32, got 64"),
    "huge block": ({"tiles": FC1 | {"block_m": 1 << 70}}, "tiles: expected at most 1048576 elements"),
    "negative block": ({"tiles": FC1 | {"block_n": -64}}, "block_n: expected a power of two, got -64"),
    "cut rows": (
        {"op": "layer_norm_bwd", "tiles": {"block_m": 4, "block_n": 512}},
        r"entries\[0\].tiles.block_n: expected at least the 768 channels for layer_norm_bwd, got 512",
    ),
    "no depth": ({"tiles": {"block_m": 64, "block_n": 64}}, r"tiles.block_k: expected at least 16 .* got 0"),
    "too flat": (
        {"tiles": {"block_m": 8, "block_n": 64, "block_k": 64}},
        "block_m: expected at least 16 .* 8",
    ),
    "one pass, too narrow": (
        {"op": "token_mixing", "tiles": {"block_m": 64, "block_n": 8}},
        r"entries\[0\].tiles.block_n: expected at least 16 for token_mixing, got 8",
    ),
    "one pass, too long": (
        {"op": "token_dgrad", "problem": LONG, "tiles": {"block_m": 64, "block_n": 32}},
        r"entries\[0\].problem.tokens: expected at most 256 for token_dgrad, got 257",
    ),
    "a normalised operand by descriptors": (
        {"op": "token_fc1", "tiles": FC1 | {"descriptors": True}},
        "tiles.descriptors: expected false for token_fc1 with these dtypes",
    ),
    "persistent programs of the token half": (
        {"op": "token_fc2", "tiles": FC1 | {"persistent": True}},
        "tiles.persistent: expected false for token_fc2",
    ),
    "half in training": ({"op": "token_half_training"}, "use: 'tiles' is not for op 'token_half_training'"),
    "problem": ({"problem": {"batch": 64}}, r"problem: expected \['batch'"),
    "time": ({"ms": -1}, "ms: expected a number from 0 to 1e.09 or null, got -1"),
    "no number": ({"ms": float("nan")}, "ms: expected a number .* got nan"),
    "endless": ({"default_ms": float("inf")}, "default_ms: expected a number .* got inf"),
    "beyond a float": ({"parity": 10**400}, "parity: expected a number .* got 1000"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_entry_is_named_and_the_others_count(name: str, folders: Path) -> None:
    changes, message = WRONG[name]
    tables.record(SLUG, ENTRY)
    edited(folders, entry=changes)
    other = replace(ENTRY, op="channel_fc2")
    tables.record(SLUG, other)
    raw = json.loads(folders.read_text())["entries"][0]
    with pytest.warns(
        TableWarning, match=f"(?s){folders}: 1 of its entries cannot be run .*{message}"
    ) as warned:
        assert tables.table_of(TARGET) == {other.key: TILES}
        assert tables.table_of(TARGET) == {other.key: TILES}
    assert len(warned) == 1
    assert {name: str(raw[name]) for name in changes} == {name: str(changes[name]) for name in changes}, (
        "kept"
    )


@pytest.mark.parametrize(
    ("size", "value", "message"),
    [("batch", 63, "power of two, got 63"), ("tokens", 0, "at least 1, got 0"), ("dtype", "int8", "'int8'")],
)
def test_a_wrong_problem_is_named(size: str, value: object, message: str, folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    problem = json.loads(folders.read_text())["entries"][0]["problem"]
    edited(folders, entry={"problem": problem | {size: value}})
    assert re.match(
        rf"entries\[0\].problem.{size}: expected .*{message}", tables.load(folders).rows[0].refusal
    )


def test_many_wrong_entries_are_counted_and_what_is_none_stays(folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    edited(folders, entries=[1, None, "x", [], {}])
    tables.record(SLUG, ENTRY)
    with pytest.warns(TableWarning, match=r"5 of its entries .*entries\[0\]: expected an object.*and 2 more"):
        assert tables.table_of(TARGET) == {ENTRY.key: TILES}
    assert json.loads(folders.read_text())["entries"][:4] == [1, None, "x", []]


def test_measuring_again_replaces_a_wrong_entry(folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    edited(folders, entry={"tiles": {"block_m": 8, "block_n": 8}})
    tables.record(SLUG, ENTRY)
    assert [row.entry.choice for row in tables.load(folders).rows] == [TILES]


def test_of_two_entries_for_one_problem_the_later_counts(folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    first = json.loads(folders.read_text())["entries"][0]
    edited(folders, entries=[first | {"use": "aten", "tiles": None}, first])
    tables.table_of.cache_clear()
    assert tables.table_of(TARGET) == entries_of(folders) == {ENTRY.key: TILES}
    tables.record(SLUG, replace(ENTRY, choice=Library.ATEN))
    assert len(tables.load(folders).rows) == 1


# ---- what a GPU cannot run ---------------------------------------------------------------------------------

SMALL = replace(TARGETS["sm_86"], name=SLUG)
HIP = replace(TARGETS["gfx942"], name=SLUG)
WIDE = TileConfig(128, 256, 64, num_warps=8, num_stages=3)


@pytest.mark.parametrize(
    ("target", "op", "tiles", "message"),
    [
        (TARGET, "channel_fc1", TileConfig(256, 256, 128, 8, 4), "need 393216 bytes of shared memory"),
        (SMALL, "channel_fc1", replace(TILES, num_stages=6), "need 122880 .*, a program has 101376"),
        (SMALL, "token_mixing", TileConfig(64, 128, num_stages=4), "need 159744 bytes"),
        (HIP, "channel_fc1", TileConfig(64, 64, 64, 32, 1), "32 warps of 64 are more than 1024 threads"),
        (replace(TARGET, shared_memory=140 * 1024), "channel_fc1", WIDE, "for this GPU, it does not fit"),
    ],
)  # fmt: skip
def test_a_tile_that_cannot_run_here_is_named_and_the_shipped_one_counts(
    target: Target, op: str, tiles: TileConfig, message: str
) -> None:
    entry = replace(ENTRY, op=op, choice=TileConfig(32, 32, 32, 4, 2))
    ship(entry)
    tables.record(SLUG, replace(entry, choice=tiles))
    with pytest.warns(
        TableWarning, match=f"1 of its entries cannot be run .*{op} of \\(64, 196, .*{message}"
    ):
        assert tables.table_of(target) == {entry.key: entry.choice}
    assert tables.source(*entry.key, target) == "shipped"


def test_no_compiled_tile_needs_less_shared_memory_than_the_bound() -> None:
    compared = 0
    for device in DEVICES.values():
        for version in resources.recorded(device.target.arch):
            target = replace(device.target, triton=version)
            for op, tokens, dtype in itertools.product(OPS, (49, 196, 256), (BF16, torch.float32)):
                problem = Problem(64, tokens, 768, 384 if op.startswith("token") else 3072, dtype, dtype)
                for tiles in candidates(op, problem, target):
                    found = resources.find(op, problem, tiles, target)
                    if found is not None:
                        compared += 1
                        least = resources.least_shared_memory(op, problem, tiles)
                        assert least <= found.shared_memory, (op, problem, tiles, target)
    assert compared > 500


def test_no_choice_of_the_model_is_refused() -> None:
    for device, op, dtype in itertools.product(DEVICES.values(), OPS, (BF16, torch.float32)):
        problem = Problem(64, 196, 768, 384 if op.startswith("token") else 3072, dtype, dtype)
        tiles = configs.select_kernels(op, problem, device.target)
        assert resources.why_not(op, problem, tiles, device.target) == "", (op, device.name, tiles)


def test_a_table_may_have_every_design(folders: Path) -> None:
    entries = {}
    for op in DESIGNS:
        sizes = (784, 768, 384) if op.startswith("token") else (196, 768, 3072)
        problem = Problem(64, *sizes, BF16, BF16)
        for design in DESIGNS[op]:
            entry = replace(ENTRY, op=op, problem=problem, choice=design.runs)
            tables.record(SLUG, entry)
            entries[entry.key] = design.runs
            assert tables.table_of(TARGET) == entries, design


def test_a_target_of_another_triton_gets_what_was_measured_with_that(folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    edited(folders, entry={"triton": "1.2.3+local"})
    tables.record(SLUG, replace(ENTRY, choice=Library.ATEN))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tables.table_of(TARGET) == {ENTRY.key: Library.ATEN}
        assert tables.table_of(replace(TARGET, triton="1.2.3")) == {ENTRY.key: TILES}
        assert tables.table_of(replace(TARGET, triton="9.9.9")) == {}

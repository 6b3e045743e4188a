"""Tables of measured choices: what is read, refused, kept and looked up. All figures in here are made up."""

from __future__ import annotations

import ast
import json
import os
import threading
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmixer import configs
from fastmixer.configs import INTERPRETER, TARGETS, Library, Problem, TileConfig, device_code, tables
from fastmixer.configs.tables import Entry, TableWarning

SLUG = "sample-gpu"
TARGET = replace(TARGETS["sm_90"], name=SLUG)
BF16 = torch.bfloat16
PROBLEM = Problem(64, 196, 768, 3072, BF16, BF16)
TILES = TileConfig(32, 64, 128, num_warps=8, num_stages=5)
ENTRY = Entry("channel_fc1", PROBLEM, TILES, ms=1.5, default_ms=2.0, parity=0.9, when="2000-01-01T00:00:00Z")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No shipped table, a user's folder of its own, and nothing read before; the user's file."""
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(tables, "SHIPPED", shipped)
    monkeypatch.setenv("FASTMIXER_CACHE_DIR", str(tmp_path / "cache"))
    tables.table_of.cache_clear()
    yield tables.user_path(SLUG)
    tables.table_of.cache_clear()


def entries_of(path: Path) -> dict:
    """The choices in a file that were measured with the code that would run now."""
    chosen, refused = tables.choices(tables.load(path), TARGET)
    assert not refused
    return chosen


def ship(entry: Entry) -> None:
    """Puts an entry into the shipped table, by way of the user's."""
    path = tables.user_path(SLUG)
    before = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    tables.record(SLUG, entry, "Sample GPU")
    os.replace(path, tables.shipped_path(SLUG))
    if before is not None:
        path.write_bytes(before)
    tables.table_of.cache_clear()


def edited(path: Path, **changes: object) -> dict:
    """Changes fields of the file's header or, by "entry", of its first entry."""
    content = json.loads(path.read_text())
    content["entries"][0].update(changes.pop("entry", {}))
    content.update(changes)
    path.write_text(json.dumps(content))
    return content


def test_a_recorded_entry_is_what_select_returns() -> None:
    before = tables.edition()
    tables.record(SLUG, ENTRY, "Sample GPU")
    assert tables.edition() > before, "what was made of earlier choices is no longer valid"
    assert configs.choose("channel_fc1", PROBLEM, TARGET) == TILES
    assert configs.select("channel_fc1", PROBLEM, TARGET) != TILES, "without the table"
    near = PROBLEM._replace(batch=33)
    assert configs.choose("channel_fc1", near, TARGET) == TILES, "batches are rounded up to powers of two"
    assert configs.choose("channel_fc1", PROBLEM._replace(batch=65), TARGET) != TILES
    assert configs.choose("channel_fc2", PROBLEM, TARGET) != TILES


def test_a_table_holds_for_its_own_gpu_only() -> None:
    tables.record(SLUG, ENTRY, "Sample GPU")
    other = replace(TARGET, name="another-gpu")
    assert tables.table_of(other) == {} and tables.table_of(replace(TARGET, name="")) == {}
    assert configs.choose("channel_fc1", PROBLEM, other) != TILES
    tables.user_path(SLUG).rename(tables.user_path("another-gpu"))
    tables.table_of.cache_clear()
    with pytest.warns(
        TableWarning, match="slug: expected 'another-gpu' as in the file's name, got 'sample-gpu'"
    ):
        assert tables.table_of(other) == {}


def test_the_interpreter_reads_no_table() -> None:
    tables.record(SLUG, ENTRY)
    assert configs.choose("channel_fc1", PROBLEM, replace(INTERPRETER, name=SLUG)) != TILES


@pytest.mark.parametrize(
    ("op", "choice", "use"),
    [
        ("channel_fc1", TILES, "tiles"),
        ("channel_fc2", Library.ATEN, "aten"),
        ("channel_fc2", Library.ADDMM, "addmm"),
        ("token_half", Library.REFERENCE, "reference"),
        ("channel_half", None, "fused"),
        ("token_mixing", TileConfig(64, 32), "tiles"),
        ("layer_norm_bwd", TileConfig(1, 1024), "tiles"),
    ],
)
def test_every_kind_of_choice_comes_back(op: str, choice: object, use: str, folders: Path) -> None:
    tables.record(SLUG, replace(ENTRY, op=op, choice=choice), "Sample GPU")
    table = tables.load(folders)
    assert entries_of(folders) == {(op, PROBLEM): choice}
    assert (table.device, table.path) == ("Sample GPU", folders)
    assert json.loads(folders.read_text())["entries"][0]["use"] == use
    entry = table.entries[0]
    assert (entry.ms, entry.default_ms, entry.parity, entry.when) == (1.5, 2.0, 0.9, ENTRY.when)


def test_what_erfs_gelu_was_measured_with_holds_for_tanhs_and_not_the_other_way_round() -> None:
    tanh, table = PROBLEM._replace(approximate="tanh"), {("channel_fc1", PROBLEM): TILES}
    assert configs.select("channel_fc1", tanh, TARGET, table) is TILES
    table |= {("channel_fc1", tanh): Library.ATEN_GELU}
    assert configs.select("channel_fc1", tanh, TARGET, table) is Library.ATEN_GELU
    assert configs.select("channel_fc1", PROBLEM, TARGET, table) is TILES


def test_what_could_not_be_read_again_is_not_written(folders: Path) -> None:
    for bad in (replace(ENTRY, choice=Library.REFERENCE), replace(ENTRY, ms=float("nan"))):
        with pytest.raises(ValueError, match="entry."):
            tables.record(SLUG, bad)
    assert not folders.exists()
    with pytest.raises(ValueError, match="slug"):
        tables.record("../elsewhere", ENTRY)


def test_what_the_user_measured_wins_entry_by_entry() -> None:
    ship(ENTRY)
    tables.record(SLUG, replace(ENTRY, op="channel_fc2", choice=Library.ATEN))
    key, found = ("channel_fc1", PROBLEM), tables.table_of(TARGET)
    assert found == {key: TILES, ("channel_fc2", PROBLEM): Library.ATEN}
    assert tables.source(*key, TARGET) == "shipped"
    tables.record(SLUG, replace(ENTRY, choice=Library.ATEN))
    assert tables.table_of(TARGET)[key] is Library.ATEN
    assert tables.source(*key, TARGET) == "user" and tables.source("token_half", PROBLEM, TARGET) is None
    with pytest.raises(TypeError):
        found["channel_fc1", PROBLEM] = None


def test_recording_again_replaces_the_entry_and_keeps_the_others(folders: Path) -> None:
    others = [replace(ENTRY, op="channel_fc2"), replace(ENTRY, problem=PROBLEM._replace(batch=8))]
    for entry in (ENTRY, *others, replace(ENTRY, choice=Library.ATEN)):
        tables.record(SLUG, entry, "Sample GPU")
    found = entries_of(folders)
    assert found == {**{entry.key: TILES for entry in others}, ENTRY.key: Library.ATEN}


def test_fields_that_this_version_does_not_know_stay(folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    edited(folders, entry={"note": "mine"})
    tables.record(SLUG, replace(ENTRY, op="channel_fc2"))
    assert json.loads(folders.read_text())["entries"][0]["note"] == "mine"


@pytest.mark.parametrize("changed", ["kernels", "triton"])
def test_entries_of_other_code_are_kept_and_not_used(changed: str, folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    edited(folders, entry={changed: "other"})
    tables.table_of.cache_clear()
    with pytest.warns(TableWarning, match="1 of its entries were measured with other kernels") as warned:
        assert tables.table_of(TARGET) == {}
        assert tables.table_of(TARGET) == {}
    assert len(warned) == 1
    tables.record(SLUG, replace(ENTRY, choice=Library.ATEN))
    entries = tables.load(folders).entries
    assert [entry.choice for entry in entries] == [TILES, Library.ATEN], "the old one is still there"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been measured again: nothing to warn of
        assert tables.table_of(TARGET) == {ENTRY.key: Library.ATEN}


def test_an_entry_without_its_own_code_has_the_files(folders: Path) -> None:
    tables.record(SLUG, ENTRY)
    content = json.loads(folders.read_text())
    for name in ("kernels", "triton"):
        del content["entries"][0][name]
    folders.write_text(json.dumps(content))
    assert entries_of(folders) == {ENTRY.key: TILES}
    content["kernels"] = "other"
    folders.write_text(json.dumps(content))
    assert entries_of(folders) == {}
    tables.record(SLUG, replace(ENTRY, op="channel_fc2"))  # rewrites the header
    assert entries_of(folders) == {("channel_fc2", PROBLEM): TILES}, "the old one stays old"


def test_a_file_that_cannot_be_read_is_left_alone_with_a_warning(folders: Path) -> None:
    folders.mkdir(parents=True)  # a folder in its place: unreadable for root too
    with pytest.warns(TableWarning, match="user's table is not used") as warned:
        assert tables.table_of(TARGET) == {}
    assert [w.filename for w in warned] == [__file__]
    assert folders.is_dir()
    with pytest.raises(OSError):
        tables.record(SLUG, ENTRY)


def test_a_damaged_shipped_table_is_named_and_stays() -> None:
    tables.shipped_path(SLUG).write_text("{")
    tables.record(SLUG, ENTRY)
    with pytest.warns(TableWarning, match="shipped table is not used") as warned:
        assert tables.table_of(TARGET) == {ENTRY.key: TILES}
    assert len(warned) == 1 and tables.shipped_path(SLUG).read_text() == "{"


def test_a_writer_that_was_killed_leaves_the_old_file_and_no_obstacle(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tables.record(SLUG, ENTRY)
    before = folders.read_bytes()

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            tables.record(SLUG, replace(ENTRY, op="channel_fc2"))
    assert folders.read_bytes() == before
    tables.record(SLUG, replace(ENTRY, op="channel_fc2"))
    assert len(entries_of(folders)) == 2


def test_two_writers_at_once_lose_nothing(folders: Path) -> None:
    """Threads: each takes the lock by a handle of its own. For processes see the tuner's tests."""
    count, ops, errors = 12, ("channel_fc1", "channel_fc2"), []
    start = threading.Barrier(2)

    def write(op: str) -> None:
        start.wait()
        for power in range(count):
            try:
                tables.record(SLUG, replace(ENTRY, op=op, problem=PROBLEM._replace(batch=1 << power)))
            except Exception as error:
                errors.append(error)

    writers = [threading.Thread(target=write, args=(op,)) for op in ops]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert errors == []
    found = entries_of(folders)
    assert set(found) == {(op, PROBLEM._replace(batch=1 << power)) for op in ops for power in range(count)}


def test_where_the_users_table_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert tables.user_path(SLUG) == tmp_path / "cache" / "configs" / "sample-gpu.json"
    monkeypatch.delenv("FASTMIXER_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tables.user_path(SLUG) == tmp_path / "xdg" / "fastmixer" / "configs" / "sample-gpu.json"
    for invalid in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", invalid)
        assert tables.user_path(SLUG) == tmp_path / ".cache" / "fastmixer" / "configs" / "sample-gpu.json"


def test_without_a_home_directory_there_is_no_users_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is not in /etc/passwd: choosing works, and writing says what to set."""
    ship(ENTRY)
    for name in ("FASTMIXER_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert configs.choose("channel_fc1", PROBLEM, TARGET) == TILES
    with pytest.raises(OSError, match="FASTMIXER_CACHE_DIR is not set, and there is no home directory"):
        tables.record(SLUG, ENTRY)


def test_every_shipped_table_can_be_read() -> None:
    folder = Path(configs.__file__).parent
    for path in folder.glob("*.json"):
        assert tables.load(path).entries, path
        assert not any(row.refusal for row in tables.load(path).rows), path


def test_the_hash_sees_code_and_not_comments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = 'def f(x):\n    """Adds."""\n    return x + 1  # one\n'

    def hashed(text: str) -> str:
        (tmp_path / "kernel.py").write_text(text)
        monkeypatch.setattr(device_code, "_kernels_folder", lambda: tmp_path)
        return device_code.kernels_hash.__wrapped__()

    first = hashed(source)
    assert (
        hashed("# A comment.\n\n" + source.replace("  # one", "").replace("Adds.", "Adds\n    one.")) == first
    )
    assert hashed(source.replace('    """Adds."""\n', "")) == first
    for other in (source.replace("1", "2"), source.replace("x + 1", "'x' + 1"), source + "    return 2\n"):
        assert hashed(other) != first


def test_a_modules_hash_sees_what_it_imports_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_code, "_kernels_folder", lambda: tmp_path)

    def hashed(**changed: str) -> str:
        sources = {"one": "from .two import f\n", "two": "from .three import f\n", "three": "", "four": ""}
        for name, source in (sources | changed).items():
            (tmp_path / f"{name}.py").write_text(source)
        return device_code.kernels_hash.__wrapped__("one")

    assert hashed() == hashed(four="x = 1\n")
    assert len({hashed(), hashed(one="from .two import g\n"), hashed(two=""), hashed(three="x = 1\n")}) == 4


def test_modules_of_device_code_import_each_other_in_the_form_that_the_hash_reads() -> None:
    for path in device_code._kernels_folder().glob("*.py"):
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        others = {node.module for node in imports if node.module not in ("__future__", "triton")}
        assert others <= {file.stem for file in device_code._with_imports(path.stem)}, path.name


def test_the_hash_is_of_the_installed_kernels() -> None:
    folder = device_code._kernels_folder()
    assert (folder / "mlp.py").is_file() and (folder / "token_mixing.py").is_file()
    assert len(device_code.kernels_hash()) == 16

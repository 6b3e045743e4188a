"""What the records say, of which device code, and how it counts in a choice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmixer.configs import (
    DEVICES,
    Problem,
    device_code,
    explained,
    resources,
    rule,
    select_kernels,
)
from fastmixer.configs.designs import candidates
from fastmixer.configs.ops import ONE_PASS, TUNED

H200 = replace(DEVICES["nvidia-h200"].target, triton="3.9.0")
TINY = resources.Resources(64, 1024, 0, 0, 0, 400, 100, 1, 64, True, False)


def problem_of(op: str) -> Problem:
    tokens = 196 if op.startswith("channel") or op in ONE_PASS else 784
    hidden = 3072 if op.startswith("channel") else 384
    return Problem(64, tokens, 768, hidden, torch.bfloat16, torch.bfloat16)


def key_of(op: str) -> str:
    """Of the rule's tile."""
    return resources.key_of(op, problem_of(op), rule(op, problem_of(op), H200))


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a copy of the device code that counts as the installed one, with no records so far."""
    folder = tmp_path / "kernels"
    shutil.copytree(device_code._kernels_folder(), folder)
    monkeypatch.setattr(device_code, "_kernels_folder", lambda: folder)
    monkeypatch.setattr(resources, "COMPILED", tmp_path / "compiled")
    forget()
    yield folder
    forget()


def forget() -> None:
    """What is constant in a process whose files do not change."""
    for cached in (device_code.kernels_hash, device_code._modules, resources.recorded):
        cached.cache_clear()


def recorded(columns: dict[str, object], **changed: object) -> dict[str, resources.Resources | None]:
    """What is read from a file with one row of each op, with these values by column."""
    content = {
        "kernels": {op: resources.code_of(op) for op in TUNED},
        "columns": list(columns),
        "entries": {key_of(op): list(columns.values()) for op in TUNED},
    }
    path = resources.COMPILED / "triton-3.9.0" / "sm_90.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | changed))
    forget()
    return dict(resources.records(H200))


def test_columns_are_read_by_their_names(installed: Path) -> None:
    columns = TINY._asdict()
    expected = {key_of(op): TINY for op in TUNED}
    assert recorded(columns) == expected
    assert recorded(dict(reversed(columns.items()))) == expected
    assert recorded({"clusters": 7, **columns}) == expected
    assert recorded(columns, entries={key_of("channel_fc1"): None}) == {key_of("channel_fc1"): None}


@pytest.mark.parametrize("missing", resources.Resources._fields)
def test_a_file_without_a_column_records_nothing(missing: str, installed: Path) -> None:
    columns = TINY._asdict()
    del columns[missing]
    assert recorded(columns) == {}
    assert resources.recorded_triton(H200) == "3.9.0"  # and no other version takes its place


@pytest.mark.parametrize(
    "module, ops",
    [
        ("mlp", {"channel_fc1", "channel_fc2", "token_fc1", "token_fc2"}),
        ("token_mixing", {"token_mixing"}),
        ("activations", set(TUNED)),
        ("pack", set()),
    ],
)
def test_ops_of_a_changed_kernel_are_not_recorded(module: str, ops: set[str], installed: Path) -> None:
    before = recorded(TINY._asdict())
    with (installed / f"{module}.py").open("a") as file:
        file.write("CHANGED = 1\n")
    forget()
    after = resources.records(H200)
    assert after == {key: row for key, row in before.items() if key.partition(",")[0] not in ops}
    assert resources.recorded_triton(H200) == "3.9.0"


def test_what_is_not_recorded_has_the_rules_tile(installed: Path) -> None:
    """Even where the record of other code speaks against it."""
    columns = TINY._replace(serialised=True)._asdict()
    other = {op: "0" * 16 for op in TUNED}
    assert recorded(columns, kernels=other) == {}
    target = replace(H200, name="with records of another kernel")  # whose choices are not remembered
    for op in TUNED:
        assert explained(op, problem_of(op), target)[:2] == (rule(op, problem_of(op), target), "rule")


def test_an_op_that_is_no_more_is_not_recorded(installed: Path) -> None:
    kernels = {"token_gating": "0" * 16}
    assert recorded(TINY._asdict(), kernels=kernels, entries={"token_gating, -": list(TINY)}) == {}


def test_every_kernel_is_found_in_the_module_that_triton_finds_it_in() -> None:
    from fastmixer.ops.launch import kernels

    modules = device_code._modules()
    found = {name: getattr(kernels(), name).fn.__module__.rpartition(".")[2] for name in modules}
    assert modules == found


def test_reading_the_records_imports_no_triton() -> None:
    script = (
        "import sys; from fastmixer.configs import resources; resources.recorded(90); print(*sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert "triton" not in ran.stdout.split()


@pytest.mark.parametrize(
    "op, fact, is_clean",
    [
        ("channel_fc1", {}, True),
        ("channel_fc1", {"loop_spills": 1}, False),
        ("channel_fc1", {"serialised": True}, False),
        ("channel_fc1", {"full_waits": 0}, True),
        ("channel_fc1", {"full_waits": 2}, False),
        ("channel_mlp_hidden_bwd_recompute", {"full_waits": 2}, False),
        ("token_mixing", {"full_waits": 3}, True),
        ("token_mixing", {"loop_spills": 1}, False),
    ],
    ids=str,
)
def test_a_compiled_fact_moves_the_choice_away_from_the_rules_tile(
    op: str, fact: dict, is_clean: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = replace(H200, name=f"{op} with {fact}")  # whose choices are not remembered
    problem = problem_of(op)
    first, needs = rule(op, problem, target), TINY._replace(**fact)
    records = {resources.key_of(op, problem, tiles): TINY for tiles in candidates(op, problem, target)}
    records[resources.key_of(op, problem, first)] = needs
    monkeypatch.setattr(resources, "records", lambda target: records)
    assert needs.is_clean(op) == is_clean
    assert (select_kernels(op, problem, target) == first) == is_clean

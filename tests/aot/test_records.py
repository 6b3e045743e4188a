"""Records of compiled resources: whose count, that they are complete, shipped and of this device code."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmixer.aot import record as compile_candidates
from fastmixer.configs import TARGETS, Problem, Target, resources
from fastmixer.configs.designs import candidates
from fastmixer.configs.device_code import triton_version
from fastmixer.configs.ops import TUNED

ROOT = Path(__file__).parents[2]
CHANNEL_FC1 = Problem(64, 196, 768, 3072, torch.bfloat16, torch.bfloat16)
RECORDED = {
    f"{arch}-{version}": (arch, replace(target, triton=version))
    for arch, target in TARGETS.items()
    for version in resources.recorded(target.arch)
}
of_each_record = pytest.mark.parametrize("arch, target", RECORDED.values(), ids=RECORDED)


def test_every_arch_has_records_and_each_is_package_data(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {arch for arch, _ in RECORDED.values()} == set(TARGETS)
    given: dict = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert set(given["package_data"]) <= set(given["packages"])
    shipped = {
        path
        for package, patterns in given["package_data"].items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    assert shipped == set((ROOT / "fastmixer").rglob("*.json"))
    assert len(shipped) >= len(RECORDED)


@of_each_record
def test_every_candidate_is_recorded_and_one_of_each_op_runs(arch: str, target: Target) -> None:
    from fastmixer.aot.record import jobs

    recorded = resources.records(target)
    keys = {}
    for op, problem, tiles in jobs(target):
        keys.setdefault((op, problem), []).append(resources.key_of(op, problem, tiles))
    assert {key for group in keys.values() for key in group} == set(recorded)
    for (op, problem), group in keys.items():
        fits = [
            recorded[key] is not None
            and recorded[key].shared_memory <= target.shared_memory
            and recorded[key].residency(target.arch, tiles.num_warps) > 0
            for key, tiles in zip(group, candidates(op, problem, target), strict=True)
        ]
        assert fits[0], f"the rule's tile of {op} for {problem} does not fit {arch}"
        assert len(group) <= 11


@of_each_record
def test_the_records_are_of_this_device_code(arch: str, target: Target) -> None:
    """Otherwise: ``python -m fastmixer.aot.record``, with ``--op`` for what differs."""
    record = json.loads(compile_candidates.path_of(arch, target.triton).read_text(encoding="utf-8"))
    assert record["kernels"] == {op: resources.code_of(op) for op in TUNED}
    assert record["columns"] == list(resources.Resources._fields)
    assert resources.release(record["triton"]) == resources.release(target.triton)


@pytest.mark.parametrize(
    "running, expected",
    [
        ("3.6.0", "3.6.0"),
        ("3.6.0+git1a2b3c", "3.6.0"),
        ("3.8.1", "3.6.0"),
        ("3.9.0", "3.9.0"),
        ("3.10.0", "3.10.0"),
        ("3.11", "3.10.0"),
        ("3.5.1", "3.6.0"),
        ("not installed", "3.10.0"),
        ("of unknown version", "3.10.0"),
    ],
)
def test_the_record_of_the_running_triton_or_the_nearest_counts(running: str, expected: str) -> None:
    assert resources.nearest(["3.10.0", "3.6.0", "3.9.0"], running) == expected
    assert resources.nearest([], running) is None


def test_an_empty_version_is_the_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    target = TARGETS["sm_90"]
    found = {}
    for version in ("3.6.0", "3.9.0"):
        monkeypatch.setattr(resources, "triton_version", lambda version=version: f"{version}+local")
        found[version] = resources.records(target)
        assert found[version] is resources.records(replace(target, triton=version))
        assert resources.recorded_triton(target) == version
    assert found["3.6.0"] != found["3.9.0"]


def test_an_op_is_recorded_anew_and_the_others_stay_where_their_code_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pool:
        def submit(self, function, *job) -> Future:
            future = Future()
            future.set_result([row])
            return future

    path = tmp_path / "triton" / "sm_90.json"
    monkeypatch.setattr(compile_candidates, "path_of", lambda arch, triton: path)
    row = 1
    first = compile_candidates.record("sm_90", Pool())
    compile_candidates.write("sm_90", first)
    assert json.loads(path.read_text()) == first
    same = resources.code_of
    monkeypatch.setattr(resources, "code_of", lambda op: same(op) + "!" * (op == "token_dgrad"))
    row = 2
    second = compile_candidates.record("sm_90", Pool(), ["channel_fc1"])
    rows = {(key.split(",")[0], value) for key, [value] in second["entries"].items()}
    assert rows == {("channel_fc1", 2)} | {
        (op, 1) for op in TUNED if op not in ("channel_fc1", "token_dgrad")
    }
    path.write_text(json.dumps(second | {"columns": ["registers"]}))
    third = compile_candidates.record("sm_90", Pool(), ["channel_fc1"])
    assert {key.split(",")[0] for key in third["entries"]} == {"channel_fc1"}


def test_records_hold_for_aligned_problems_only() -> None:
    tiles = candidates("channel_fc1", CHANNEL_FC1, TARGETS["sm_90"])[0]
    assert resources.find("channel_fc1", CHANNEL_FC1, tiles, TARGETS["sm_90"]) is not None
    assert resources.find("channel_fc1", CHANNEL_FC1._replace(channels=769), tiles, TARGETS["sm_90"]) is None
    assert resources.find("channel_fc1", CHANNEL_FC1, tiles, Target("cuda", 75, 40, 64 * 1024)) is None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_86", "gfx942"])
def test_the_records_are_what_a_fresh_compilation_finds(arch: str) -> None:
    """In a process without TRITON_INTERPRET; with the running Triton."""
    path = compile_candidates.path_of(arch, triton_version())
    if not path.is_file():
        pytest.skip(f"no record of {arch} with the running Triton, {triton_version()}")
    script = f"""
import json
from fastmixer.aot import record as c
from fastmixer.configs import resources
from fastmixer.configs.targets import TARGETS
found = {{}}
wanted = [job for job in c.jobs(TARGETS[{arch!r}]) if job[1].dtype.itemsize == 2][::29]
for job in wanted:
    found[resources.key_of(*job)] = c.compile_one(*job, {arch!r})
print(json.dumps(found))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    found, recorded = json.loads(ran.stdout), json.loads(path.read_text(encoding="utf-8"))["entries"]
    assert found and set(found) <= set(recorded)
    assert found == {key: recorded[key] for key in found}

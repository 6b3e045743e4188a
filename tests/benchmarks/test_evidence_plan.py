"""The plans of ``evidence``: they fit their minutes, and each command understands what it is told."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from benchmarks import bench
from benchmarks.evidence import plan, stages
from benchmarks.evidence.plan import Stage
from fastmixer import cli
from fastmixer.configs.designs import parsed
from fastmixer.ops import launch

ROOT = Path(__file__).parents[2]
PLANNED = [(name, stage) for name in plan.PLANS for stage in plan.stages(name, Path("/out"), "gpu", "abc")]


@pytest.mark.parametrize("name", plan.PLANS)
def test_what_follows_one_another_fits_the_minutes(name: str) -> None:
    planned = [stage for plan_name, stage in PLANNED if plan_name == name]
    total = 60 * plan.MINUTES - plan.RESERVE
    assert sum(stage.seconds for stage in planned if not stage.background) <= total
    assert all(stage.seconds <= total for stage in planned)
    assert len({stage.name for stage in planned}) == len(planned)


def test_the_race_of_designs_takes_four_minutes_at_most() -> None:
    """Of the channel half's forward, for three models at two batches; with the rival, and time to end."""
    planned = plan.stages("race", Path("/out"), "gpu")
    assert sum(stage.seconds for stage in planned if not stage.background) + plan.RESERVE <= 240
    (stage,) = (stage for stage in planned if stage.name == "designs")
    options = bench._parser().parse_args(stage.arguments(60.0)[5:])
    assert options.designs[:2] == ["channel_fc1", "channel_fc2"]
    assert all(parsed(text)["channel_fc2"] == "addmm" for text in options.designs[2:])
    cases = [(case.level, case.model, case.batch) for case in bench.cases_of(options)]
    models = ["mixer_b16_224", "mixer_s16_224", "mixer_l16_224"]
    assert cases == [("block", model, batch) for model in models for batch in (256, 64)]


def of_kind(kind: str, planned: list[Stage]) -> list[Stage]:
    found = [stage for stage in planned if list(stage.command[:3]) == ["-m", "fastmixer", kind]]
    assert found
    return found


@pytest.mark.parametrize("dry", [False, True])
def test_bench_understands_its_commands(dry: bool) -> None:
    """By its own parser, and each of them has cases to measure."""
    everything = plan.stages("dry run", Path("/out"), "gpu", "abc") if dry else [s for _, s in PLANNED]
    for stage in of_kind("bench", everything):
        options = bench._parser().parse_args(stage.arguments(60.0)[5:])
        assert options.time_limit == 60 - plan.TO_END and options.final and options.commit == "abc"
        folder = "/out/warm" if stage.background else "/out/bench/gpu"
        assert options.output == Path(f"{folder}/{stage.name}.json")
        cases = bench.cases_of(options)
        assert {case.level for case in cases} == set(options.levels) and options.opponents[0] == "fused"
        assert options.device == ("cpu" if dry else "cuda") and stage.timed != stage.background


def test_what_is_timed_in_the_first_plan_was_compiled_beside_the_checks() -> None:
    """Every case and opponent but max-autotune; a launch of the kernel level is one of the block's."""
    planned = plan.stages("first", Path("/out"), "gpu")
    raced: dict[bool, set] = {True: set(), False: set()}
    for stage in of_kind("bench", planned):
        options = bench._parser().parse_args(stage.arguments(60.0)[5:])
        raced[stage.background] |= {
            (case.key, name)
            for case in bench.cases_of(options)
            for name in {"fused", "fused_lean", "compile"} & set(options.opponents)
            if case.level != "kernel"
        }
    assert raced[False] and raced[False] == raced[True]


def test_the_tuner_understands_its_command() -> None:
    (stage,) = of_kind("tune", [stage for _, stage in PLANNED])
    options = cli._parser().parse_args(stage.arguments(60.0)[4:])
    assert options.budget == 60 - plan.TO_END
    assert stage.environment == {"FASTMIXER_CACHE_DIR": "/out/tuned"}
    (after,) = [s for _, s in PLANNED if s.environment == stage.environment and s is not stage]
    assert after.name == "tuned"


def test_stages_are_known_to_their_process_and_to_the_page() -> None:
    page = (ROOT / "docs" / "evidence.md").read_text()
    for _, stage in PLANNED:
        assert f"`{stage.name}`" in page
        if tuple(stage.command[:2]) == plan.STAGES:
            assert stage.command[2] in stages.RUN


def test_the_dry_run_has_every_stage_and_two_that_go_wrong() -> None:
    dry = {stage.name: stage for stage in plan.stages("dry run", Path("/out"), "gpu")}
    assert set(dry) == {stage.name for _, stage in PLANNED} | {"hang", "crash"}
    assert [stage.name for stage in dry.values() if stage.expected != "ok"] == ["hang", "crash"]
    for _, real in PLANNED:
        assert (dry[real.name].background, dry[real.name].timed) == (real.background, real.timed)
        assert not dry[real.name].tool


def test_nvidias_tools_run_what_their_stages_run() -> None:
    tools = {stage.name: stage for _, stage in PLANNED if stage.tool}
    assert set(tools) == {"ncu", "memcheck", "racecheck"}
    for name, stage in tools.items():
        words = stage.arguments(60.0)
        python = words.index(sys.executable)
        assert words[1] == ("ncu" if name == "ncu" else "compute-sanitizer")
        assert words[python + 1 :] == ["-u", *plan.STAGES, name, "/out"]
        if name != "ncu":
            assert words[python - 2 : python] == ["--tool", name]
            assert stage.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def test_ncu_is_told_the_names_that_kernels_have() -> None:
    pattern = next(word for word in plan.NCU.split() if word.startswith("regex:")).removeprefix("regex:")
    found = [name for name in vars(launch.kernels()) if re.fullmatch(pattern, f"_{name}_kernel")]
    assert sorted(found) == ["fc1", "fc2", "row_moments", "token_mixing"]

"""What runs for an op: tables first, then the rule unless compiled code is against it; and it fits."""

from __future__ import annotations

import builtins
import itertools
import pathlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmixer import configs
from fastmixer.aot.catalogue import MODEL_BLOCKS
from fastmixer.configs import (
    DEVICES,
    INTERPRETER,
    ONE_PASS,
    TARGETS,
    Library,
    Problem,
    Target,
    TileConfig,
    explained,
    ops,
    resources,
    rule,
    select,
    select_kernels,
)
from fastmixer.configs.choice import GUESS_MARGIN, LIBRARY_MARGIN, bucketed
from fastmixer.configs.designs import candidates
from fastmixer.configs.ops import HALVES
from fastmixer.configs.predict import cost
from fastmixer.configs.tiles import is_launched

LIBRARY_OPS = tuple(name for name, op in ops.OPS.items() if op.library)
TUNED_OPS = tuple(name for name, op in ops.OPS.items() if op.tuned)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
OPS = (*ops.OPS, *HALVES)
TWO_PASS_OPS = ("token_fc1", "token_fc2", "token_mlp_hidden_bwd_recompute", "layer_norm_fwd_transposed")
CHANNEL_OPS = tuple(op for op in OPS if ops.half_of(op) == "channel")
TOKEN_OPS = tuple(op for op in OPS if op not in (*TWO_PASS_OPS, *CHANNEL_OPS))
BATCHES = (1, 8, 64, 256, 1024)
DTYPES = ((BF16, BF16), (FP16, FP16), (FP32, FP32), (FP32, BF16), (FP32, FP16))  # of x, of the products
H200 = DEVICES["nvidia-h200"].target
# Every device with each Triton that its arch is recorded with.
RECORDED = {
    f"{slug}, Triton {version}": replace(device.target, triton=version)
    for slug, device in DEVICES.items()
    for version in resources.recorded(device.target.arch)
}
on_each = pytest.mark.parametrize("target", RECORDED.values(), ids=RECORDED)
B16 = MODEL_BLOCKS["B/16"]


def problem_of(op: str, shape=B16, batch: int = 64, x_dtype=BF16, dtype=BF16) -> Problem:
    hidden = shape.channel_hidden if op.startswith("channel") else shape.token_hidden
    return Problem(batch, shape.tokens, shape.channels, hidden, x_dtype, dtype)


def fits(op: str, problem: Problem, tiles: TileConfig, target: Target) -> bool:
    """By the recorded resources; passes without products have no record and little need."""
    if op.startswith("layer_norm"):
        return tiles.num_warps <= 32
    found = resources.find(op, problem, tiles, target)
    return (
        found is not None
        and found.shared_memory <= target.shared_memory
        and found.residency(target.arch, tiles.num_warps) >= 1
    )


def check(op: str, problem: Problem, target: Target) -> None:
    choice = select(op, problem, target)
    if op in HALVES:
        assert choice in (None, Library.REFERENCE)
    elif isinstance(choice, Library):
        assert choice is Library.ATEN and op in LIBRARY_OPS
    else:
        assert isinstance(choice, TileConfig)
        assert op in ("token_wgrad_fc2",) or fits(op, problem, choice, target), (op, problem, choice)


@on_each
def test_every_op_of_every_model_gets_what_fits_on_every_device(target: Target) -> None:
    """All models, batches and dtypes, autocast included; one-pass weights share powers of two."""
    for shape, batch, (x_dtype, dtype) in itertools.product(MODEL_BLOCKS.values(), BATCHES, DTYPES):
        for op in TOKEN_OPS + CHANNEL_OPS:
            check(op, problem_of(op, shape, batch, x_dtype, dtype), target)
        blocks = [select(op, problem_of(op, shape, batch, x_dtype, dtype), target).block_n for op in ONE_PASS]
        assert all(max(blocks) % block == 0 for block in blocks)


@on_each
def test_long_sequences_get_what_fits_on_every_device(target: Target) -> None:
    long = B16._replace(tokens=784)
    for op, (x_dtype, dtype) in itertools.product(TWO_PASS_OPS, DTYPES):
        check(op, problem_of(op, long, 8, x_dtype, dtype), target)
    for op in ONE_PASS:
        assert select(op, problem_of(op, long), target) is None


@on_each
def test_what_is_not_clean_is_not_chosen_over_what_is(target: Target) -> None:
    for shape, batch, op in itertools.product(MODEL_BLOCKS.values(), BATCHES, TOKEN_OPS + CHANNEL_OPS):
        if op in HALVES or op.startswith("layer_norm"):
            continue
        problem = problem_of(op, shape, batch)
        chosen = resources.find(op, problem, select_kernels(op, problem, target), target)
        if chosen is None or chosen.is_clean(op):
            continue
        for tiles in candidates(op, problem, target):
            other = resources.find(op, problem, tiles, target)
            assert other is None or not other.is_clean(op), (op, problem, tiles)


sizes = st.integers(1, 5000)


@settings(deadline=None)
@given(op=st.sampled_from(OPS), batch=sizes, tokens=sizes, channels=sizes, hidden=sizes, data=st.data())
def test_any_problem_gets_a_choice_that_is_the_same_twice(op, batch, tokens, channels, hidden, data) -> None:
    x_dtype, dtype = data.draw(st.sampled_from([*DTYPES, (torch.float64, torch.float64)]))
    target = data.draw(st.sampled_from([INTERPRETER, *TARGETS.values(), H200]))
    problem = Problem(batch, tokens, channels, hidden, x_dtype, dtype)
    first = explained(op, problem, target)
    assert explained(op, problem, target) == first
    assert (first.choice is None) == (
        (op in ONE_PASS and tokens > configs.ONE_PASS_TOKENS)
        or (op in HALVES and first.choice is not Library.REFERENCE)
    )


@pytest.mark.parametrize("ask", [select, configs.choose, configs.explained])
def test_an_unknown_op_is_named(ask) -> None:
    with pytest.raises(ValueError, match="op: expected one of channel_fc1, .*, got 'conv'"):
        ask("conv", problem_of("channel_fc1"), H200)


def test_every_op_says_what_its_kernel_writes() -> None:
    """The tuner's gate fills that with NaN before it looks."""
    assert all(ops.OUTPUTS[op.kernel] for op in ops.OPS.values())


@pytest.mark.parametrize("target", [INTERPRETER, TARGETS["sm_90"]], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("one_pass", [True, None])
def test_a_new_kernel_without_a_rule_is_named(target, dtype, one_pass, monkeypatch) -> None:
    monkeypatch.setitem(ops.OPS, "token_gating", ops.Op("gating", "token", "forward", one_pass=one_pass))
    with pytest.raises(ValueError, match="op: no rule for the tiles of 'token_gating'"):
        rule("token_gating", problem_of("token_gating", dtype=dtype), target)


def test_an_op_of_neither_design_is_launched_at_any_number_of_tokens(monkeypatch) -> None:
    monkeypatch.setitem(ops.OPS, "token_gating", ops.Op("gating", "token", "forward"))
    for tokens, one_pass in ((1, True), (256, True), (257, False)):
        problem = problem_of("token_gating", B16._replace(tokens=tokens))
        launched = {op for op in ops.OPS if is_launched(op, problem, H200)}
        assert "token_gating" in launched and ("token_mixing" in launched) == one_pass
        assert set(TWO_PASS_OPS).isdisjoint(launched) if one_pass else launched.issuperset(TWO_PASS_OPS)


def test_choosing_reads_no_file_and_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled resources are package data, read once; after that nothing is opened, whatever is asked."""
    targets = (*RECORDED.values(), *(device.target for device in DEVICES.values()))
    for target in targets:
        resources.records(target)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("select must not do this")

    monkeypatch.setattr(builtins, "open", refuse)
    monkeypatch.setattr(pathlib.Path, "open", refuse)
    for name in ("is_available", "get_device_properties", "current_device", "device_count"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    for target, op in itertools.product(targets, OPS):
        select(op, problem_of(op, batch=3), target)


@pytest.mark.parametrize("op", ["channel_fc1", "token_mixing", "layer_norm_bwd", "token_half"])
def test_no_choice_depends_on_whether_a_gpu_exists(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for available in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        found.append(explained(op, problem_of(op, batch=5), H200))
    assert found[0] == found[1]


# --- Tables.

TUNED = TileConfig(64, 64, 32, num_warps=4, num_stages=2)


@pytest.mark.parametrize("choice", [TUNED, Library.ATEN], ids=str)
def test_a_table_counts_before_the_model(choice) -> None:
    problem = problem_of("channel_fc1", batch=64)
    table = {("channel_fc1", problem): choice}
    assert select("channel_fc1", problem, H200, table) is choice
    assert select("channel_fc1", problem._replace(batch=33), H200, table) is choice  # 33 to 64 share a bucket
    assert explained("channel_fc1", problem, H200, table).source == "table"
    assert explained("channel_fc1", problem._replace(batch=65), H200, table).source != "table"
    assert select("channel_fc2", problem, H200, table) == select("channel_fc2", problem, H200)
    assert select("channel_fc1", problem, INTERPRETER, table) == select("channel_fc1", problem, INTERPRETER)


def test_a_table_can_say_fused_where_the_model_says_reference() -> None:
    problem = problem_of("token_half", batch=256, x_dtype=FP32, dtype=FP32)
    assert select("token_half", problem, H200) is Library.REFERENCE
    assert select("token_half", problem, H200, {("token_half", problem): None}) is None


@pytest.mark.parametrize("choice", [TUNED, Library.ATEN, None], ids=str)
def test_kernels_only_takes_what_a_table_says_of_kernels(choice, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of("channel_fc2", x_dtype=FP32, dtype=FP32)
    table = {("token_half", problem): Library.REFERENCE} | (
        {("channel_fc2", problem): choice} if choice else {}
    )
    monkeypatch.setattr(configs.tables, "table_of", lambda target: table)
    assert configs.choose("token_half", problem, H200) is Library.REFERENCE
    assert isinstance(configs.choose("channel_fc2", problem, H200), TileConfig) == (choice is TUNED)
    kernels = TUNED if choice is TUNED else select_kernels("channel_fc2", problem, H200)
    assert isinstance(kernels, TileConfig)
    assert configs.choose_kernels("channel_fc2", problem, H200) == kernels
    assert all(configs.choose_kernels(half, problem, H200) is None for half in HALVES)


def test_a_launch_reads_the_tables_of_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of("channel_fc2", batch=100)
    table = {("channel_fc2", bucketed(problem)): TUNED}
    asked = []
    monkeypatch.setattr(configs.tables, "table_of", lambda target: asked.append(target.name) or table)
    assert configs.choose("channel_fc2", problem, H200) is TUNED
    assert set(asked) == {"nvidia-h200"}
    asked.clear()
    assert isinstance(configs.choose("channel_fc2", problem, INTERPRETER), TileConfig)
    assert not asked


def test_tables_that_were_read_anew_count_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of("channel_fc2", batch=64)
    for choice in (TUNED, Library.ATEN):
        table = {("channel_fc2", problem): choice}
        monkeypatch.setattr(configs.tables, "table_of", lambda target, table=table: table)
        assert configs.choose("channel_fc2", problem, H200) is choice


def test_batches_are_bucketed() -> None:
    found = {select("channel_fc1", problem_of("channel_fc1", batch=batch), H200) for batch in range(33, 65)}
    assert len(found) == 1
    assert bucketed(problem_of("channel_fc1", batch=65)).batch == 128


# --- The model's choices.


@pytest.mark.parametrize("model", ["S/16", "B/16"])
def test_the_default_at_batch_64_on_hopper_is_clean(model: str) -> None:
    for op in (*ONE_PASS, "channel_fc1", "channel_fc2", "channel_mlp_hidden_bwd"):
        problem = problem_of(op, MODEL_BLOCKS[model])
        found = resources.find(op, problem, select(op, problem, TARGETS["sm_90"]), TARGETS["sm_90"])
        assert found.wgmma and found.is_clean(op), op


WIDE = TileConfig(128, 256, 64, num_warps=8, num_stages=3)
ON_3_6, ON_3_9 = (replace(H200, triton=version) for version in ("3.6.0", "3.9.0"))


@pytest.mark.parametrize("slug", [slug for slug, device in DEVICES.items() if device.target.arch == 90])
def test_an_fc1_that_a_triton_serialises_is_not_chosen_there(slug: str) -> None:
    """128 x 256 for an fp32 x: with 3.6.0 its products wait for each other (ptxas C7515), with 3.9.0 not."""
    cases = itertools.product(MODEL_BLOCKS.values(), [1 << power for power in range(11)])
    problems = [problem_of("channel_fc1", *case)._replace(x_dtype=torch.float32) for case in cases]
    assert all(WIDE in candidates("channel_fc1", problem, H200) for problem in problems)
    assert resources.find("channel_fc1", problems[0], WIDE, ON_3_6).serialised
    assert not resources.find("channel_fc1", problems[0], WIDE, ON_3_9).serialised
    old = replace(DEVICES[slug].target, triton="3.6.0")
    assert all(select_kernels("channel_fc1", problem, old) != WIDE for problem in problems)


@pytest.mark.parametrize("ask", [select, select_kernels, configs.choose, configs.choose_kernels])
def test_choices_of_two_tritons_are_not_mixed(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where one Triton makes the rule's tile wait between products, the choice moves with that one only."""
    old, new = (replace(H200, triton=version, name="of-two-tritons") for version in ("3.6.0", "3.9.0"))
    problem = problem_of("channel_fc1")
    first = rule("channel_fc1", problem, old)
    key, real = resources.key_of("channel_fc1", problem, first), resources.records
    waiting = {**real(old), key: real(old)[key]._replace(serialised=True)}
    monkeypatch.setattr(resources, "records", lambda target: waiting if target == old else real(target))
    found = [ask("channel_fc1", problem, target) == first for target in (old, new, old, new)]
    assert found == [False, True, False, True]


def test_the_rule_stays_unless_a_compiled_fact_speaks_against_it() -> None:
    """No prediction moves a tile: only what does not fit, spills in its loop or waits between products."""
    replaced = set()
    for device, triton, x_dtype, model, batch, op in itertools.product(
        DEVICES.values(), ("3.6.0", "3.9.0"), (BF16, FP32), MODEL_BLOCKS.values(), BATCHES, TUNED_OPS
    ):
        problem = problem_of(op, model, batch, x_dtype=x_dtype)
        target = replace(device.target, triton=triton)
        first = rule(op, problem, target)
        usual = resources.find(op, problem, first, target)
        if usual is not None and usual.is_clean(op) and fits(op, problem, first, target):
            assert select_kernels(op, problem, target) == first
        elif select_kernels(op, problem, target) != first:
            replaced.add(op)
    assert replaced, "no tile of the rule was ever replaced"


def test_products_in_fp32_are_the_librarys_where_that_is_predicted_faster() -> None:
    found = explained("channel_fc2", problem_of("channel_fc2", x_dtype=FP32, dtype=FP32), H200)
    assert found.choice is Library.ATEN and found.source == "model"
    assert (
        found.why.startswith("the library's product predicted ") and "shorter than the kernels" in found.why
    )
    assert isinstance(select_kernels("channel_fc2", problem_of("channel_fc2"), H200), TileConfig)


def test_16_bit_halves_run_fused() -> None:
    for model, batch, half in itertools.product(MODEL_BLOCKS.values(), BATCHES, HALVES):
        assert select(half, problem_of(half, model, batch), H200) is None


@pytest.mark.parametrize("device", DEVICES)
def test_no_product_on_matrix_units_is_handed_to_pytorch(device: str) -> None:
    """Not on a prediction alone: 16 bits anywhere, and fp32 on AMD, which has units for it."""
    target = DEVICES[device].target
    dtypes = DTYPES if target.backend == "hip" else [pair for pair in DTYPES if pair[1] != FP32]
    for model, batch, pair in itertools.product(MODEL_BLOCKS.values(), BATCHES, dtypes):
        for op in (*LIBRARY_OPS, *HALVES):
            assert not isinstance(select(op, problem_of(op, model, batch, *pair), target), Library)


def test_a_half_in_training_is_compared_with_its_backward() -> None:
    """On an A100 in fp32 the token half's forward alone would stay with the kernels."""
    target = DEVICES["nvidia-a100-sxm4-80gb"].target
    problem = problem_of("token_half", x_dtype=FP32, dtype=FP32)
    assert select("token_half", problem, target) is None
    found = explained("token_half_training", problem, target)
    assert found.choice is Library.REFERENCE and found.source == "model"
    ours = cost.predict_halves({"token_half_training": problem}, target, select_kernels)
    assert {"token_mixing", "token_dgrad", "token_wgrad_fc1", "token_layer_norm_bwd"} <= set(ours)
    theirs = cost.predict_launch("token_half_training", problem, Library.REFERENCE, target)
    share = 1 - theirs.seconds / cost.total(list(ours.values())).seconds
    assert share > LIBRARY_MARGIN and f"predicted {share:.0%} shorter" in found.why


@pytest.mark.parametrize("tokens", [100, 144])
def test_a_half_that_was_never_compiled_for_is_left_to_pytorch_if_far_slower(tokens: int) -> None:
    for half in ("token_half", "token_half_training"):
        problem = problem_of(half, B16._replace(tokens=tokens), x_dtype=FP32, dtype=FP32)
        tiles = select_kernels("token_mixing", problem, H200)
        assert not resources.is_recorded("token_mixing", problem, tiles, H200)
        assert select(half, problem, H200) is Library.REFERENCE
        assert select(half, problem._replace(x_dtype=BF16, dtype=BF16), H200) is None


def test_a_guess_has_to_show_more_than_a_record() -> None:
    """Rows of 769 channels are in no record: what is a third faster does not count there."""
    problem = problem_of("channel_fc1", x_dtype=FP32, dtype=FP32)
    odd = problem._replace(channels=769)
    assert select("channel_fc1", problem, H200) is Library.ATEN
    assert select("channel_fc1", odd, H200) == select_kernels("channel_fc1", odd, H200)
    ours, library = (
        cost.predict_launch("channel_fc1", odd, choice, H200).seconds
        for choice in (select_kernels("channel_fc1", odd, H200), Library.ATEN)
    )
    assert (1 - GUESS_MARGIN) * ours < library < (1 - LIBRARY_MARGIN) * ours


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_what_was_compiled_and_fits_nowhere_is_left_to_pytorch(dtype: torch.dtype) -> None:
    tiny = replace(H200, shared_memory=1024, name="")
    for op in (*LIBRARY_OPS, "token_half", "token_half_training"):
        found = explained(op, problem_of(op, x_dtype=dtype, dtype=dtype), tiny)
        assert found.choice is (Library.ATEN if op in LIBRARY_OPS else Library.REFERENCE)
        assert found.source == "model" and "fits" in found.why


def test_an_unknown_gpu_gets_the_rules_tile_and_no_library() -> None:
    target = Target("cuda", 75, 40, 64 * 1024, "voodoo-2")
    for op in OPS:
        problem = problem_of(op, x_dtype=FP32, dtype=FP32)
        expected = None if op in HALVES else rule(op, bucketed(problem), target)
        assert select(op, problem, target) == expected


def test_what_does_not_fit_the_device_is_not_chosen() -> None:
    problem = problem_of("channel_fc1", batch=256)
    little = replace(H200, shared_memory=80 * 1024, name="")
    found = select("channel_fc1", problem, little)
    assert rule("channel_fc1", problem, little) != found
    assert fits("channel_fc1", problem, found, little)

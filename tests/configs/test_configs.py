"""Tiles as pure functions of problem and target, and the launches that follow from them."""

from __future__ import annotations

import itertools
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmixer import configs
from fastmixer.aot import catalogue
from fastmixer.aot.catalogue import MODEL_BLOCKS
from fastmixer.configs import (
    INTERPRETER,
    ONE_PASS,
    ONE_PASS_TOKENS,
    TARGETS,
    Library,
    Problem,
    Target,
    ops,
    pieces_of,
    select,
    token_pieces,
)
from fastmixer.ops import launch

OPS = tuple(name for name, op in ops.OPS.items() if op.tuned and op.direction == "forward")
ALL_TARGETS = {**TARGETS, "interpreter": INTERPRETER}
BATCHES = (1, 2, 8, 64, 1024)
DTYPES = {  # of the products: of x
    torch.bfloat16: (torch.bfloat16, torch.float32),
    torch.float16: (torch.float16, torch.float32),
    torch.float32: (torch.float32,),
    torch.float64: (torch.float64,),
}


def is_tile_side(n: int) -> bool:
    return n >= 16 and n & (n - 1) == 0


@pytest.mark.parametrize(
    "tokens, pieces",
    [
        (1, (16, 0, 0)),
        (16, (16, 0, 0)),
        (17, (32, 0, 0)),
        (49, (64, 0, 0)),
        (50, (64, 0, 0)),
        (65, (64, 16, 0)),
        (196, (128, 64, 16)),
        (197, (128, 64, 16)),
        (256, (128, 128, 0)),
        (257, (128, 128, 16)),
    ],
)
def test_token_pieces_of_known_lengths(tokens: int, pieces: tuple[int, int, int]) -> None:
    assert token_pieces(tokens) == pieces


@pytest.mark.parametrize("dtype", DTYPES)
def test_which_of_pytorchs_products_serve(dtype: torch.dtype) -> None:
    for x_dtype in DTYPES[dtype]:
        erf = Problem(64, 196, 768, 3072, x_dtype, dtype)
        gelu = (Library.ATEN_GELU,) * (dtype.itemsize == 2)
        addmm = (Library.ADDMM,) * (dtype == x_dtype)
        assert ops.libraries("channel_fc1", erf) == (Library.ATEN,)
        assert ops.libraries("channel_fc1", erf._replace(approximate="tanh")) == (Library.ATEN, *gelu)
        assert ops.libraries("channel_fc2", erf) == (Library.ATEN, *addmm)
        assert ops.libraries("token_mixing", erf) == ()


def test_token_pieces_cover_most_tightly() -> None:
    """Against every triple there is, for each length that one pass takes."""
    sides = [0, 16, 32, 64, 128]
    sums = sorted({sum(triple) for triple in itertools.product(sides, repeat=3)})
    for tokens in range(1, ONE_PASS_TOKENS + 1):
        pieces = token_pieces(tokens)
        assert pieces[0] >= pieces[1] >= pieces[2] and all(p == 0 or is_tile_side(p) for p in pieces)
        tightest = min(total for total in sums if total >= max(tokens, 1))
        assert sum(pieces) == tightest, tokens
        fewer = [
            p for n in (1, 2) for p in itertools.combinations_with_replacement(sides, n) if sum(p) == tightest
        ]
        assert sum(p > 0 for p in pieces) == min((sum(s > 0 for s in p) for p in fewer), default=3), tokens


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_pieces_are_of_what_packing_pads_to(target: Target) -> None:
    """However an op cuts the token axis: it masks nothing of the weights."""
    for op, tokens in itertools.product(ONE_PASS, range(1, ONE_PASS_TOKENS + 1)):
        pieces = pieces_of(op, Problem(1, tokens, 64, 32, torch.bfloat16, torch.bfloat16), target)
        assert sum(pieces) == sum(token_pieces(tokens)), (op, tokens)
        assert all(piece == 0 or is_tile_side(piece) for piece in pieces)


def test_196_tokens_cost_208_of_196() -> None:
    assert sum(token_pieces(196)) == 208


def problems(shape: catalogue.BlockShape, batch: int) -> list[tuple[str, Problem]]:
    """Every op of a block in every combination of dtypes."""
    return [
        (op, Problem(batch, shape.tokens, shape.channels, hidden, x_dtype, dtype))
        for op in OPS
        for hidden in [shape.token_hidden if op.startswith("token") else shape.channel_hidden]
        for dtype, x_dtypes in DTYPES.items()
        for x_dtype in x_dtypes
    ]


def check(op: str, problem: Problem, target: configs.Target) -> None:
    tiles = select(op, problem, target)
    if op == "token_mixing" and problem.tokens > ONE_PASS_TOKENS:
        assert tiles is None
        return
    assert tiles is not None and tiles == select(op, problem, target)
    if tiles is Library.ATEN:
        assert op in ("channel_fc1", "channel_fc2")
        return
    assert is_tile_side(tiles.block_m) and is_tile_side(tiles.block_n)
    assert op == "token_mixing" or is_tile_side(tiles.block_k)
    assert tiles.num_warps in (1, 2, 4, 8, 16) and tiles.num_stages >= 1 and tiles.group_m >= 1


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_every_model_has_tiles_on_every_target(name: str) -> None:
    for shape, batch in itertools.product(MODEL_BLOCKS.values(), BATCHES):
        for op, problem in problems(shape, batch):
            check(op, problem, ALL_TARGETS[name])


sizes = st.integers(1, 5000)


@settings(deadline=None)
@given(op=st.sampled_from(OPS), batch=sizes, tokens=sizes, channels=sizes, hidden=sizes, data=st.data())
def test_every_problem_has_tiles(
    op: str, batch: int, tokens: int, channels: int, hidden: int, data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(list(DTYPES)))
    x_dtype = data.draw(st.sampled_from(DTYPES[dtype]))
    target = ALL_TARGETS[data.draw(st.sampled_from(list(ALL_TARGETS)))]
    check(op, Problem(batch, tokens, channels, hidden, x_dtype, dtype), target)


@pytest.mark.parametrize("name", ALL_TARGETS)
def test_the_design_changes_behind_256_tokens(name: str) -> None:
    for dtype in DTYPES:
        for tokens in (1, 196, 255, 256, 257, 784, 4096):
            problem = Problem(1, tokens, 768, 384, dtype, dtype)
            one_pass = select("token_mixing", problem, ALL_TARGETS[name]) is not None
            assert one_pass == (tokens <= 256)


def test_values_are_hashable_and_frozen() -> None:
    tiles = select("channel_fc1", Problem(1, 196, 768, 3072, torch.float16, torch.float16), TARGETS["sm_90"])
    assert len({tiles, configs.TileConfig(*astuple(tiles))}) == 1 and len(set(TARGETS.values())) == len(
        TARGETS
    )
    with pytest.raises(AttributeError):
        tiles.block_m = 1


def test_the_cpu_is_the_interpreter() -> None:
    assert configs.target_of(torch.device("cpu")) is INTERPRETER
    assert configs.target_of(torch.device("cpu", 0)) is INTERPRETER


def names(launches: list[launch.Launch]) -> list[str]:
    return [recorded.kernel_name for recorded in launches]


def expected_launches(case: catalogue.Case) -> list[str]:
    """What a block launches; ``Layout.as_it_lies`` says when a weight is used as it is."""
    S, C, D, E = case.shape
    folds = case.x_dtype in (None, case.dtype) and case.dtype.itemsize == 2
    rows_aligned = {width: width % 16 == 0 for width in (S, C, D, E)}
    if S > ONE_PASS_TOKENS:
        packs, token = not (rows_aligned[S] and rows_aligned[D]), ["fc1", "fc2"]
    else:
        packs = (sum(token_pieces(S)), configs.round_up(D, select_token(case).block_n)) != (S, D)
        token = ["token_mixing"]
    packs = packs or folds or not (rows_aligned[C] and rows_aligned[E])
    return ["pack_weights"] * packs + ["row_moments", *token, "fc1", "fc2"]


def select_token(case: catalogue.Case, target: configs.Target = TARGETS["sm_90"]) -> configs.TileConfig:
    S, C, D, _ = case.shape
    return select("token_mixing", Problem(64, S, C, D, case.x_dtype or case.dtype, case.dtype), target)


@pytest.mark.parametrize("case", catalogue.CASES, ids=lambda case: case.label)
def test_the_catalogue_records_what_a_block_launches(case: catalogue.Case) -> None:
    launches = catalogue.record(case, TARGETS["sm_90"], 64)
    assert names(launches) == expected_launches(case)
    assert all(launched.grid[0] >= 1 and len(launched.grid) == 1 for launched in launches)
    options = {name for launched in launches for name in launched.options}
    assert options == {"num_warps", "num_stages", "enable_fp_fusion"}


def test_the_catalogue_has_all_seven_models_and_both_designs() -> None:
    assert set(MODEL_BLOCKS) == {"S/32", "S/16", "B/32", "B/16", "L/32", "L/16", "H/14"}
    cases = {case.name for case in catalogue.CASES}
    assert set(MODEL_BLOCKS) <= cases
    assert any(case.shape.tokens > ONE_PASS_TOKENS for case in catalogue.CASES)
    assert len({case.label for case in catalogue.CASES}) == len(catalogue.CASES)


def test_recording_leaves_the_matmul_precision_alone() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    launches = catalogue.record(next(case for case in catalogue.CASES if case.tf32), TARGETS["sm_90"], 1)
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert {f.args["INPUT_PRECISION"] for f in launches if "INPUT_PRECISION" in f.args} == {"tf32"}


@pytest.mark.parametrize("model", MODEL_BLOCKS)
@pytest.mark.parametrize("batch", [1, 64])
def test_grids_cover_the_problem_of_every_model(model: str, batch: int) -> None:
    S, C, D, E = shape = MODEL_BLOCKS[model]
    case = catalogue.Case(model, shape)
    for target in TARGETS.values():
        launches = catalogue.record(case, target, batch)
        by_name = dict(zip(names(launches), launches, strict=True))
        token, fc1, fc2 = (by_name[name] for name in ("token_mixing", "fc1", "fc2"))
        assert token.grid[0] * token.args["BLOCK_C"] >= batch * C
        for product, columns in ((fc1, E), (fc2, C)):
            tile = product.args["BLOCK_M"] * product.args["BLOCK_N"]
            assert product.grid[0] * tile >= batch * S * columns
        assert token.args["P0"] + token.args["P1"] + token.args["P2"] == sum(token_pieces(S))

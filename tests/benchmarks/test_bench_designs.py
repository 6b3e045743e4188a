"""The race of designs: who races, what is compiled before, and that a wrong one costs the others nothing."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch

from benchmarks import bench, cells, designs, measure
from benchmarks.levels import make_case, make_subject
from benchmarks.schema import DESIGNED
from fastmixer import configs, parity
from fastmixer.configs import DEVICES, TileConfig
from fastmixer.configs.designs import DESIGNS
from fastmixer.configs.ops import OPS

H200 = DEVICES["nvidia-h200"].target
CUDA = torch.device("cuda")
PAIR = "channel_fc1=tma_128x128,channel_fc2=addmm"


@pytest.fixture(autouse=True)
def on_an_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "target_of", lambda device: H200)


def names(level: str = "block", direction: str = "forward", asked=("channel_fc2",)) -> list[str]:
    case = make_case(level, "B/16", 64, "bfloat16", direction)
    return list(designs.raced(case, asked, CUDA))


def test_who_races() -> None:
    of_fc2 = ["rule", "pointers_128x256", "pointers_256x128", "tma_128x256", "tma_128x256_persistent"]
    of_fc2 = [f"channel_fc2={name}" for name in (*of_fc2, "tma_128x128", "aten", "addmm")]
    assert names() == names("channel") == of_fc2
    assert names(asked=("channel_fc2", PAIR)) == [*of_fc2, PAIR]
    assert names("model") == names("token") == []


def test_the_command_knows_every_op_of_the_channel_half_that_has_designs() -> None:
    """By a list of its own: it reads its arguments before it imports torch."""
    assert tuple(op for op in DESIGNS if OPS[op].half == "channel") == DESIGNED


def test_designs_of_the_backward_race_where_one_runs() -> None:
    backward = ("channel_mlp_hidden_bwd", "channel_mlp_hidden_bwd_recompute")
    assert names(asked=backward) == []
    assert len(names(direction="forward_backward", asked=backward)) == 9


@pytest.mark.parametrize(
    ("name", "memory"), [("channel_mlp_hidden_bwd", "balanced"), ("channel_mlp_hidden_bwd_recompute", "lean")]
)
def test_a_racer_is_forced_in_the_mode_that_runs_its_op(name: str, memory: str, monkeypatch) -> None:
    case = make_case("block", "S/32", 1, "float32", "forward")
    subject, seen = make_subject(case, torch.device("cpu")), []

    def noted(module, case, memory):
        return lambda item: seen.append((memory, configs.designs.forced_names()))

    monkeypatch.setattr(designs, "make_call", noted)
    racer = designs.raced(make_case("block", "B/16", 1, "bfloat16", "forward_backward"), [name], CUDA)
    racer[f"{name}=rule"].make(subject)(subject.items[0])
    assert seen == [(memory, ((name, "rule"),))]


def test_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tiles of all cases, each once; whatever becomes of one is a line, not the end."""
    asked: list[tuple] = []

    class Compiler:
        def __init__(self, target) -> None:
            assert target is H200

        def start(self, op, problem, tiles) -> Future:
            asked.append((op, problem[:4], tiles))
            future: Future = Future()
            if tiles.persistent:
                future.set_exception(OSError(28, "no space left"))
            else:
                future.set_result("too large" if tiles.descriptors and tiles.block_n == 256 else None)
            return future

        def close(self) -> None:
            pass

    monkeypatch.setattr(designs, "Compiler", Compiler)
    raced = [make_case("block", "B/16", batch, "bfloat16", "forward") for batch in (64, 256)]
    other = make_case("model", "S/16", 1, "bfloat16", "forward")
    said = designs.compile_ahead([*raced, other], ["channel_fc2", PAIR], H200)
    assert len(asked) == 7 and all(isinstance(tiles, TileConfig) for _, _, tiles in asked)
    assert {problem for _, problem, _ in asked} == {(64, 196, 768, 3072)}
    assert sorted(said) == [
        "channel_fc2=tma_128x256: too large",
        "channel_fc2=tma_128x256_persistent: OSError: [Errno 28] no space left",
    ]


def test_a_wrong_design_does_not_race_and_the_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    forced, gate = designs._forced, cells.gate

    def tagged(names, subject):
        call = forced(names, subject)
        call.names = names
        return call

    def judged(subject, call) -> dict[str, parity.Parity]:
        wrong = getattr(call, "names", None) == {"channel_fc1": "rule"}
        return {name: replace(v, misplaced=int(wrong)) for name, v in gate(subject, call).items()}

    both = [{"channel_fc1": "rule"}, {"channel_fc2": "rule"}]
    monkeypatch.setattr(designs, "combinations", lambda *_: both)
    monkeypatch.setattr(designs, "_forced", tagged)
    monkeypatch.setattr(cells, "gate", judged)
    timer = measure.CpuTimer(min_rounds=1, max_rounds=1, burst=1, warm_up=1, seconds=1.0)
    setup = cells.Bench(torch.device("cpu"), timer, ("fused", "eager"), designs=("channel_fc1",))
    (cell,) = cells.measure_case(make_case("block", "S/32", 1, "float32", "forward"), setup)
    assert cell["ok"] and set(cell["opponents"]) == {"fused", "eager"}
    assert set(cell["designs"]) == {"channel_fc2=rule"}
    assert list(cell["errors"]) == ["channel_fc1=rule"]
    assert "does not race" in cell["errors"]["channel_fc1=rule"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--designs", "channel_fc3"], "expected one of channel_fc1"),
        (["--designs", "channel_fc1=tma"], "expected one of rule"),
        (["--designs", "channel_fc1", "--levels", "model"], "--levels has neither"),
        (["--designs", "channel_fc1", "--device", "cpu"], "there are none with --device cpu"),
    ],
)
def test_what_cannot_be_raced_is_said(arguments: list[str], message: str, capsys, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert bench.main(arguments) == bench.MISUSED
    assert message in capsys.readouterr().err

"""What the launchers allocate, launch and compute: the promises that no parity test can see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support import Case, context_of, make_half, make_x
from torch.utils._python_dispatch import TorchDispatchMode

import fastmixer
from fastmixer import functional
from fastmixer.configs import TileConfig, token_pieces
from fastmixer.ops import channel_mixing, launch, token_mixing
from fastmixer.ops.layouts import Kept


class Allocations(TorchDispatchMode):
    """Records the shape of every tensor that torch makes, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, torch.Tensor)}
        if isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in given:
            self.shapes.append(tuple(out.shape))
        return out


CASE = Case(2, 196, 96, 80, 160)


def parts(case: Case):
    generator = torch.Generator().manual_seed(0)
    x = make_x(case, generator)
    return x, make_half(case, "tokens", generator), make_half(case, "channels", generator)


def allocations(layout: str) -> list[tuple[int, ...]]:
    """What a block with kept weights allocates for x in the given layout."""
    case = Case(**{**vars(CASE), "layout": layout})
    x, token, channel = parts(case)
    # Nothing is run: the interpreter makes tensors of its own.
    context = launch.Context(context_of(case, x.device).target, Kept(), execute=lambda _: None)

    def block() -> None:
        y, moments = token_mixing.forward(x, token, case.dtype, context)
        channel_mixing.forward(y, channel, case.dtype, context, moments)

    block()  # packs the weights
    with Allocations() as made:
        block()
    return made.shapes


@pytest.mark.parametrize(
    "layout", ["contiguous", "transposed", "token slice", "strided channels", "expanded"]
)
def test_a_block_allocates_its_outputs_and_the_channel_hidden_only(layout: str) -> None:
    """No hidden of the token MLP (2 * 96 * 80 elements) and no copy of x, transposed or not."""
    B, S, C, E = CASE.B, CASE.S, CASE.C, CASE.E
    moments = (1, 2, B * S)
    assert allocations(layout) == [moments, (B, S, C), moments, (B * S, E), (B, S, C)]


@pytest.fixture
def macs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Multiply-adds of every ``tl.dot`` that the interpreter runs."""
    launch.kernels()
    from triton.runtime.interpreter import InterpreterBuilder

    counted: list[int] = []
    create_dot = InterpreterBuilder.create_dot

    def counting(self, a, b, *rest):
        counted.append(a.data.shape[0] * a.data.shape[1] * b.data.shape[1])
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counting)
    yield counted


@pytest.mark.parametrize(("tokens", "padded"), [(196, 208), (49, 64), (256, 256), (144, 144), (16, 16)])
def test_token_mixing_pays_for_few_padded_tokens(tokens: int, padded: int, macs: list[int]) -> None:
    case = Case(1, tokens, 64, 32, 8, tiles=TileConfig(32, 16))
    x, token, _ = parts(case)
    token_mixing.forward(x, token, case.dtype, context_of(case, x.device))
    assert sum(token_pieces(tokens)) == padded
    assert sum(macs) == 2 * padded * case.C * case.D


def test_weights_that_fit_are_not_packed() -> None:
    """fc2 of the channel half is read where it lies: no copy."""
    x, _, channel = parts(Case(1, 4, 32, 8, 64))
    launches: list[launch.Launch] = []
    context = launch.Context(context_of(CASE, x.device).target, execute=launches.append)
    channel_mixing.forward(x, channel, torch.bfloat16, context)
    names = [recorded.kernel.__name__ for recorded in launches]
    assert names == ["_pack_weights_kernel", "_row_moments_fwd_kernel", "_fc1_fwd_kernel", "_fc2_fwd_kernel"]
    assert launches[-1].args["w_ptr"] is channel.fc2_weight and len(launches[0].args["layers"]) == 1


@pytest.mark.parametrize("case", [Case(0, 5, 8, 4, 4), Case(0, 300, 8, 4, 4)], ids=["short", "long"])
def test_an_empty_batch_launches_nothing(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    x, token, channel = parts(case)
    monkeypatch.setattr(launch, "Launch", lambda *args, **kwargs: pytest.fail("launched"))
    with torch.no_grad(), fastmixer.backend("triton"):
        assert functional.mixer_block(x, token, channel).shape == x.shape

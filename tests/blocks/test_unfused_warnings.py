"""What is said when a block or a call runs unfused: name and reason, once, at the user's line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from foreign_blocks import DIM, SEQ, Plain, make_model
from torch import Tensor, nn

import fastmixer


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


def tokens() -> Tensor:
    return torch.randn(2, SEQ, DIM)


def heard(call: Callable) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, fastmixer.FallbackWarning)]


def test_a_warning_names_the_block_and_the_users_line() -> None:
    model = nn.Sequential(Plain(), nn.Sequential(Plain()))
    fastmixer.fuse(model, strict=True)
    model[1][0].register_forward_hook(lambda *args: None)  # on the block itself: that is no reason
    for block in (model[0], model[1][0]):
        block.mlp_tokens.act = nn.SiLU()
    x = tokens()
    caught = heard(lambda: model(x))
    reason = "mlp_tokens (Mlp): act is SiLU, not torch.nn.GELU"
    assert [str(w.message) for w in caught] == [
        f"0 (Plain) runs unfused: {reason}",
        f"1.0 (Plain) runs unfused: {reason}",
    ]
    assert {w.filename for w in caught} == {__file__}
    assert heard(lambda: model(x)) == []


def test_every_reason_is_said_once_a_block() -> None:
    block, x = Plain(), tokens()
    fastmixer.fuse(block, strict=True)
    gelu, said = block.mlp_tokens.act, []
    for _ in range(3):
        for act in (nn.SiLU(), nn.ReLU(), gelu):
            block.mlp_tokens.act = act
            said += [str(w.message) for w in heard(lambda: block(x))]
    assert len(said) == 2 and said[0].startswith("(model) (Plain) runs unfused: ") and "ReLU" in said[1]
    block.mlp_tokens.act = nn.Tanh()
    for _ in range(2):  # as errors they end every call
        with warnings.catch_warnings(), pytest.raises(fastmixer.FallbackWarning, match="Tanh"):
            warnings.simplefilter("error")
            block(x)


def test_the_references_warning_is_at_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmixer.dispatch._warned", set())
    model = make_model(block_layer=fastmixer.MixerBlock)
    with fastmixer.backend("auto"):
        (warning,) = heard(lambda: model.blocks(tokens()))
    assert "x is on the CPU" in str(warning.message) and warning.filename == __file__

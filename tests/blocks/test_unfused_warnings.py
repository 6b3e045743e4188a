"""What is said when a block or a call runs unfused: name and reason, once, at the user's line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from foreign_blocks import DIM, SEQ, Plain
from torch import Tensor, nn

import fastmixer
from fastmixer import functional
from fastmixer.blocks.families import match
from fastmixer.params import MixingParams


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


def tokens() -> Tensor:
    return torch.randn(2, SEQ, DIM)


def heard(
    call: Callable, category: type[Warning] = fastmixer.FallbackWarning
) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [w for w in caught if issubclass(w.category, category)]


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


# ---- where a warning points --------------------------------------------------------------------------------


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def small_model() -> nn.Module:
    return fastmixer.MlpMixer(5, 16, patch_size=4, num_blocks=1, embed_dim=DIM)


def halves_of(block: nn.Module) -> tuple[MixingParams, MixingParams]:
    structure = match(block)
    return structure.token.params(), structure.channel.params()


def wrapped_by_accelerate(block: nn.Module) -> nn.Module:
    """Its forward in a function of that package's."""
    block.forward = eval("lambda x: forward(x)", {"__name__": "accelerate.hooks", "forward": block.forward})
    return block


# A way to call fastmixer: what to call, made of a block, and with what.
def the_token_half(block: nn.Module) -> Callable:
    half = halves_of(block)[0]
    return lambda x: functional.token_mixing(x, **half._asdict())


def the_channel_half(block: nn.Module) -> Callable:
    half = halves_of(block)[1]
    return lambda x: functional.channel_mixing(x, **half._asdict())


def the_function_of_the_block(block: nn.Module) -> Callable:
    halves = halves_of(block)
    return lambda x: functional.mixer_block(x, *halves)


def the_block(block: nn.Module) -> Callable:
    return lambda x: block(x)


def the_blocks_forward(block: nn.Module) -> Callable:
    return lambda x: block.forward(x)


def a_model(block: nn.Module) -> Callable:
    model = nn.Sequential(nn.Sequential(block), nn.Identity())
    return lambda x: model(x)


def our_model(block: nn.Module) -> Callable:
    model = small_model()
    model.blocks[0] = block
    return lambda x: model(images())


def under_data_parallel(block: nn.Module) -> Callable:
    model = nn.DataParallel(nn.Sequential(block))
    return lambda x: model(x)


def checkpointed(block: nn.Module) -> Callable:
    return lambda x: torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)


def by_functional_call(block: nn.Module) -> Callable:
    return lambda x: torch.func.functional_call(block, dict(block.named_parameters()), (x,))


def compiled(block: nn.Module) -> Callable:
    torch.compiler.reset()
    run = torch.compile(nn.Sequential(block), backend="eager", fullgraph=True)
    return lambda x: run(x)


def in_accelerates_hook(block: nn.Module) -> Callable:
    model = nn.Sequential(wrapped_by_accelerate(block))
    return lambda x: model(x)


FUNCTIONS = [the_token_half, the_channel_half, the_function_of_the_block]
MODELS = [
    the_block, the_blocks_forward, a_model, our_model, under_data_parallel, checkpointed, by_functional_call,
    compiled, in_accelerates_hook,
]  # fmt: skip
KINDS = [Plain, lambda: fastmixer.MixerBlock(DIM, SEQ)]


def assert_at(warning: warnings.WarningMessage, call: Callable) -> None:
    lines = {line for *_, line in call.__code__.co_lines() if line is not None}
    assert warning.filename == __file__ and warning.lineno in lines


@pytest.mark.parametrize("kind", KINDS, ids=["foreign", "own"])
@pytest.mark.parametrize("way", [*FUNCTIONS, *MODELS], ids=lambda way: way.__name__)
def test_the_references_warning_is_at_the_users_line(
    way: Callable, kind: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastmixer.dispatch._warned", set())
    block = kind()
    fastmixer.fuse(block, strict=True)
    call, x = way(block), tokens()
    with fastmixer.backend("auto"):
        (warning,) = heard(lambda: call(x))
    assert "x is on the CPU" in str(warning.message)
    assert_at(warning, call)


@pytest.mark.parametrize("kind", KINDS, ids=["foreign", "own"])
@pytest.mark.parametrize("way", MODELS, ids=lambda way: way.__name__)
def test_a_blocks_warning_is_at_the_users_line(way: Callable, kind: Callable) -> None:
    block = kind()
    fastmixer.fuse(block, strict=True)
    block.mlp_tokens.act = nn.SiLU()
    call, x = way(block), tokens()
    (warning,) = heard(lambda: call(x))
    assert "act is SiLU" in str(warning.message)
    assert_at(warning, call)


@pytest.mark.parametrize("way", [way for way in MODELS if way is not compiled], ids=lambda way: way.__name__)
def test_a_thawed_blocks_warning_is_at_the_users_line(way: Callable) -> None:
    block = Plain().eval()
    fastmixer.fuse(block, strict=True, freeze=True)
    block.mlp_tokens.fc1.weight = nn.Parameter(block.mlp_tokens.fc1.weight.detach() * 2)
    call, x = way(block), tokens()
    (warning,) = heard(lambda: call(x), fastmixer.ThawWarning)
    assert_at(warning, call)


@pytest.mark.parametrize("move", [lambda model: model.double(), lambda model: model.to(torch.bfloat16)])
def test_the_warning_of_a_move_is_at_the_users_line(move: Callable) -> None:
    model = nn.Sequential(Plain()).eval()
    fastmixer.fuse(model, strict=True, freeze=True)
    (warning,) = heard(lambda: move(model), fastmixer.ThawWarning)
    assert_at(warning, move)

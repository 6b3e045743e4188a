"""Frozen blocks: four launches, and no frozen weight that PyTorch shows to be old is ever used."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from timm.models.mlp_mixer import MixerBlock as TimmBlock
from torch import Tensor, nn

import fastmixer
from fastmixer.blocks.block import fused_blocks

BF16, FP16 = torch.bfloat16, torch.float16
FROZEN = ["row_moments", "token_mixing", "fc1", "fc2"]
THAWED = ["pack_weights", *FROZEN]
KINDS = [TimmBlock, fastmixer.MixerBlock]


@pytest.fixture(autouse=True)
def kernels_only() -> None:
    with fastmixer.backend("triton"):
        yield


def model(kind: type[nn.Module] = TimmBlock, dtype: torch.dtype = BF16, blocks: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(kind(24, 10) for _ in range(blocks))).to(dtype).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    fastmixer.fuse(made, strict=True)
    return made


def tokens(dtype: torch.dtype = BF16, batch: int = 2) -> Tensor:
    return torch.randn(batch, 10, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def run(made: nn.Module, x: Tensor) -> Tensor:
    return made(x)


def frozen(made: nn.Module) -> list[bool]:
    return [forward.frozen is not None for _, forward, _ in fused_blocks(made)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_block_takes_four_launches_and_gives_the_same_bits(
    kind: type[nn.Module], launched: list
) -> None:
    made, x = model(kind), tokens()
    expected = run(made, x)
    assert fastmixer.freeze(made) == 2 and frozen(made) == [True, True]
    for _ in range(2):
        del launched[:]
        assert torch.equal(run(made, x), expected) and launched == 2 * FROZEN
    del launched[:]
    with torch.inference_mode():
        run(made, tokens(batch=3))
    assert launched == 2 * FROZEN
    assert fastmixer.stale(made) == [] and fastmixer.unfreeze(made) == 2 and fastmixer.unfreeze(made) == 0
    del launched[:]
    assert torch.equal(run(made, x), expected) and launched == 2 * THAWED


@pytest.mark.parametrize("kind", KINDS)
def test_the_short_form(kind: type[nn.Module], launched: list) -> None:
    made = nn.Sequential(kind(24, 10)).to(BF16).eval()
    assert fastmixer.fuse(made, freeze=True).fused and frozen(made) == [True]
    del launched[:]
    run(made, tokens())
    assert launched == FROZEN


def test_what_cannot_be_frozen_is_an_error_and_nothing_happens() -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        fastmixer.freeze(3)
    with pytest.raises(ValueError, match="no block of this Linear is fused"):
        fastmixer.freeze(nn.Linear(2, 2))
    made = model()
    made[1].train()
    with pytest.raises(ValueError, match="must be in eval mode to be frozen, its block 1 is not"):
        fastmixer.freeze(made)
    assert frozen(made) == [False, False]
    fresh = nn.Sequential(TimmBlock(24, 10))
    with pytest.raises(ValueError, match="eval mode"):
        fastmixer.fuse(fresh, freeze=True)
    assert "forward" not in vars(fresh[0])
    with pytest.raises(ValueError, match="can be frozen"):
        fastmixer.fuse(nn.Sequential(nn.Linear(2, 2)), freeze=True)


def test_another_dtype_is_packed_at_its_first_call_and_kept(launched: list) -> None:
    made, x = model(dtype=torch.float32), tokens(torch.float32)
    fastmixer.freeze(made)
    del launched[:]
    for _ in range(2):
        with torch.autocast("cpu", BF16):
            run(made, x)
    assert launched == 2 * THAWED + 2 * FROZEN
    run(made, x)
    assert launched == 2 * THAWED + 4 * FROZEN


def write(made: nn.Sequential) -> None:
    with torch.no_grad():
        made[0].mlp_tokens.fc1.weight.mul_(2)


def replace(made: nn.Sequential) -> None:
    linear = made[0].mlp_channels.fc1
    linear.weight = nn.Parameter(linear.weight.detach() * 2)


def load(made: nn.Sequential) -> None:
    made[0].load_state_dict({name: value * 2 for name, value in made[0].state_dict().items()})


def assign(made: nn.Sequential) -> None:
    made[0].load_state_dict({k: v * 2 for k, v in made[0].state_dict().items()}, assign=True)


def swap_data(made: nn.Sequential) -> None:
    weight = made[0].norm2.weight
    weight.data = weight.data * 2


def step(made: nn.Sequential) -> None:
    parameters = list(made[0].parameters())
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(parameters, lr=0.1).step()


def drop_a_bias(made: nn.Sequential) -> None:
    made[0].mlp_tokens.fc1.bias = None


CHANGES = [write, replace, load, assign, swap_data, step, drop_a_bias]


@pytest.mark.parametrize(
    "kind, change", [*((TimmBlock, change) for change in CHANGES), (fastmixer.MixerBlock, write)]
)
def test_a_change_that_shows_thaws_its_block(
    kind: type[nn.Module], change: Callable[[nn.Sequential], None], launched: list
) -> None:
    made, x = model(kind), tokens()
    fastmixer.freeze(made)
    before = run(made, x)
    change(made)
    with pytest.warns(
        fastmixer.ThawWarning,
        match=r"^0 \(MixerBlock\) is no longer frozen: .*(half was (written|moved|replaced)|was changed)",
    ) as told:
        found = run(made, x)
    assert len(told) == 1 and told[0].filename == __file__
    assert frozen(made) == [False, True]
    assert torch.equal(found, run(copy.deepcopy(made), x)) and not torch.equal(found, before)
    del launched[:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(made, x)
    assert launched == THAWED + FROZEN


@pytest.mark.parametrize("change", [write, assign])
def test_thaw_as_an_error_leaves_a_thawed_block(change: Callable[[nn.Sequential], None]) -> None:
    made, x = model(), tokens()
    fastmixer.freeze(made)
    change(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastmixer.ThawWarning)
        with pytest.raises(fastmixer.ThawWarning):
            run(made, x)
    assert torch.equal(run(made, x), run(copy.deepcopy(made), x)) and frozen(made) == [False, True]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["weights", "input"])
def test_a_call_that_asks_for_gradients_thaws(kind: type[nn.Module], of: str) -> None:
    made, x = model(kind), tokens()
    leaf = made[0].mlp_channels.fc1.weight if of == "weights" else x
    made.requires_grad_(of == "weights")
    x.requires_grad_(of == "input")

    def gradient() -> Tensor:
        return torch.autograd.grad(made(x).square().sum(), leaf)[0]

    expected = gradient()
    fastmixer.freeze(made)
    with pytest.warns(fastmixer.ThawWarning, match="gradients were asked for"):
        found = gradient()
    assert torch.equal(found, expected) and not any(frozen(made))


@pytest.mark.parametrize("kind", KINDS)
def test_training_mode_thaws_at_once_and_silently(kind: type[nn.Module]) -> None:
    made, x = model(kind), tokens()
    fastmixer.freeze(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert made.eval() is made and made.train(False) is made and frozen(made) == [True, True]
        assert made.train() is made and made[0].training and made[0].mlp_tokens.fc1.training
    assert frozen(made) == [False, False]
    for parameter in made.parameters():
        parameter.data.mul_(2)  # leaves no version
    assert torch.equal(run(made.eval(), x), run(copy.deepcopy(made), x))


MOVES = {
    "half": lambda made: made.half(),
    "to a dtype": lambda made: made.to(torch.float32),
    "to a device": lambda made: made.to("meta"),
    "share_memory": lambda made: made.share_memory(),
}


@pytest.mark.parametrize(
    "kind, move", [*((TimmBlock, move) for move in MOVES.values()), (fastmixer.MixerBlock, MOVES["half"])]
)
def test_a_move_thaws_at_once(kind: type[nn.Module], move: Callable, packed_tensors: Callable) -> None:
    made = model(kind)
    fastmixer.freeze(made)
    kept = packed_tensors(made)
    assert len(kept) > 0
    with pytest.warns(fastmixer.ThawWarning, match="was (written|moved|replaced)"):
        assert move(made) is made
    assert not any(frozen(made))
    gc.collect()
    assert [one() for one in kept if one() is not None] == [], "the packed memory is free"


def test_a_move_to_where_it_is_leaves_a_block_frozen() -> None:
    made = model()
    fastmixer.freeze(made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.to(BF16).cpu().to("cpu")
    assert frozen(made) == [True, True]


@pytest.fixture
def packed_tensors() -> Callable[[nn.Module], list]:
    def tensors(made: nn.Module) -> list:
        mine = {id(parameter) for parameter in made.parameters()}
        return [
            weakref.ref(tensor)
            for _, forward, _ in fused_blocks(made)
            for _, packed in forward.frozen._packed.values()
            for tensor in packed
            if tensor is not None and id(tensor) not in mine
        ]

    return tensors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["del", "unfreeze", "unfuse"])
def test_packed_memory_is_freed_at_once(kind: type[nn.Module], how: str, packed_tensors: Callable) -> None:
    made = model(kind)
    fastmixer.freeze(made)
    run(made, tokens())
    kept = packed_tensors(made)
    gc.disable()
    try:
        if how == "del":
            del made
        elif how == "unfuse":
            fastmixer.unfuse(made)
            if kind is fastmixer.MixerBlock:  # stays what it is
                assert frozen(made) == [True, True]
                return
        else:
            fastmixer.unfreeze(made)
        assert len(kept) > 0 and not any(one() is not None for one in kept)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_that_is_no_longer_fused_is_thawed(kind: type[nn.Module], packed_tensors: Callable) -> None:
    made = model(kind, blocks=1)
    fastmixer.freeze(made)
    kept = packed_tensors(made)
    made[0].mlp_tokens.act = nn.SiLU()
    with pytest.warns() as told:
        run(made, tokens())
    assert [w.category for w in told] == [fastmixer.ThawWarning, fastmixer.FallbackWarning]
    assert len(kept) > 0 and not any(one() is not None for one in kept)


def through_torch_save(made: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(made, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_torch_save]
)
def test_copies_are_not_frozen(kind: type[nn.Module], duplicate: Callable, launched: list) -> None:
    made, x = model(kind), tokens()
    fastmixer.freeze(made)
    expected, other = run(made, x), duplicate(made)
    assert frozen(other) == [False, False] and frozen(made) == [True, True]
    del launched[:]
    assert torch.equal(run(other, x), expected) and launched == 2 * THAWED
    for parameter in other.parameters():
        parameter.data.mul_(2)
    assert not torch.equal(run(other, x), expected) and torch.equal(run(made, x), expected)
    other.train()
    assert other[0].training and not made[0].training and frozen(made) == [True, True]


def test_stale_compares_with_the_weights() -> None:
    """What PyTorch does not show: the block goes on with what was packed, and this finds it."""
    made, x = model(), tokens()
    fastmixer.freeze(made)
    before = run(made, x)
    made[1].mlp_channels.fc1.weight.data.mul_(2)
    assert torch.equal(run(made, x), before), "the contract"
    assert fastmixer.stale(made) == ["1"]
    fastmixer.freeze(made)
    assert fastmixer.stale(made) == [] and not torch.equal(run(made, x), before)


@pytest.mark.parametrize("dtype, shape", [(FP16, (24, 300)), (torch.float32, (24, 16)), (BF16, (32, 256))])
def test_every_layout_is_compared(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    made = nn.Sequential(TimmBlock(*shape)).to(dtype).eval()
    fastmixer.fuse(made, freeze=True)
    x = torch.randn(1, shape[1], shape[0]).to(dtype)
    expected = run(copy.deepcopy(made), x)
    assert torch.equal(run(made, x), expected) and fastmixer.stale(made) == []


def test_autocast_of_both_dtypes_reads_what_was_packed_for_each() -> None:
    """LayerNorm is folded into what a 16-bit x meets, and not into what an fp32 x does."""
    made, x = model(dtype=torch.float32, blocks=1), tokens()
    with torch.autocast("cpu", BF16):
        expected = [run(made, x), run(made, x.float())]
        fastmixer.freeze(made)
        for _ in range(2):
            assert all(map(torch.equal, [run(made, x), run(made, x.float())], expected))


def test_a_compiled_frozen_model_packs_in_every_call(launched: list) -> None:
    torch._dynamo.reset()
    made, x = model(blocks=1), tokens()
    expected = run(made, x)
    fastmixer.freeze(made)
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        made[0].mlp_tokens.fc1.weight.data.mul_(2)  # not allowed while frozen, and seen all the same
        del launched[:]
        assert not torch.equal(compiled(x), expected) and launched == THAWED


def test_on_the_reference_there_is_nothing_to_pack() -> None:
    made, x = model(), tokens()
    with fastmixer.backend("torch"):
        expected = run(made, x)
        assert fastmixer.freeze(made) == 2
        assert torch.equal(run(made, x), expected) and frozen(made) == [True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_that_a_user_has_patched_are_theirs(kind: type[nn.Module]) -> None:
    """Called while frozen, copied with the block, frozen or not, and there again afterwards."""
    made = model(kind, blocks=1)
    calls: list[str] = []
    mine = functools.partial(recorded, calls, made[0])
    made[0].train = mine
    for frozen_now in (False, True):
        if frozen_now:
            fastmixer.freeze(made)
        assert vars(copy.copy(made[0]))["train"] is mine
        made[0].train(False)
        assert len(calls) == 1 + frozen_now
    later = functools.partial(recorded, calls, made[0])
    made[0]._apply = later  # set while it is frozen
    fastmixer.unfreeze(made)
    assert vars(made[0])["train"] is mine and vars(made[0])["_apply"] is later


def recorded(calls: list[str], block: nn.Module, mode: bool) -> nn.Module:
    calls.append("train")
    return type(block).train(block, mode)

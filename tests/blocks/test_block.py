"""MixerBlock: a drop-in for timm's block, fused where possible and right where not."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn

import fastmixer
from fastmixer.blocks.block import MixerBlock
from fastmixer.blocks.layers import DropPath, Mlp

DIM, SEQ = 24, 10


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


def timm_block(**kwargs) -> nn.Module:
    import timm.models.mlp_mixer as timm_mixer

    return timm_mixer.MixerBlock(DIM, SEQ, **kwargs)


def pair(**kwargs) -> tuple[MixerBlock, nn.Module]:
    """Our block and timm's with the same random weights."""
    theirs = timm_block(**kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    ours = MixerBlock(DIM, SEQ, **kwargs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def test_parameters_have_timms_names_shapes_and_initial_values() -> None:
    torch.manual_seed(3)
    theirs = timm_block(drop_path=0.1)
    torch.manual_seed(3)
    ours = MixerBlock(DIM, SEQ, drop_path=0.1)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    assert [name for name, _ in ours.named_modules()] == [name for name, _ in theirs.named_modules()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("mlp_ratio", [(0.5, 4.0), 2.0, 2, (1, 3)])
def test_checkpoints_load_strictly_both_ways(mlp_ratio: float | tuple[float, float]) -> None:
    ours, theirs = MixerBlock(DIM, SEQ, mlp_ratio), timm_block(mlp_ratio=mlp_ratio)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_matches_timm_and_takes_the_fused_path(dtype: torch.dtype, fused_calls: list) -> None:
    ours, theirs = pair(dtype=dtype)
    x = torch.randn(2, SEQ, DIM, dtype=dtype)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.forward_modules(x), theirs(x))
    assert len(fused_calls) == 1 and ours.why_not_fused() is None


def test_gradients_match_timm() -> None:
    ours, theirs = pair()
    x = torch.randn(2, SEQ, DIM)
    for block in (ours, theirs):
        block(x).square().sum().backward()
    for (name, mine), their in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine.grad, their.grad), name


def test_each_layer_keeps_its_own_eps_and_gelu(fused_calls: list) -> None:
    ours = MixerBlock(DIM, SEQ, norm_layer=partial(nn.LayerNorm, eps=0.5), act_layer=partial(nn.GELU, "tanh"))
    ours.norm2.eps = 0.25
    ours.mlp_channels.act.approximate = "none"
    x = torch.randn(2, SEQ, DIM)
    assert torch.equal(ours(x), ours.forward_modules(x))
    _, token, channel = fused_calls[0]
    assert (token.eps, channel.eps) == (0.5, 0.25)
    assert (token.approximate, channel.approximate) == ("tanh", "none")


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_stochastic_depth_draws_what_timm_draws(
    autocast: bool, scale_by_keep: bool, fused_calls: list
) -> None:
    ours, theirs = pair(drop_path=0.4)
    ours.drop_path.scale_by_keep = theirs.drop_path.scale_by_keep = scale_by_keep
    x = torch.randn(16, SEQ, DIM)
    results = []
    for block in (ours, theirs):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results.append((block(x), block(x), torch.rand(1)))
    for mine, their in zip(*results, strict=True):
        assert torch.equal(mine, their)
    assert len(fused_calls) == 2
    scale = fused_calls[0][1].residual_scale
    assert scale.shape == (16, 1, 1) and scale.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert scale.unique().numel() == 2
    ours.eval()
    assert torch.equal(ours(x), theirs.eval()(x)) and fused_calls[2][1].residual_scale is None


def test_own_drop_path_is_timms() -> None:
    from timm.layers import DropPath as TimmDropPath

    for rate in (0.0, 0.3, 1.0):
        results = []
        for drop_path in (DropPath(rate), TimmDropPath(rate)):
            torch.manual_seed(1)
            results.append(drop_path(torch.ones(9, 3, 2)))
        assert torch.equal(*results)


def test_dropout_runs_the_modules_in_training_and_fuses_in_eval(fused_calls: list) -> None:
    ours, theirs = pair(drop=0.3)
    x = torch.randn(2, SEQ, DIM)
    results = []
    for block in (ours, theirs):
        torch.manual_seed(5)
        results.append(block(x))
    assert torch.equal(*results) and not fused_calls
    assert "dropout is active" in ours.why_not_fused()
    assert torch.equal(ours.eval()(x), theirs.eval()(x)) and len(fused_calls) == 1
    assert ours.why_not_fused() is None


def test_gated_mlp_runs_the_modules_and_says_why(fused_calls: list) -> None:
    from timm.layers import GluMlp

    ours, theirs = pair(mlp_layer=GluMlp, act_layer=nn.SiLU, mlp_ratio=(1.0, 4.0))
    x = torch.randn(2, SEQ, DIM)
    with pytest.warns(fastmixer.FallbackWarning, match=r"GluMlp.*SiLU"):
        result = ours(x)
    assert torch.equal(result, theirs(x)) and not fused_calls
    assert "GluMlp" in ours.why_not_fused() and "SiLU" in ours.why_not_fused()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(x)


def test_unknown_mlp_of_the_same_modules_is_tried_out(fused_calls: list) -> None:
    class Same(Mlp):
        pass

    class Doubled(Mlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    x = torch.randn(2, SEQ, DIM)
    same = MixerBlock(DIM, SEQ, mlp_layer=Same)
    assert torch.equal(same(x), same.forward_modules(x)) and len(fused_calls) == 1
    doubled = MixerBlock(DIM, SEQ, mlp_layer=Doubled)
    with pytest.warns(fastmixer.FallbackWarning, match="does not compute"):
        assert torch.equal(doubled(x), doubled.forward_modules(x))
    assert len(fused_calls) == 1


def test_hooks_on_inner_modules_fire(fused_calls: list) -> None:
    ours = MixerBlock(DIM, SEQ)
    x = torch.randn(2, SEQ, DIM)
    ours(x)
    seen = []
    handle = ours.mlp_tokens.act.register_forward_hook(lambda *args: seen.append(args[2].shape))
    with pytest.warns(fastmixer.FallbackWarning, match="act has hooks"):
        ours(x)
    assert len(seen) == 1 and len(fused_calls) == 1
    handle.remove()
    ours(x)
    assert len(seen) == 1 and len(fused_calls) == 2


def test_copies_and_pickles_are_independent(fused_calls: list) -> None:
    ours = MixerBlock(DIM, SEQ)
    x = torch.randn(2, SEQ, DIM)
    expected = ours(x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), expected)
        nn.init.zeros_(other.mlp_tokens.fc2.weight)
        assert not torch.equal(other(x), expected) and torch.equal(ours(x), expected)
    assert all(args[1].fc1_weight is not ours.mlp_tokens.fc1.weight for args in fused_calls[1::3])


def test_a_data_parallel_replica_uses_its_own_modules() -> None:
    ours = MixerBlock(DIM, SEQ)
    x = torch.randn(2, SEQ, DIM)
    ours(x)
    replica = ours._replicate_for_data_parallel()
    other = MixerBlock(DIM, SEQ)
    replica._modules = other._modules
    assert torch.equal(replica(x), other(x)) and not torch.equal(replica(x), ours(x))


def test_functional_call_uses_the_given_parameters() -> None:
    ours = MixerBlock(DIM, SEQ)
    other = MixerBlock(DIM, SEQ)
    x = torch.randn(2, SEQ, DIM)
    tensors = {name: value.detach().clone() for name, value in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(ours, tensors, (x,)), other(x))


def test_device_and_dtype_reach_every_parameter() -> None:
    block = MixerBlock(DIM, SEQ, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in block.parameters()} == {("meta", torch.bfloat16)}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"dim": 0, "seq_len": 4}, "dim must be at least 1, got 0"),
        ({"dim": 4, "seq_len": 0}, "seq_len must be at least 1, got 0"),
        ({"dim": 4, "seq_len": 4, "mlp_ratio": 0.1}, "mlp_ratio 0.1 leaves no hidden unit"),
        ({"dim": 4, "seq_len": 4, "mlp_ratio": (1, 2, 3)}, "mlp_ratio must be a number or a pair"),
        ({"dim": 4, "seq_len": 4, "drop_path": 1.5}, "drop_path must be a probability"),
        ({"dim": 4, "seq_len": 4, "drop": 1.5}, "dropout probability"),
    ],
)
def test_bad_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixerBlock(**arguments)


@pytest.mark.parametrize(
    "x, error, message",
    [
        (torch.zeros(SEQ, DIM), ValueError, r"x must have 3 dimensions \(B, S, C\), got shape \(10, 24\)"),
        (torch.zeros(1, SEQ + 1, DIM), ValueError, "x with 11 tokens"),
        (torch.zeros(1, SEQ, DIM + 1), ValueError, r"norm_weight must have shape \(25,\)"),
        (torch.zeros(1, SEQ, DIM, dtype=torch.int64), TypeError, "x must be float16.*got int64"),
        ([[[0.0]]], TypeError, "x must be a torch.Tensor"),
    ],
    ids=["rank", "seq_len", "dim", "integer", "list"],
)
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_bad_input_is_refused_by_name(
    x: object, error: type[Exception], message: str, drop_path: float
) -> None:
    with pytest.raises(error, match=message):
        MixerBlock(DIM, SEQ, drop_path=drop_path)(x)

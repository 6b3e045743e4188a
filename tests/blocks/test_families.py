"""Every family keeps what a fused timm block guarantees: miniatures, and the originals where installed."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from foreign_families import DIM, FAMILIES, SEQ, Family, MmpretrainBlock, parities, pretend_mmcv
from torch import Tensor, nn

import fastmixer
from fastmixer import parity


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    pretend_mmcv(monkeypatch)
    with fastmixer.backend("torch"):
        yield


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def own_forward(block: nn.Module, x: Tensor) -> Tensor:
    return type(block).forward(block, x)


def assert_as_good(result: Tensor, block: nn.Module, x: Tensor) -> None:
    """``result`` is as close to float64 as the block's own forward is."""
    exact = own_forward(copy.deepcopy(block).double(), x.double())
    verdict = parity.compare(result, own_forward(block, x), exact)
    assert result.shape == x.shape and verdict.ok, verdict


def test_a_model_is_fused_and_unfused_in_place(family: Family, fused_calls: list) -> None:
    model = nn.Sequential(family.block(), nn.Sequential(nn.Identity(), family.block()))
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    classes, weights = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    attributes, x = [dict(m.__dict__) for m in model.modules()], family.x()
    report = fastmixer.fuse(model, strict=True)
    assert [(row.name, row.kind) for row in report] == [(n, type(model[0]).__name__) for n in ("0", "1.1")]
    assert_as_good(model[0](x), model[0], x)
    assert_as_good(model[1](x), model[1][1], x)
    assert len(fused_calls) == 2
    assert list(model.state_dict()) == list(weights) and [type(m) for m in model.modules()] == classes
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert all(modules[name] is value for name, value in model.named_modules())
    model.load_state_dict(weights, strict=True)
    assert fastmixer.unfuse(model) == 2
    assert torch.equal(model[0](x), own_forward(model[0], x)) and len(fused_calls) == 2
    assert all(
        before.keys() == m.__dict__.keys() for before, m in zip(attributes, model.modules(), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kernels_give_the_result_and_every_gradient(family: Family, dtype: torch.dtype) -> None:
    results = parities(family.block(), [family.x() for _ in range(8)], dtype)
    bad = {name: str(verdict) for name, verdict in results.items() if not verdict.ok}
    assert not bad and len(results) == 14  # twelve parameters, x and the result


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_fused_and_independent(family: Family, duplicate: Callable, fused_calls: list) -> None:
    block, x = family.block().eval(), family.x()
    fastmixer.fuse(block, strict=True)
    expected = block(x)
    other = duplicate(block)
    fused_calls.clear()
    assert torch.equal(other(x), expected) and len(fused_calls) == 1
    assert other.forward.block is other and other.forward is not block.forward
    nn.init.zeros_(other.get_submodule(family.fc1).weight)
    assert not torch.equal(other(x), expected) and torch.equal(block(x), expected)
    assert fastmixer.unfuse(other) == 1 and "forward" in block.__dict__


def test_each_kind_of_block_is_tried_out_once(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmixer.blocks import fused_forward

    tried = []
    original = fused_forward.disproof
    monkeypatch.setattr(fused_forward, "disproof", lambda *args: tried.append(args) or original(*args))
    model = nn.Sequential(family.block(), family.block(dropout=0.1), family.block()).eval()
    fastmixer.fuse(model, strict=True)
    saved_and_loaded(copy.deepcopy(model))(family.x())
    assert len(tried) == 1


def test_hooks_on_the_block_fire(family: Family, fused_calls: list) -> None:
    block, x, seen = family.block(), family.x().requires_grad_(), []
    block.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    fastmixer.fuse(block, strict=True)
    block.register_forward_hook(lambda module, args, output: output * 2)
    block.register_full_backward_hook(lambda *args: seen.append("backward"))
    out = block(x)
    out.sum().backward()
    assert seen == ["pre", "backward"] and len(fused_calls) == 1
    assert_as_good(out / 2, block, x)


def test_dropout_is_active_in_training(family: Family, fused_calls: list) -> None:
    block, x = family.block(dropout=0.5), family.x()
    torch.manual_seed(9)
    expected = block(x), torch.rand(1)
    report = fastmixer.fuse(block, strict=True)
    assert report.rows[0].reason == "unfused in training: dropout with p=0.5"
    torch.manual_seed(9)
    assert torch.equal(block(x), expected[0]) and torch.equal(torch.rand(1), expected[1])
    assert not fused_calls
    assert_as_good(block.eval()(x), block, x)
    assert len(fused_calls) == 1


def _replace(path: str, new: nn.Module) -> Callable[[nn.Module], None]:
    return lambda block: block.set_submodule(path, new)


@pytest.mark.parametrize("what", ["activation", "norm", "hook", "forward", "parametrized", "extra", "buffer"])
def test_a_change_inside_is_noticed_at_the_next_call(family: Family, what: str, fused_calls: list) -> None:
    if what == "activation" and family.act is None:
        pytest.skip("its activation is a function")
    fc1 = family.fc1
    change, reason = {
        "activation": (_replace(family.act or "", nn.SiLU()), "is SiLU, not torch.nn.GELU|two linear"),
        "norm": (_replace(family.norm, nn.RMSNorm(DIM)), "is RMSNorm, not torch.nn.LayerNorm|one LayerNorm"),
        "hook": (lambda b: b.get_submodule(fc1).register_forward_hook(lambda *a: None), "has hooks"),
        "forward": (
            lambda b: setattr(b.get_submodule(fc1), "forward", lambda x: b.get_submodule(fc1)._get_name()),
            "has had its forward replaced",
        ),
        "parametrized": (
            lambda b: nn.utils.parametrizations.weight_norm(b.get_submodule(fc1)),
            "is Parametrized(Linear|Conv1d|MmcvLinear), not torch.nn.Linear",
        ),
        "extra": (
            lambda b: b.get_submodule(fc1.rpartition(".")[0]).add_module("more", nn.Tanh()),
            "has modules a Mixer block lacks: more",
        ),
        "buffer": (
            lambda b: b.get_submodule(fc1.rpartition(".")[0]).register_buffer("gain", torch.ones(1)),
            "has parameters or buffers of its own: gain",
        ),
    }[what]
    before = family.block()
    change(before)
    row = fastmixer.fuse(before).rows[0]
    assert not row.fused
    assert "forward" not in before.__dict__

    block, x = family.block().eval(), family.x()
    fastmixer.fuse(block, strict=True)
    block(x)
    assert len(fused_calls) == 1
    change(block)
    if what == "forward":  # what it would compute is of no interest here
        with (
            pytest.warns(fastmixer.FallbackWarning, match=reason),
            pytest.raises((TypeError, AttributeError)),
        ):
            block(x)
        return
    with pytest.warns(fastmixer.FallbackWarning, match=reason):
        result = block(x)
    assert torch.equal(result, own_forward(block, x)) and len(fused_calls) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)


def test_new_weights_are_used(family: Family) -> None:
    """Also by the kernels, which read packed copies of them."""
    block, x = family.block().to(torch.bfloat16).eval(), family.x(torch.bfloat16)
    fastmixer.fuse(block, strict=True)
    with torch.inference_mode(), fastmixer.backend("triton"):
        before = block(x)
        assert torch.equal(block(x), before)
    with torch.no_grad():
        block.get_submodule(family.fc1).weight.mul_(-2)
    with torch.inference_mode(), fastmixer.backend("triton"):
        after = block(x)
        assert torch.equal(after, copy.deepcopy(block)(x)) and not torch.equal(after, before)


def test_another_number_of_axes_runs_the_own_forward(family: Family, fused_calls: list) -> None:
    block = family.block().eval()
    fastmixer.fuse(block, strict=True)
    x = family.x()[0] if len(family.batch) == 1 else family.x()[None]
    with pytest.warns(fastmixer.FallbackWarning, match="x is not a tensor of shape"):
        try:
            result = block(x)
        except Exception as error:
            with pytest.raises(type(error)):
                own_forward(block, x)
        else:
            assert torch.equal(result, own_forward(block, x))
    assert not fused_calls


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(family: Family, batch: int, fused_calls: list) -> None:
    block = family.block().eval()
    fastmixer.fuse(block, strict=True)
    x = family.x()[:batch]
    assert block(x).shape == x.shape == (batch, *family.batch[1:], SEQ, DIM) and len(fused_calls) == 1


def test_weights_of_convolutions_are_used_in_place(fused_calls: list) -> None:
    family = FAMILIES["lucidrains"]
    block = family.block()
    weight = block.get_submodule(family.fc1).weight
    fastmixer.fuse(block, strict=True)
    block(family.x()).sum().backward()
    used = fused_calls[0][1].fc1_weight
    assert used.shape == weight.shape[:2] and used.data_ptr() == weight.data_ptr()
    assert weight.grad.shape == weight.shape


def test_mmpretrain_draws_stochastic_depth_as_before(fused_calls: list) -> None:
    family = FAMILIES["mmpretrain"]
    block = family.block(drop_path=0.5)
    x = torch.randn(16, SEQ, DIM)
    torch.manual_seed(9)
    own_forward(block, x)
    state = torch.get_rng_state()
    fastmixer.fuse(block, strict=True)
    torch.manual_seed(9)
    result = block(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    eager = own_forward(block, x)
    assert torch.equal((result == x).all((1, 2)), (eager == x).all((1, 2)))
    assert (result == x).all((1, 2)).any() and len(fused_calls) == 1
    token, channel = fused_calls[0][1:]
    assert {0.0, 2.0} == set(
        token.residual_scale.unique().tolist() + channel.residual_scale.unique().tolist()
    )
    assert not torch.equal(token.residual_scale, channel.residual_scale)


def test_mmpretrains_wrapped_linear_is_known_by_mmcvs_class_only(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adapter(nn.Linear):
        pass

    assert fastmixer.fuse(MmpretrainBlock(linear=nn.Linear), strict=True)
    row = fastmixer.fuse(MmpretrainBlock(linear=Adapter)).rows[0]
    assert "token_mix.layers.0 (Sequential): 0 is Adapter, not torch.nn.Linear" in row.reason


def test_explain_knows_the_sizes(family: Family, fused_calls: list) -> None:
    """Also where a layer of the tokens is a convolution."""
    model = nn.Sequential(family.block())
    fastmixer.fuse(model, strict=True)
    block = fastmixer.explain(model, (8, SEQ, DIM), device="sm_90").blocks[0]
    model(torch.randn(*family.batch, SEQ, DIM))
    _, token, channel = fused_calls[0]
    assert (block.tokens, block.channels) == (SEQ, DIM)
    assert (block.token_hidden, block.channel_hidden) == (len(token.fc1_weight), len(channel.fc1_weight))

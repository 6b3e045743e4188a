"""fuse and unfuse: the model stays the same model, and only blocks that compute a Mixer block are fused."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from foreign_blocks import DIM, SEQ, ConsumesRandomNumbers, Plain, PostNorm, make_model
from torch import Tensor, nn

import fastmixer
from fastmixer.blocks.block import MixerBlock


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64).to(dtype)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_fused_model_computes_the_same_and_takes_the_fused_path(fused_calls: list) -> None:
    model, x = make_model().eval(), images()
    expected = model(x)
    report = fastmixer.fuse(model, strict=True)
    assert torch.equal(model(x), expected) and len(fused_calls) == 2
    assert [(row.name, row.kind, row.fused) for row in report] == [
        ("blocks.0", "MixerBlock", True),
        ("blocks.1", "MixerBlock", True),
    ]
    assert fastmixer.unfuse(model) == 2
    assert torch.equal(model(x), expected) and len(fused_calls) == 2
    assert all("forward" not in block.__dict__ for block in model.blocks)


def test_model_keeps_its_identity() -> None:
    from timm.models.mlp_mixer import MixerBlock as TimmBlock

    model = make_model()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    keys = list(model.state_dict())
    fastmixer.fuse(model)
    assert all(parameters[name] is value for name, value in model.named_parameters())
    assert all(modules[name] is value for name, value in model.named_modules())
    assert list(model.state_dict()) == keys and list(dict(model.named_modules())) == list(modules)
    assert all(type(block) is TimmBlock for block in model.blocks)
    model.load_state_dict(make_model().state_dict(), strict=True)


def test_report_is_a_table_of_every_block() -> None:
    model = nn.Sequential(Plain(), PostNorm())
    report = fastmixer.fuse(model)
    lines = str(report).splitlines()
    assert lines[0].split() == ["block", "class", "fused"]
    assert lines[1].split() == ["0", "Plain", "yes"]
    assert lines[2].startswith("1      PostNorm  no     its forward does not compute a Mixer block")
    assert lines[3] == "1 of 2 blocks fused" and len(report) == 2
    assert [row.name for row in report.fused] == ["0"] and [row.name for row in report.declined] == ["1"]
    assert str(fastmixer.fuse(nn.Linear(2, 2))) == "no mixer block found"
    assert fastmixer.fuse(Plain()).rows[0].name == "(model)"


def test_fusing_twice_is_harmless() -> None:
    model = make_model()
    fastmixer.fuse(model)
    forwards = [block.forward for block in model.blocks]
    report = fastmixer.fuse(model, strict=True)
    assert [row.reason for row in report] == ["already fused"] * 2
    assert [block.forward for block in model.blocks] == forwards
    assert (fastmixer.unfuse(model), fastmixer.unfuse(model)) == (2, 0)


def test_own_blocks_are_reported_and_left_alone() -> None:
    model = make_model(block_layer=MixerBlock)
    report = fastmixer.fuse(model, strict=True)
    assert [row.reason for row in report] == ["fastmixer.MixerBlock, fused already"] * 2
    assert all("forward" not in block.__dict__ for block in model.blocks) and fastmixer.unfuse(model) == 0


def test_an_own_block_with_another_forward_is_judged_by_that() -> None:
    class Doubled(MixerBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    block, x = Doubled(DIM, SEQ), torch.randn(2, SEQ, DIM)
    (row,) = fastmixer.fuse(block)
    assert not row.fused and "does not compute a Mixer block" in row.reason
    assert torch.equal(block(x), 2 * block.forward_modules(x)) and "forward" not in block.__dict__


@pytest.mark.parametrize("block_layer", [None, MixerBlock])
def test_fusing_again_drops_packed_weights(block_layer: type | None) -> None:
    """The remedy after a write through ``.data``, which PyTorch reports nowhere."""
    model = make_model(**({"block_layer": block_layer} if block_layer else {})).to(torch.bfloat16).eval()
    fastmixer.fuse(model)
    x = images(torch.bfloat16)
    with torch.no_grad(), fastmixer.backend("triton"):
        before = model(x)
        model.blocks[0].mlp_channels.fc1.weight.data.mul_(3)
        fastmixer.fuse(model)
        after = model(x)
        expected = copy.deepcopy(model)(x)  # a copy packs anew
    assert torch.equal(after, expected) and not torch.equal(after, before)


def test_fx_traces_the_unfused_block() -> None:
    block = make_model().blocks[0].eval()
    fastmixer.fuse(block)
    traced = torch.fx.symbolic_trace(block)
    x = torch.randn(2, SEQ, DIM)
    assert torch.equal(traced(x), type(block).forward(block, x))


def test_hooks_on_the_block_fire() -> None:
    model, x = make_model().eval(), images()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append("pre"))
    fastmixer.fuse(model, strict=True)
    model.blocks[0].register_forward_hook(lambda module, args, output: seen.append("post"))
    handle = model.blocks[1].register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(model.forward_features(x), model.norm.bias.expand(2, SEQ, DIM))
    assert seen == ["pre", "post"]
    handle.remove()
    model.blocks[0].register_full_backward_hook(lambda *args: seen.append("backward"))
    model(x).sum().backward()
    assert seen == ["pre", "post", "pre", "post", "backward"]


def test_train_and_eval_draw_stochastic_depth_as_before(fused_calls: list) -> None:
    model, x = make_model(drop_path_rate=0.5), images()
    torch.manual_seed(9)
    expected = model(x), torch.rand(1)
    fastmixer.fuse(model, strict=True)
    torch.manual_seed(9)
    assert torch.equal(model(x), expected[0]) and torch.equal(torch.rand(1), expected[1])
    assert fused_calls[0][1].residual_scale is not None
    model.eval()
    assert not torch.equal(model(x), expected[0]) and fused_calls[-1][1].residual_scale is None


def test_dropout_is_active_in_training(fused_calls: list) -> None:
    model, x = make_model(proj_drop_rate=0.5), images()
    torch.manual_seed(9)
    expected = model(x)
    assert "unfused in training: dropout with p=0.5" in fastmixer.fuse(model, strict=True).rows[0].reason
    torch.manual_seed(9)
    assert torch.equal(model(x), expected) and not fused_calls
    model.eval()(x)
    assert len(fused_calls) == 2


def test_gradients_reach_every_parameter_as_before() -> None:
    model, x = make_model(), images()
    twin = copy.deepcopy(model)
    fastmixer.fuse(model, strict=True)
    for each in (model, twin):
        each(x).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "to"])
def test_dtype_changes_are_followed(change: str) -> None:
    model = make_model().eval()
    twin = copy.deepcopy(model)
    fastmixer.fuse(model)
    model(images())
    for each in (model, twin):
        each.to(torch.bfloat16) if change == "to" else getattr(each, change)()
    x = images(model.head.weight.dtype)
    assert torch.equal(model(x), twin(x))


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(assign: bool) -> None:
    model, other, x = make_model().eval(), make_model().eval(), images()
    fastmixer.fuse(model)
    model(x)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, saved_and_loaded, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_are_fused_and_independent(duplicate: Callable, fused_calls: list) -> None:
    model, x = make_model().eval(), images()
    expected = model(x)
    fastmixer.fuse(model)
    model(x)
    other = duplicate(model)
    fused_calls.clear()
    assert torch.equal(other(x), expected) and len(fused_calls) == 2
    for mine, its in zip(model.blocks, other.blocks, strict=True):
        assert its.forward.block is its and its.forward is not mine.forward
        nn.init.zeros_(its.mlp_channels.fc2.weight)
    assert not torch.equal(other(x), expected) and torch.equal(model(x), expected)
    assert fastmixer.unfuse(other) == 2 and "forward" in model.blocks[0].__dict__


def test_copies_are_not_tried_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmixer.blocks import fused_forward

    model = make_model().eval()
    tried = []
    original = fused_forward.disproof
    monkeypatch.setattr(fused_forward, "disproof", lambda *args: tried.append(args) or original(*args))
    fastmixer.fuse(model)
    assert len(tried) == 1, "blocks of the same settings are tried out once"
    copy.deepcopy(model)(images())
    saved_and_loaded(model)(images())
    assert len(tried) == 1


def test_dropping_the_model_frees_it_at_once() -> None:
    model = make_model().eval()
    fastmixer.fuse(model)
    model(images())
    block = weakref.ref(model.blocks[0])
    gc.disable()
    try:
        del model
        assert block() is None
    finally:
        gc.enable()


def test_a_model_on_meta_can_be_fused() -> None:
    model = make_model(device="meta")
    fastmixer.fuse(model, strict=True)
    model.to_empty(device="cpu").eval()
    other = make_model().eval()
    model.load_state_dict(other.state_dict())
    x = images()
    assert torch.equal(model(x), other(x))


def test_any_class_of_the_right_structure_is_fused(fused_calls: list) -> None:
    block, x = Plain(), torch.randn(2, SEQ, DIM)
    expected = block(x)
    fastmixer.fuse(block, strict=True)
    assert torch.equal(block(x), expected) and len(fused_calls) == 1


@pytest.mark.parametrize("function", [fastmixer.fuse, fastmixer.unfuse])
def test_only_modules_are_accepted(function: Callable) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        function({})


def test_fusing_leaves_the_global_state_alone() -> None:
    model = nn.Sequential(ConsumesRandomNumbers(), *make_model(drop_path_rate=0.2).blocks)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        assert len(fastmixer.fuse(model, strict=True)) == 3
    assert torch.equal(torch.get_rng_state(), state) and model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_hooks_of_the_block_are_not_copied_for_the_trial() -> None:
    class Uncopied:
        def __call__(self, *args) -> None:
            raise AssertionError("called during fuse")

        def __deepcopy__(self, memo: dict) -> None:
            raise AssertionError("copied during fuse")

    block = Plain()
    block.register_forward_hook(Uncopied())
    assert fastmixer.fuse(block, strict=True).rows[0].fused


def test_torch_compile_traces_a_fused_model() -> None:
    model, x = make_model().eval(), images()
    expected = model(x)
    fastmixer.fuse(model)
    assert torch.equal(torch.compile(model, backend="eager")(x), expected)

"""A block is fused only where nothing that it does is lost: what it stores, reads and is patched to do."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from foreign_blocks import DIM, SEQ, Plain
from torch import Tensor, nn
from torch.nn import functional as F

import fastmixer
from fastmixer.blocks.families import match
from fastmixer.blocks.layers import Mlp
from fastmixer.blocks.probe import settings_key


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    torch.manual_seed(0)
    with fastmixer.backend("torch"):
        yield


def tokens(count: int = SEQ) -> Tensor:
    return torch.randn(2, count, DIM)


# ---- what a call leaves behind -----------------------------------------------------------------------------


class Recorded(Plain):
    """With what the tests' calls leave behind."""

    calls, seen = 0, []

    def __init__(self, record: Callable[[nn.Module, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.record = record
        self.features, self.outputs, self.stats = {}, [], SimpleNamespace(mean=0.0)
        self.last_batch = 2  # of a call before fuse

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        self.record(self, x, y)
        return y


def count_on_the_class(block: nn.Module, x: Tensor, y: Tensor) -> None:
    type(block).calls += 1


def in_training(block: nn.Module, x: Tensor, y: Tensor) -> None:
    if block.training:
        block.loss = y.square().mean()


RECORDS = {
    "an auxiliary loss": (lambda b, x, y: setattr(b, "loss", y.abs().mean()), "loss"),
    "a loss in training": (in_training, "in training: loss"),
    "features in a dict": (lambda b, x, y: b.features.update(last=y), "features"),
    "outputs in a list": (lambda b, x, y: b.outputs.append(y.shape), "outputs"),
    "statistics in an object": (lambda b, x, y: setattr(b.stats, "mean", y.mean().item()), "stats"),
    "an attribute of a module inside": (lambda b, x, y: setattr(b.mlp_tokens, "last", x), "mlp_tokens.last"),
    "the size of the batch": (lambda b, x, y: setattr(b, "last_batch", len(x)), "in training: last_batch"),
    "a counter of the class": (count_on_the_class, "Recorded.calls"),
    "a list of the class": (lambda b, x, y: b.seen.append(x.shape), "Recorded.seen"),
    "its own mode": (lambda b, x, y: b.train(), "training"),
    "weights": (lambda b, x, y: b.norm1.weight.data.mul_(0.9), "norm1.weight"),
}


@pytest.mark.parametrize("record, reason", RECORDS.values(), ids=RECORDS)
def test_a_forward_that_stores_something_is_declined(record: Callable, reason: str) -> None:
    block = Recorded(record)
    row = fastmixer.fuse(block).rows[0]
    assert not row.fused and "stores something" in row.reason and reason in row.reason
    assert "forward" not in block.__dict__
    assert (Recorded.calls, Recorded.seen) == (0, []), "the trial counts"


def test_a_forward_that_stores_nothing_is_fused() -> None:
    assert fastmixer.fuse(Recorded(lambda block, x, y: None), strict=True)


class WithoutGradients(Plain):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class StopsGradients(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp_tokens(self.norm1(x.detach()).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp_channels(self.norm2(x))


class InPlace(Plain):
    def forward(self, x: Tensor) -> Tensor:
        x += self.mlp_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x += self.mlp_channels(self.norm2(x))
        return x


@pytest.mark.parametrize(
    "kind, reason",
    [
        (WithoutGradients, "in training: it gives no gradient"),
        (StopsGradients, "in training: its gradients have a relative difference"),
        (InPlace, "its forward writes into its input"),
    ],
)
def test_the_same_numbers_with_other_effects_are_declined(kind: type[nn.Module], reason: str) -> None:
    row = fastmixer.fuse(kind()).rows[0]
    assert not row.fused and reason in row.reason


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_inside_a_forward_is_no_difference(reentrant: bool) -> None:
    class Checkpointed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x, use_reentrant=reentrant)

    assert fastmixer.fuse(Checkpointed(), strict=True)


# ---- what a forward reads ----------------------------------------------------------------------------------


class Configured(Plain):
    """Reads its settings wherever users put them, all of which leave it a Mixer block at first."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.config, self.options, self.factors = SimpleNamespace(factor=1.0), {"nested": [1.0]}, [1.0]
        self.gate = torch.ones(())  # not registered
        self.mlp_tokens.factor = 1.0

    def scaled(self, y: Tensor) -> Tensor:
        return y

    def forward(self, x: Tensor) -> Tensor:
        if getattr(self, "skip", False):
            return x
        y = self.scaled(super().forward(x)) * self.mlp_tokens.factor * self.gate * self.factors[0]
        return y * self.factor * self.config.factor * self.options["nested"][0]


class Halved:
    """Halves what ``scaled`` returns: the same function with another closure."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def method(self) -> Callable[[nn.Module, Tensor], Tensor]:
        factor = self.factor
        return lambda block, y: factor * y


def patch_method(block: nn.Module) -> None:
    block.scaled = types.MethodType(Halved(0.5).method(), block)


SETTINGS = {
    "a new attribute": (lambda b: setattr(b, "skip", True), lambda b: delattr(b, "skip")),
    "an attribute of the instance over the class's": (
        lambda b: setattr(b, "factor", 2.0),
        lambda b: delattr(b, "factor"),
    ),
    "an attribute of a module inside": (
        lambda b: setattr(b.mlp_tokens, "factor", 2.0),
        lambda b: setattr(b.mlp_tokens, "factor", 1.0),
    ),
    "a list": (lambda b: b.factors.__setitem__(0, 3.0), lambda b: b.factors.__setitem__(0, 1.0)),
    "a list in a dict": (
        lambda b: b.options["nested"].__setitem__(0, 3.0),
        lambda b: b.options["nested"].__setitem__(0, 1.0),
    ),
    "a config object": (
        lambda b: setattr(b.config, "factor", 0.0),
        lambda b: setattr(b.config, "factor", 1.0),
    ),
    "a tensor": (lambda b: b.gate.zero_(), lambda b: b.gate.fill_(1)),
    "a patched method": (patch_method, lambda b: delattr(b, "scaled")),
}


@pytest.mark.parametrize("change, undo", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_that_is_changed_after_fuse_is_obeyed(
    change: Callable, undo: Callable, fused_calls: list
) -> None:
    block, x = Configured(), tokens()
    fastmixer.fuse(block, strict=True)
    before = block(x)
    assert len(fused_calls) == 1
    change(block)
    with pytest.warns(fastmixer.FallbackWarning, match="does not compute a Mixer block"):
        result = block(x)
    assert torch.equal(result, Configured.forward(block, x)) and not torch.equal(result, before)
    assert len(fused_calls) == 1
    undo(block)
    assert torch.equal(block(x), before) and len(fused_calls) == 2


def test_a_setting_without_effect_leaves_the_block_fused(fused_calls: list) -> None:
    """Such as the index that Hugging Face's models give to their layers, or a flag that marks them."""
    block, x = Plain(), tokens()
    fastmixer.fuse(block, strict=True)
    block.layer_idx, block.tags = 3, []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)
        block.tags.append("seen")
        block(x)
    assert len(fused_calls) == 2


def test_parameters_among_the_attributes_are_no_settings(
    fused_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training step changes them, and is no reason to try the block out again."""
    block, x = Plain(), tokens()
    block.decayed = [block.mlp_tokens.fc1.weight, block.mlp_tokens.fc2.weight]
    fastmixer.fuse(block, strict=True)
    monkeypatch.setattr("fastmixer.blocks.fused_forward.match", None)  # not asked again
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(2):
        block(x).square().sum().backward()
        optimizer.step()
    assert len(fused_calls) == 2


PATCHES = {
    "the block's forward": (Plain, "forward", lambda self, x: 2 * x),
    "an mlp's forward": (Mlp, "forward", lambda self, x: x),
    "PyTorch's GELU": (nn.GELU, "forward", lambda self, x: F.relu(x)),
}


@pytest.mark.parametrize("kind, name, new", PATCHES.values(), ids=PATCHES)
def test_a_class_that_is_patched_after_fuse(kind: type, name: str, new: Callable, fused_calls: list) -> None:
    block, x = Plain(), tokens()
    fastmixer.fuse(block, strict=True)
    before = block(x)
    for _ in range(2):
        with mock.patch.object(kind, name, new), warnings.catch_warnings():
            warnings.simplefilter("ignore", fastmixer.FallbackWarning)
            result = block(x)
            assert torch.equal(result, Plain.forward(block, x)) and not torch.equal(result, before)
        fused_calls.clear()
        assert torch.equal(block(x), before) and len(fused_calls) == 1


def test_an_attribute_of_the_class_and_its_methods(fused_calls: list) -> None:
    block, x = Configured(), tokens()
    fastmixer.fuse(block, strict=True)
    for factor in (0.5, 0.25):  # the second differs in its closure alone
        with (
            mock.patch.object(Configured, "scaled", Halved(factor).method()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", fastmixer.FallbackWarning)
            assert torch.equal(block(x), Configured.forward(block, x))
    with mock.patch.object(Configured, "factor", 2.0), warnings.catch_warnings():
        warnings.simplefilter("ignore", fastmixer.FallbackWarning)
        assert torch.equal(block(x), Configured.forward(block, x))
    assert not fused_calls
    assert torch.equal(block(x), Configured.forward(block, x)) and len(fused_calls) == 1


def test_own_blocks_do_not_trust_a_patched_class(fused_calls: list) -> None:
    x = tokens()
    blocks = [fastmixer.MixerBlock(DIM, SEQ) for _ in range(2)]
    blocks[0](x)
    assert len(fused_calls) == 1
    with mock.patch.object(Mlp, "forward", lambda self, x: 2 * x):
        for block in blocks:
            with pytest.warns(fastmixer.FallbackWarning, match="does not compute"):
                assert torch.equal(block(x), block.forward_modules(x))
    assert len(fused_calls) == 1

    class Doubled(fastmixer.MixerBlock):
        def forward_modules(self, x: Tensor) -> Tensor:
            return 2 * super().forward_modules(x)

    doubled = Doubled(DIM, SEQ)
    with pytest.warns(fastmixer.FallbackWarning, match="does not compute"):
        assert torch.equal(doubled(x), doubled.forward_modules(x))


def test_a_verdict_does_not_outlive_the_source_that_it_is_about() -> None:
    """It is saved with a model, and the file may be loaded with a class of the same name that does more."""

    def block_class(factor: float) -> type[nn.Module]:
        class Edited(Plain):
            def forward(self, x: Tensor) -> Tensor:
                return factor * super().forward(x)

        return Edited

    same, other, edited = block_class(1.0)(), block_class(1.0)(), block_class(2.0)()
    keys = [settings_key(block, match(block)) for block in (same, other, edited)]
    assert keys[0] == keys[1] != keys[2]


def test_settings_are_obeyed_under_torch_compile() -> None:
    torch.compiler.reset()
    block, x = Configured(), tokens()
    fastmixer.fuse(block, strict=True)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    before = compiled(x)
    assert torch.equal(before, block(x))
    changes = [
        (block, "factor", 2.0),
        (block.mlp_tokens, "factor", 2.0),
        (Configured, "factor", 2.0),
        (Configured, "forward", lambda self, x: x),
    ]
    for where, name, value in changes:
        with mock.patch.object(where, name, value), warnings.catch_warnings():
            warnings.simplefilter("ignore", fastmixer.FallbackWarning)
            result = compiled(x)
            assert torch.equal(result, Configured.forward(block, x)) and not torch.equal(result, before)
        assert torch.equal(compiled(x), before)
    torch.compiler.reset()


# ---- other inputs ------------------------------------------------------------------------------------------


class AnySize(Plain):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != SEQ:
            x = F.interpolate(x.transpose(1, 2), SEQ).transpose(1, 2)
        return super().forward(x)


def test_a_block_that_handles_other_token_counts_keeps_doing_so(fused_calls: list) -> None:
    block = AnySize()
    fastmixer.fuse(block, strict=True)
    x = tokens(SEQ + 3)
    with pytest.warns(fastmixer.FallbackWarning, match=rf"x is not a tensor of shape \(B, {SEQ}, {DIM}\)"):
        result = block(x)
    assert torch.equal(result, AnySize.forward(block, x)) and not fused_calls
    block(tokens())
    assert len(fused_calls) == 1


def test_a_size_that_the_block_refuses_is_its_own_error() -> None:
    block = Plain()
    fastmixer.fuse(block, strict=True)
    x = tokens(SEQ + 3)
    with pytest.warns(fastmixer.FallbackWarning), pytest.raises(RuntimeError) as fused:
        block(x)
    with pytest.raises(RuntimeError) as unfused:
        Plain.forward(block, x)
    assert str(fused.value) == str(unfused.value)

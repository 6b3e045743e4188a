"""What a trace may meet beside the ordinary: symbols for sizes, empty batches, blocks that differ."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fastmixer
from fastmixer import functional, notices
from fastmixer.ops import mixing, torch_ops
from fastmixer.params import MixingParams

S, C, D, E = 10, 24, 12, 32

compiled = partial(torch.compile, fullgraph=True, backend="aot_eager")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with fastmixer.backend("triton"):
        yield
    torch.compiler.reset()


def params(width: int, hidden: int, channels: int, device: torch.device) -> MixingParams:
    shapes = (channels,), (channels,), (hidden, width), (hidden,), (width, hidden), (width,)
    torch.manual_seed(width)
    return MixingParams(*((torch.randn(shape, device=device) * 0.3).requires_grad_() for shape in shapes))


def halves(device: torch.device) -> tuple[MixingParams, MixingParams]:
    return params(S, D, C, device), params(C, E, C, device)


def block(x: Tensor, token: MixingParams, channel: MixingParams) -> Tensor:
    return functional.mixer_block(x, token, channel)


def images(batch: int, device: torch.device, tokens: int = S, channels: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, tokens, channels, generator=generator).to(device)


def gradients(y: Tensor, *parameters: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y.square().sum(), parameters)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [f.shape for f in found] == [e.shape for e in expected]
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_the_mark_is_the_one_that_pytorch_sets() -> None:
    """``constant_in_traces`` is ``torch.compiler.assume_constant_result`` without its import."""

    def ours() -> None: ...

    def theirs() -> None: ...

    notices.constant_in_traces(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}


def test_tokens_and_channels_may_be_symbols(device: torch.device) -> None:
    """A second width makes the compiler call the sizes s0, s1: a choice of tiles needs numbers."""
    token, channel = compiled(functional.token_mixing), compiled(functional.channel_mixing)
    for size in (10, 11, 12):
        parameters = params(S, D, size, device)[:6]
        x = images(2, device, channels=size)
        assert torch.equal(token(x, *parameters), functional.token_mixing(x, *parameters))
        parameters = params(C, E, C, device)[:6]
        x = images(2, device, tokens=size)
        assert torch.equal(channel(x, *parameters), functional.channel_mixing(x, *parameters))


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_empty_batch(dynamic: bool, device: torch.device) -> None:
    """Also in a program that was traced for another batch."""
    token, channel = halves(device)
    parameters = [t for h in (token, channel) for t in h[:6]]
    run = compiled(block, dynamic=dynamic)
    for batch in (3, 0, 2):
        x = images(batch, device).requires_grad_()
        found = gradients(run(x, token, channel), x, *parameters)
        assert_same(found, gradients(block(x, token, channel), x, *parameters))


def test_operators_take_an_empty_batch(device: torch.device) -> None:
    """A trace that does not know the batch calls them with any."""
    token, channel = halves(device)
    parameters = [t for h in (token, channel) for t in h[:6]]
    with torch.no_grad():
        graph = make_fx(
            lambda x: block(x, token, channel), tracing_mode="symbolic", _allow_non_fake_inputs=True
        )(images(3, device))
    assert any(node.target is torch.ops.fastmixer.mixing.default for node in graph.graph.nodes)
    assert graph(images(0, device)).shape == (0, S, C)

    x = images(0, device).requires_grad_()
    tensors = mixing.tensors_of(x, {"token": token, "channel": channel})
    settings = mixing.settings_of(
        {"token": token, "channel": channel}, x.dtype, mixing.needs_of(tensors), kernels_only=True
    )
    found = gradients(torch_ops.call(settings, *tensors), x, *parameters)
    assert_same(found, [torch.zeros_like(t) for t in (x, x, *parameters)])


def test_a_batch_that_only_the_data_knows(device: torch.device) -> None:
    token, channel = halves(device)

    def chosen(x: Tensor, keep: Tensor) -> Tensor:
        return block(x[keep], token, channel)

    keep = torch.tensor([True, False, True, True], device=device)
    x = images(4, device)
    with torch.no_grad(), torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        run = compiled(chosen)
        for mask in (keep, ~keep, keep & ~keep):
            assert torch.equal(run(x, mask), chosen(x, mask))


def test_a_backward_that_is_traced_after_an_ordinary_forward(device: torch.device) -> None:
    """As compiled autograd and make_fx do."""
    token, channel = halves(device)
    parameters = [t for h in (token, channel) for t in h[:6]]
    x = images(2, device).requires_grad_()
    y = block(x, token, channel)
    graph = make_fx(lambda g: torch.autograd.grad(y, (x, *parameters), g, retain_graph=True))(y.detach())
    names = {node.target for node in graph.graph.nodes}
    assert torch.ops.fastmixer.mixing_backward.default in names
    for g in (y.detach(), torch.ones_like(y)):
        assert_same([*graph(g)], [*torch.autograd.grad(y, (x, *parameters), g, retain_graph=True)])


def test_compiled_autograd(device: torch.device) -> None:
    x = images(2, device)
    expected, found = [], []
    for gradients, context in ((expected, None), (found, partial(torch.compile, backend="aot_eager"))):
        torch.manual_seed(0)
        model = fastmixer.MixerBlock(C, S).to(device)
        y = model(x)
        if context is None:
            y.square().sum().backward()
        else:
            with torch._dynamo.compiled_autograd._enable(context):
                y.square().sum().backward()
        gradients += [p.grad for p in model.parameters()]
    assert_same(found, expected)


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_make_fx_before_and_after_dispatch(pre_dispatch: bool, device: torch.device) -> None:
    token, channel = halves(device)
    with torch.no_grad():
        graph = make_fx(lambda x: block(x, token, channel), pre_dispatch=pre_dispatch)(images(2, device))
        other = images(3, device)[:2]
        assert torch.equal(graph(other), block(other, token, channel))


@pytest.mark.parametrize("kind", ["drop", "drop_path"])
def test_blocks_that_differ_in_a_rate_train(kind: str, device: torch.device) -> None:
    """Each compiled by itself: they share the compiler's cache, and a rate is a symbol at the second one."""
    x = images(2, device)
    for rate in (0.0, 0.1, 0.2, 0.3):
        model = fastmixer.MixerBlock(C, S, **{kind: rate}).to(device).train()
        run = compiled(model)
        results = []
        for call in (run, model):
            torch.manual_seed(1)
            y = call(x)
            # PyTorch's aot_eager cannot view the gradient of a dropout of a transposed tensor on a CPU.
            results.append([y.detach()] if kind == "drop" else gradients(y, *model.parameters()))
        assert_same(*results)


def test_a_block_that_cannot_be_fused_warns_and_compiles_whole(device: torch.device) -> None:
    model = fastmixer.MixerBlock(C, S, act_layer=nn.ReLU).to(device)
    run, x = compiled(model), images(2, device)
    with pytest.warns(fastmixer.FallbackWarning, match="runs unfused"):
        y = run(x)
    torch.testing.assert_close(y, model.forward_modules(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(x)


def test_tangents_are_the_references(device: torch.device) -> None:
    token, channel = halves(device)
    x = images(2, device)
    with fastmixer.backend("auto"), forward_ad.dual_level(), torch.no_grad():
        y = torch.compile(block, backend="eager")(forward_ad.make_dual(x, torch.ones_like(x)), token, channel)
        expected = block(forward_ad.make_dual(x, torch.ones_like(x)), token, channel)
        found, wanted = forward_ad.unpack_dual(y), forward_ad.unpack_dual(expected)
    assert wanted.tangent is not None and found.tangent is not None
    torch.testing.assert_close(found.tangent, wanted.tangent)

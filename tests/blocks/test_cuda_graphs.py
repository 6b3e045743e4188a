"""Fused models inside CUDA graphs: captured forward and backward, and never with a weight of yesterday."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastmixer

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
STEPS = 4


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    with fastmixer.backend("triton"):
        yield
    torch.compiler.reset()


def blocks(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(*(fastmixer.MixerBlock(64, 49) for _ in range(2)))
    return made.to(DEVICE, dtype)


def batches(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 49, 64, generator=generator).to(DEVICE, dtype) for _ in range(STEPS)]


def train(model: nn.Module, parameters: list[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
    """The outputs of a few steps: each shows the weights that the last one left."""
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    outputs = []
    for x in batches(dtype):
        torch.compiler.cudagraph_mark_step_begin()
        y = model(x)
        outputs.append(y.detach().clone())
        y.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    return outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphed_callables_train_like_ordinary_ones(dtype: torch.dtype) -> None:
    expected = train(ordinary := blocks(dtype), list(ordinary.parameters()), dtype)
    made = blocks(dtype)
    sample = torch.randn(4, 49, 64, device=DEVICE, dtype=dtype)
    graphed = torch.cuda.make_graphed_callables(made, (sample,))
    found = train(graphed, list(made.parameters()), dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reduce_overhead_trains_like_ordinary_calls(dtype: torch.dtype) -> None:
    expected = train(ordinary := blocks(dtype), list(ordinary.parameters()), dtype)
    made = blocks(dtype)
    compiled = torch.compile(made, mode="reduce-overhead", fullgraph=True)
    found = train(compiled, list(made.parameters()), dtype)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_replay_after_an_optimizer_step_uses_the_new_weights() -> None:
    made, x = blocks(torch.bfloat16), batches(torch.bfloat16)[0]
    with torch.no_grad():
        made(x)  # compiles the kernels, which a capture cannot
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        for _ in range(2):
            for parameter in made.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            graph.replay()
            assert torch.equal(y, made(x))


def test_a_graph_of_a_frozen_model_replays_what_an_ordinary_call_gives() -> None:
    made = blocks(torch.bfloat16).eval()
    first, *others = batches(torch.bfloat16)
    with torch.no_grad():
        expected = [made(x) for x in others]
        fastmixer.freeze(made)
        x, graph = first.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = made(x)
        for other, wanted in zip(others, expected, strict=True):
            x.copy_(other)
            graph.replay()
            assert torch.equal(y, wanted)


def test_a_frozen_model_is_read_by_every_stream() -> None:
    made, x = blocks(torch.float32).eval(), batches(torch.float32)[0]
    streams = [torch.cuda.Stream() for _ in range(2)]
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = made(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(streams[0]):
            torch.cuda._sleep(200_000_000)
            fastmixer.freeze(made)  # packed behind the sleep
        with torch.cuda.stream(streams[1]):
            found = made(x)
        torch.cuda.synchronize()
    assert torch.equal(found, expected) and fastmixer.stale(made) == []


def test_no_packed_memory_is_left_on_the_gpu() -> None:
    made = blocks(torch.float32).eval()
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        made(batches(torch.float32)[0])
        before = torch.cuda.memory_allocated()
        fastmixer.freeze(made)
        assert torch.cuda.memory_allocated() > before
        fastmixer.unfreeze(made)
        assert torch.cuda.memory_allocated() == before
        fastmixer.freeze(made)
    weights = sum(parameter.nbytes for parameter in made.parameters())
    with pytest.warns(fastmixer.ThawWarning):
        made.cpu()
    assert torch.cuda.memory_allocated() <= before - weights

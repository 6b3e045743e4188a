"""CUDA-graph capture on the fake device: what a capture forbids fails, and a fused block does none of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from fake_cuda import Gpu
from test_fake_block import BF16, CHANNELS, ONE_PASS, TOKENS, block, inputs

import fastmixer


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def test_a_warmed_up_block_is_captured(gpu: Gpu) -> None:
    """Forward and backward; weights are packed in the graph, from what they are at each replay."""
    model, x = block(), inputs()

    def step() -> None:
        with fastmixer.backend("triton"):
            model(x).sum().backward()

    step()
    x.grad = None
    model.zero_grad()
    gpu.launched()
    capture(step).replay()
    launches = gpu.launches()
    assert all(one.captured for one in launches)
    assert [one.kernel for one in launches] == [*ONE_PASS, *CHANNELS, *TOKENS]


def test_a_block_that_never_ran_is_not_captured(gpu: Gpu) -> None:
    """Its kernels have to be loaded first."""
    model, x = block().eval(), inputs()
    with torch.no_grad(), fastmixer.backend("triton"):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
            capture(lambda: model(x))
        assert not gpu.capturing and not gpu.launched()
        model(x)
        capture(lambda: model(x))


FORBIDDEN = {
    "synchronize": lambda x: torch.cuda.synchronize(),
    "a stream's synchronize": lambda x: torch.cuda.current_stream().synchronize(),
    "an event's synchronize": lambda x: torch.cuda.Event().synchronize(),
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool((x > 0).all()),
    "float": lambda x: float(x.sum()),
    "int as an index": lambda x: [1, 2, 3][x.sum().int()],
    "nonzero": lambda x: x.nonzero(),
    "a mask as an index": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to the CPU": lambda x: x.to("cpu"),
    "numpy": lambda x: x.numpy(),
    "equal": lambda x: torch.equal(x, x),
    "a tensor of Python numbers": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "host memory": lambda x: torch.ones(3),
    "host memory, asked for": lambda x: torch.empty(3, device="cpu"),
    "pinned memory": lambda x: x.pin_memory(),
    "a capture in a capture": lambda x: capture(lambda: None),
    "a replay": lambda x: torch.cuda.CUDAGraph().replay(),
}


def test_what_a_capture_forbids(gpu: Gpu) -> None:
    x = torch.randn(4, device="cuda")
    for name, call in FORBIDDEN.items():
        try:
            capture(lambda call=call: call(x))
        except RuntimeError as error:
            assert "not permitted when stream is capturing" in str(error), name
        else:
            pytest.fail(f"{name} was captured")
        assert not gpu.capturing, name


def test_what_a_capture_allows(gpu: Gpu) -> None:
    x = torch.randn(4, device="cuda", dtype=BF16)

    def call() -> None:
        y = torch.empty(4, device=x.device) + torch.zeros_like(x) + x.new_ones(4)
        assert y.to("cuda").to(BF16).dtype == BF16 and y.device == x.device and y.is_cuda
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())

    capture(call).replay()


def test_a_graph_that_was_not_captured_is_not_replayed(gpu: Gpu) -> None:
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ZeroDivisionError), torch.cuda.graph(graph):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="not captured"):
        graph.replay()


def test_a_frozen_block_is_captured_without_packing(gpu: Gpu) -> None:
    model, x = block().eval(), inputs().detach()
    with torch.no_grad(), fastmixer.backend("triton"):
        model(x)
        gpu.launched()
        capture(lambda: model(x)).replay()
        assert gpu.launched() == ONE_PASS
        fastmixer.freeze(model)
        gpu.launched()
        capture(lambda: model(x)).replay()
        launches = gpu.launches()
    assert [one.kernel for one in launches] == ONE_PASS[1:] and all(one.captured for one in launches)


def test_what_a_capture_has_to_pack_is_the_graphs(gpu: Gpu) -> None:
    """Its replays make it anew: a block that is frozen in another dtype does not keep it."""
    model, x = block(dtype=torch.float32).eval(), inputs(dtype=torch.float32).detach()
    packs = []
    with torch.no_grad(), fastmixer.backend("triton"), torch.autocast("cuda", BF16):
        model(x)
        with torch.autocast("cuda", enabled=False):
            fastmixer.freeze(model)
        gpu.launched()
        for call in (lambda: capture(lambda: model(x)), lambda: model(x), lambda: model(x)):
            call()
            packs.append(gpu.launched().count("pack_weights"))
    assert packs == [1, 1, 0]

"""fuse reaches blocks inside wrappers: a larger model, DataParallel, DDP, torch.compile."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed
import torch.distributed.fsdp
from foreign_blocks import make_model
from foreign_families import FAMILIES, Family, pretend_mmcv
from torch import Tensor, nn

import fastmixer

TRIED = ("lucidrains", "sequential", "mmpretrain", "patchtsmixer")


@pytest.fixture(autouse=True)
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch.manual_seed(0)
    pretend_mmcv(monkeypatch)
    with fastmixer.backend("torch"):
        yield


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def shard(model: nn.Module, *parts: nn.Module) -> None:
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    for module in (*parts, model):
        torch.distributed.fsdp.fully_shard(module, mesh=mesh)


def images() -> Tensor:
    return torch.randn(2, 3, 16, 16)


class Detector(nn.Module):
    """A larger model around a mixer."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({"backbone": make_model(), "head": nn.Linear(5, 2)})

    def forward(self, x: Tensor) -> Tensor:
        return self.stages["head"](self.stages["backbone"](x))


def test_blocks_inside_a_larger_model_are_named_by_their_place(fused_calls: list) -> None:
    model, x = Detector().eval(), images()
    expected = model(x)
    report = fastmixer.fuse(model, strict=True)
    assert [row.name for row in report] == [f"stages.backbone.blocks.{i}" for i in range(2)]
    assert torch.equal(model(x), expected) and len(fused_calls) == 2


@pytest.mark.parametrize("fuse_first", [True, False])
def test_under_distributed_data_parallel(fuse_first: bool, one_process: None, fused_calls: list) -> None:
    model, x = make_model(), images()
    twin = copy.deepcopy(model)
    if fuse_first:
        fastmixer.fuse(model, strict=True)
    parallel = nn.parallel.DistributedDataParallel(model)
    if not fuse_first:
        assert [row.name for row in fastmixer.fuse(parallel, strict=True)] == [
            "module.blocks.0",
            "module.blocks.1",
        ]
    for each in (parallel, twin):
        each(x).square().sum().backward()
    assert len(fused_calls) == 2
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name
    assert fastmixer.unfuse(parallel) == 2 and "forward" not in model.blocks[0].__dict__


def test_fully_sharded_after_fuse(one_process: None, fused_calls: list) -> None:
    """Which gives every block another class, and attributes that are no settings of its."""
    model, x = make_model(), images()
    expected = model(x)
    fastmixer.fuse(model, strict=True)
    shard(model, *model.blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastmixer.FallbackWarning)
        for _ in range(2):
            result = model(x)
            torch.testing.assert_close(result, expected)
            result.sum().backward()
    assert len(fused_calls) == 4


@torch.no_grad()
def assert_current(model: nn.Module, twin: nn.Module, x: Tensor) -> None:
    """The model computes with what is written into its parameters, as the twin does."""
    for _ in range(2):
        for parameter in (*model.parameters(), *twin.parameters()):
            parameter.mul_(1.1)
        torch.testing.assert_close(model(x), twin(x))


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("block_layer", [None, fastmixer.MixerBlock])
def test_a_fully_sharded_model_is_not_frozen(
    by_block: bool, block_layer: type | None, one_process: None
) -> None:
    """Between calls a model that is sharded as a whole has plain weights, which are not the next call's."""
    model = make_model(**({"block_layer": block_layer} if block_layer else {})).eval()
    twin, x = copy.deepcopy(model), images()
    fastmixer.fuse(model, strict=True)
    shard(model, *model.blocks if by_block else ())
    with fastmixer.backend("triton"):
        assert_current(model, twin, x)
        with pytest.raises(ValueError, match=r"sharded by FSDP2 and cannot be frozen: its block blocks\.0"):
            fastmixer.freeze(model)
        assert_current(model, twin, x)


def test_a_frozen_model_is_thawed_when_it_is_fully_sharded(one_process: None) -> None:
    model = make_model().eval()
    twin, x = copy.deepcopy(model), images()
    with fastmixer.backend("triton"), torch.no_grad():
        fastmixer.fuse(model, strict=True, freeze=True)
        model(x)
        shard(model, *model.blocks)
        with pytest.warns(fastmixer.ThawWarning) as told:
            assert_current(model, twin, x)
    assert len(told) == 2, "one a block"


@pytest.mark.parametrize("fuse_first", [True, False])
def test_data_parallel_without_gpus_calls_the_model_itself(fuse_first: bool, fused_calls: list) -> None:
    model, x = make_model().eval(), images()
    expected = model(x)
    if fuse_first:
        fastmixer.fuse(model)
    parallel = nn.DataParallel(model)
    if not fuse_first:
        assert len(fastmixer.fuse(parallel, strict=True)) == 2
    assert torch.equal(parallel(x), expected) and len(fused_calls) == 2


class _Copies(torch.autograd.Function):
    """What Broadcast does between GPUs: a copy of every tensor a device, whose gradients are added up."""

    @staticmethod
    def forward(ctx: object, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for _ in range(count) for tensor in tensors)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple:
        number = len(ctx.needs_input_grad) - 1
        return None, *(sum(grads[i::number]) for i in range(number))


@pytest.fixture
def replicas_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own replicate, with copies in place of the transfers, for which it needs GPUs."""

    def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
        if not tensors:
            return []
        out = _Copies.apply(len(devices), *(t.detach() if detach else t for t in tensors))
        return [list(out[i : i + len(tensors)]) for i in range(0, len(out), len(tensors))]

    module = sys.modules["torch.nn.parallel.replicate"]
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)


@pytest.mark.parametrize(
    "name, backend",
    [*((name, "torch") for name in ("timm", "own", *TRIED)), ("timm", "triton"), ("lucidrains", "triton")],
)
def test_replicas_of_data_parallel_run_their_own_weights_fused(
    name: str, backend: str, replicas_on_the_cpu: None, fused_calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in ("timm", "own"):
        layer = {"block_layer": fastmixer.MixerBlock} if name == "own" else {}
        model, shares = make_model(drop_path_rate=0.5, **layer), [images() for _ in range(2)]
    else:
        model, shares = FAMILIES[name].block(), [FAMILIES[name].x() for _ in range(2)]
    blocks = len(fastmixer.fuse(model, strict=True))
    twin = copy.deepcopy(model)
    monkeypatch.setattr("fastmixer.blocks.fused_forward.disproof", pytest.fail)  # tried out already
    torch.manual_seed(1)
    replicas = nn.parallel.replicate(model, [0, 1])
    with fastmixer.backend(backend):
        outputs = [replica(x) for replica, x in zip(replicas, shares, strict=True)]
    torch.stack(outputs).square().sum().backward()
    assert len(fused_calls) == 2 * blocks
    weights = {half.fc1_weight.data_ptr() for _, *halves in fused_calls for half in halves}
    assert len(weights) == 4 * blocks
    torch.manual_seed(1)
    with fastmixer.backend(backend):
        expected = [twin(x) for x in shares]
    torch.stack(expected).square().sum().backward()
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(outputs, expected, strict=True))
    for (parameter, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), parameter
    for module in model.modules():
        forward = module.__dict__.get("forward")
        assert forward is None or forward.block is module


def test_a_replica_is_packed_for_the_kernels(replicas_on_the_cpu: None) -> None:
    model, x = make_model().to(torch.bfloat16).eval(), images().to(torch.bfloat16)
    fastmixer.fuse(model, strict=True)
    with torch.no_grad(), fastmixer.backend("triton"):
        expected = model(x)
        results = [replica(x) for replica in nn.parallel.replicate(model, [0, 1])]
        detached = [replica(x) for replica in nn.parallel.replicate(model, [0, 1], detach=True)]
    assert all(torch.equal(result, expected) for result in (*results, *detached))


def test_replicas_of_an_unfused_model_are_as_ever(replicas_on_the_cpu: None, fused_calls: list) -> None:
    model = make_model()
    fastmixer.fuse(model)
    fastmixer.unfuse(model)
    for replica in nn.parallel.replicate(model, [0, 1]):
        replica(images())
    assert not fused_calls


@pytest.fixture
def compilations() -> Iterator[list]:
    """The graphs that a compiling backend was given."""
    torch.compiler.reset()
    yield []
    torch.compiler.reset()


def compile_whole(model: nn.Module, backend: Callable) -> nn.Module:
    return torch.compile(model, backend=backend)


def compile_in_place(model: nn.Module, backend: Callable) -> nn.Module:
    model.compile(backend=backend)
    return model


def compile_wrapped_blocks(model: nn.Module, backend: Callable) -> nn.Module:
    model.blocks = nn.Sequential(*(torch.compile(block, backend=backend) for block in model.blocks))
    return model


def compile_blocks_in_place(model: nn.Module, backend: Callable) -> nn.Module:
    for block in model.blocks:
        block.compile(backend=backend)
    return model


@pytest.mark.parametrize(
    "compile_model, names",
    [
        (compile_whole, "_orig_mod.blocks.{}"),
        (compile_in_place, "blocks.{}"),
        (compile_wrapped_blocks, "blocks.{}._orig_mod"),
        (compile_blocks_in_place, "blocks.{}"),
    ],
)
def test_an_already_compiled_model_is_compiled_anew(
    compile_model: Callable, names: str, compilations: list
) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        compilations.append(graph)
        return graph.forward

    model, x = make_model().eval(), images()
    expected = model(x)
    compiled = compile_model(model, backend)
    assert torch.equal(compiled(x), expected)
    before = len(compilations)
    report = fastmixer.fuse(compiled, strict=True)
    assert [row.name for row in report] == [names.format(i) for i in range(2)]
    assert torch.equal(compiled(x), expected)
    after = len(compilations)
    assert after > before, "the code from before fuse ran on"
    compiled(x)
    assert len(compilations) == after
    assert fastmixer.unfuse(compiled) == 2
    assert torch.equal(compiled(x), expected)


@pytest.mark.parametrize("name", TRIED)
def test_families_under_torch_compile(name: str, compilations: list) -> None:
    family: Family = FAMILIES[name]
    block, x = family.block().eval(), family.x()
    fastmixer.fuse(block, strict=True)
    expected = block(x)
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(torch.cat([x, x]))[: len(x)], expected)

"""What the processes of ``test_distributed`` run: each function is called with the same arguments in all.

A module of its own, because a spawned process imports what it is to run, and pytest's modules cost seconds.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from foreign_blocks import DIM, SEQ, Plain
from fused_calls import replaced
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from without_finalizing import end

import fastmixer
from fastmixer import demo, functional, parity
from fastmixer.blocks.families import match
from fastmixer.dtypes import accumulate_dtype
from fastmixer.params import MixingParams

SHARE = 4  # samples of a rank in each step
STEPS = {torch.float32: 3, torch.bfloat16: 8}  # coarse errors need more numbers to be compared by
CLASSES = 48  # enough for the error of the head's bias to mean something
RATE = 0.1  # high: weights of the step before give other gradients, far outside any bound
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class World:
    """The process group, as one of its processes sees it."""

    rank: int
    size: int
    device: torch.device

    @property
    def share(self) -> slice:
        """The samples of a batch that are this rank's."""
        return slice(self.rank * SHARE, (self.rank + 1) * SHARE)


def start(rank: int, size: int, backend: str, store: str, checks: tuple[Callable, ...]) -> None:
    """Joins the process group, calls each check with the world and ends the process, with 0 if none failed.

    What falls back to PyTorch fails its check.
    """
    torch.set_num_threads(1)
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = datetime.timedelta(seconds=300)  # the interpreter is slow, and machines are busy
    dist.init_process_group(backend, f"file://{store}", rank=rank, world_size=size, timeout=patience)
    try:
        for check in checks:
            with fastmixer.backend("triton"), warnings.catch_warnings():
                warnings.simplefilter("error", fastmixer.FallbackWarning)
                check(World(rank, size, device))
    except RuntimeError:  # mostly because another process has failed: its error is what has to be reported
        time.sleep(5)
        raise
    finally:
        dist.destroy_process_group()
    end(0)


# ---- models and training ---------------------------------------------------------------------------------


class Mixer(nn.Module):
    """Two blocks between linear layers. x (B, SEQ, 8) -> (B, CLASSES)."""

    def __init__(self, kind: str = "foreign", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        makers = {"foreign": Plain, "own": lambda: fastmixer.MixerBlock(DIM, SEQ, (0.5, 2.0))}
        self.stem = nn.Linear(8, DIM)
        self.blocks = nn.Sequential(makers[kind](), makers[kind]())
        self.head = nn.Linear(SEQ * DIM, CLASSES)  # behind a mean the errors of all tokens would be one
        demo.randomise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).flatten(1))


def batches(world: World, dtype: torch.dtype = FP32) -> list[tuple[Tensor, Tensor]]:
    """The samples (B, SEQ, 8) and labels (B,) of every step, of all ranks together."""
    generator = torch.Generator().manual_seed(1)
    count = world.size * SHARE
    drawn = [
        (
            torch.randn(count, SEQ, 8, generator=generator),
            torch.randint(CLASSES, (count,), generator=generator),
        )
        for _ in range(STEPS[dtype])
    ]
    return [(x.to(world.device), labels.to(world.device)) for x, labels in drawn]


def loss_of(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    logits = model(x)
    return nn.functional.cross_entropy(logits.to(accumulate_dtype(logits.dtype)), labels)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which this rank may hold a shard: a copy."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Step(NamedTuple):
    """A training step by parameter: the weights before it, whole, and their gradients."""

    weights: dict[str, Tensor]
    gradients: dict[str, Tensor]


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[Step]:
    """SGD over the batches; names are those of the model inside DDP."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    steps = []
    for x, labels in data:
        named = {name.removeprefix("module."): p for name, p in model.named_parameters()}
        weights = {name: whole(p) for name, p in named.items()}
        optimizer.zero_grad()
        loss_of(model, x, labels).backward()
        steps.append(Step(weights, {name: whole(p.grad) for name, p in named.items()}))
        optimizer.step()
    return steps


def in_one_process(
    model: nn.Module, steps: list[Step], data: list[tuple[Tensor, Tensor]], dtype: torch.dtype, shares: int
) -> list[dict[str, Tensor]]:
    """The gradients of every step, of a copy that gets the weights of that step, in ``dtype``.

    The batch comes in that many shares, one after the other, and every share gets a new model, which has
    packed nothing yet. Their gradients are added up in fp32, or fp64 beside fp64.
    """
    found = []
    for step, (x, labels) in zip(steps, data, strict=True):
        sums = {}
        for part, answers in zip(x.chunk(shares), labels.chunk(shares), strict=True):
            fresh = copy.deepcopy(model)
            fresh.load_state_dict(step.weights)
            fused(fresh.to(dtype))
            loss_of(fresh, part.to(dtype), answers).backward()
            for name, parameter in fresh.named_parameters():
                gradient = parameter.grad.to(accumulate_dtype(dtype)) / shares
                sums[name] = sums[name] + gradient if name in sums else gradient
        found.append(sums)
    return found


def fused(model: nn.Module) -> nn.Module:
    fastmixer.fuse(model, strict=True)
    return model


def sharded(model: nn.Module, policy: MixedPrecisionPolicy | None = None) -> nn.Module:
    """The model with every block, and what is left, sharded over all ranks."""
    for module in (*model.blocks, model):
        fully_shard(module, mp_policy=policy or MixedPrecisionPolicy())
    return model


# ---- comparisons -----------------------------------------------------------------------------------------


def assert_parity(
    model: nn.Module, steps: list[Step], data: list[tuple[Tensor, Tensor]], dtype: torch.dtype, shares: int
) -> None:
    """The gradients of every parameter, of both blocks and all steps, are as near to the truth as PyTorch's.

    At the weights that the steps had: further on, two trainings differ by more than rounding.
    """
    with fastmixer.backend("torch"):
        truth = in_one_process(model, steps, data, torch.float64, 1)
        eager = in_one_process(model, steps, data, dtype, shares)
    found = [step.gradients for step in steps]
    together: dict[str, list[str]] = {}
    for name in truth[0]:
        module, _, parameter = name.partition(".")
        # PyTorch's own layers as one: their biases have too few elements to be judged alone.
        of_blocks = parameter.partition(".")[2]
        together.setdefault(of_blocks if module == "blocks" else module, []).append(name)
    for what, names in together.items():
        pooled = (
            torch.cat([step[name].flatten() for step in each for name in names])
            for each in (found, eager, truth)
        )
        compared = parity.compare(*pooled, FP32)
        assert compared.ok, f"{what}: {compared}"


def assert_as_one_process(world: World, model: nn.Module, steps: list[Step], dtype: torch.dtype) -> None:
    """Parity; and two ranks, of which the sum of gradients has no order, give the bits of one process.

    The first rank compares: what the others have is the same (``assert_ranks_agree``).
    """
    if world.rank > 0:
        return
    data = batches(world, dtype)
    assert_parity(model, steps, data, dtype, 1 if dtype == FP32 else world.size)
    if world.size == 2:
        alone = in_one_process(model, steps, data, dtype, world.size)
        for number, (step, expected) in enumerate(zip(steps, alone, strict=True)):
            differing = [name for name in expected if not torch.equal(step.gradients[name], expected[name])]
            assert not differing, f"step {number}: {differing}"


def assert_ranks_agree(model: nn.Module) -> None:
    """All ranks hold the same bits of all parameters."""
    mine = torch.cat([whole(parameter).flatten() for parameter in model.parameters()])
    first = mine.clone()
    dist.broadcast(first, 0)
    assert torch.equal(mine, first)


# ---- the checks ------------------------------------------------------------------------------------------


def train_replicated(world: World) -> None:
    """DDP; it gives all ranks the first one's weights: what they packed before is worth nothing."""
    original = Mixer().to(world.device)
    shares = [(x[world.share], labels[world.share]) for x, labels in batches(world)]
    other = fused(Mixer(seed=world.rank).to(world.device))
    with torch.no_grad():
        other(shares[0][0])
    fused_before = DistributedDataParallel(other)
    fused_after = fused(DistributedDataParallel(copy.deepcopy(original)))
    for model in (fused_before, fused_after):
        steps = train(model, shares)
        assert all(torch.equal(steps[0].weights[name], p) for name, p in original.named_parameters())
        assert_as_one_process(world, original, steps, FP32)
        assert_ranks_agree(model)


def train_sharded(world: World, kind: str = "foreign", dtype: torch.dtype = FP32) -> None:
    """FSDP2 with weights gathered in ``dtype`` and gradients summed in fp32; "own" blocks need no fuse."""
    original = Mixer(kind).to(world.device)
    shares = [(x[world.share], labels[world.share]) for x, labels in batches(world, dtype)]
    model = copy.deepcopy(original)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=FP32)
    model = sharded(fused(model) if kind == "foreign" else model, policy)
    with _watched_calls() as seen:
        steps = train(model, shares)
    # The kernels were given whole weights; outside of the forward FSDP puts shards in their place.
    assert seen == [(nn.Parameter, dtype)] * (2 * STEPS[dtype]), seen
    assert all(isinstance(p, DTensor) and p.dtype == FP32 for p in model.parameters())
    assert_as_one_process(world, original, steps, dtype)
    assert_ranks_agree(model)


@contextlib.contextmanager
def _watched_calls() -> Iterator[list[tuple[type, torch.dtype]]]:
    """Collects class and dtype of a weight in every call that takes the fused path."""
    seen = []

    def watched(run: Callable, x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
        weight = halves["channel"].fc1_weight
        seen.append((type(weight), weight.dtype))
        return run(x, halves)

    with mock.patch.object(functional, "prepared", replaced(watched)):
        yield seen


def write_between_calls(world: World) -> None:
    """What is written into shards, by whatever, is in the next forward.

    FSDP gathers weights into memory that may be where it was, and keeps their version. That is why a sharded
    model is not frozen.
    """
    x = batches(world)[0][0]
    original = Mixer().to(world.device)
    root_only = fused(copy.deepcopy(original))
    fully_shard(root_only)
    for model in (root_only, sharded(fused(copy.deepcopy(original)))):
        twin = copy.deepcopy(original)
        with torch.no_grad():
            for _ in range(2):
                for parameter in (*model.parameters(), *twin.parameters()):
                    parameter.mul_(1.1)
                expected = fused(copy.deepcopy(twin))(x)
                assert torch.equal(model(x), expected), f"rank {world.rank} computes with former weights"
        try:
            fastmixer.freeze(model.eval())
        except ValueError as error:
            assert "sharded by FSDP2 and cannot be frozen" in str(error)
        else:
            raise AssertionError("frozen")


def decline_what_is_sharded(world: World) -> None:
    """A foreign block is tried out before it is fused, for which its weights have to be there."""
    model = sharded(Mixer().to(world.device))
    assert [row.fused for row in fastmixer.fuse(model)] == [False, False]
    assert all("not a plain floating-point Parameter" in row.reason for row in fastmixer.fuse(model))


def train_in_tensor_parallel(world: World) -> None:
    """The channel half cut into shards by ``parallelize_module``: right, by PyTorch, and said so."""
    original = Mixer().to(world.device)
    data = batches(world)
    mesh = dist.init_device_mesh(world.device.type, (world.size,))
    plan = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}
    model = fused(copy.deepcopy(original))
    for block in model.blocks:
        parallelize_module(block.mlp_channels, mesh, plan)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = train(model, data)  # every rank sees the whole batch
    fallbacks = [str(w.message) for w in caught if issubclass(w.category, fastmixer.FallbackWarning)]
    assert len(fallbacks) == 2, fallbacks  # one a block
    for message in fallbacks:
        assert " (Plain) runs unfused: mlp_channels (Mlp): fc1 has hooks" in message, message
        assert "fc1 has a weight that is not a plain floating-point Parameter" in message
    if world.rank == 0:
        assert_parity(original, steps, data, FP32, shares=1)
    assert_ranks_agree(model)

    try:
        fused(model)  # strict
    except ValueError as error:
        assert "2 of 2 blocks of model cannot be fused" in str(error)
    else:
        raise AssertionError("fuse(strict=True) took blocks that are tensor parallel")
    half = match(original.blocks[0]).channel.params()
    weight = model.blocks[0].mlp_channels.fc1.weight
    try:
        x = torch.zeros(1, SEQ, DIM, device=world.device)
        functional.channel_mixing(x, *half._replace(fc1_weight=weight)[:6])
    except RuntimeError as error:
        assert "a DTensor keeps its values in its own way" in str(error)
    else:
        raise AssertionError("the kernels took a DTensor")


# ---- checkpoints -----------------------------------------------------------------------------------------


def outputs(model: nn.Module, device: torch.device) -> Tensor:
    x = torch.randn(SHARE, SEQ, 8, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return model(x.to(device)).cpu()


def save(world: World, folder: Path) -> None:
    """Trains a sharded model for a step and saves it, with what it and its unfused twin compute."""
    model = sharded(fused(Mixer().to(world.device)))
    train(model, batches(world)[:1])
    dcp.save(model.state_dict(), checkpoint_id=folder / "checkpoint")
    expected = {"fused": outputs(model, world.device)}
    plain = Mixer().to(world.device)
    plain.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    with fastmixer.backend("torch"):
        expected["plain"] = outputs(plain, world.device)
    if world.rank == 0:
        torch.save(expected, folder / "expected.pt")
    dist.barrier()  # ``load`` may come next


def load(world: World, folder: Path) -> None:
    """Loads what ``save`` saved, in place, into sharded and whole models that have already run."""
    expected = torch.load(folder / "expected.pt")
    models = {"whole": fused(Mixer(seed=1).to(world.device)), "plain": Mixer(seed=1).to(world.device)}
    if world.size > 1:
        models["sharded"] = sharded(fused(Mixer(seed=1).to(world.device)))
    for name, model in models.items():
        with fastmixer.backend("torch" if name == "plain" else "triton"):
            before = outputs(model, world.device)
            dcp.load(model.state_dict(), checkpoint_id=folder / "checkpoint")
            after = outputs(model, world.device)
        wanted = expected["plain" if name == "plain" else "fused"]
        assert torch.equal(after, wanted) and not torch.equal(before, wanted), f"{name} on {world.size} ranks"

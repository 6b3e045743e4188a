"""A soak: random steps of what people do with a model, the fused one beside an unfused twin.

After every step both are run and judged by the parity criterion, and what the steps leave behind is counted.
"""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import random
import sys
import warnings
from collections import defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from draws import generated
from fused_calls import replace_calls
from timm.models.mlp_mixer import MixerBlock as TimmBlock
from torch import Tensor, nn
from writes import UNSEEN, VERSIONED

import fastmixer
from fastmixer import parity
from fastmixer.blocks.block import fused_forwards
from fastmixer.blocks.families import match
from fastmixer.dtypes import accumulate_dtype

pytestmark = [
    # A block that runs unfused by accident would agree with its twin.
    pytest.mark.filterwarnings("error::fastmixer.FallbackWarning"),
    pytest.mark.filterwarnings("ignore::fastmixer.ThawWarning"),
]

BATCH, SEQ, DIM = 2, 9, 24
DTYPES = torch.float32, torch.bfloat16, torch.float16, torch.float64


class Walk:
    """A fused model and its unfused twin, both changed by the same random steps. One seed, one walk.

    kind: the class of the fused block: timm's, which ``unfuse`` restores, or ours, which is always fused.
    calls: grows with every call that takes the fused path.
    """

    def __init__(self, kind: type[nn.Module], seed: int, calls: list) -> None:
        import peft  # here: what is collected for a GPU does without it

        self.peft = peft
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind, self.calls = kind, calls
        self.pools = defaultdict(lambda: deque(maxlen=16))
        self.twin = nn.Sequential(TimmBlock(DIM, SEQ, drop_path=0.3))
        self.twin.load_state_dict(self.weights())
        self.fused = True
        self.model = self.another()
        self.model.load_state_dict(self.twin.state_dict())

    def another(self) -> nn.Module:
        """A new model in the state of this one, but for its weights."""
        made = nn.Sequential(self.kind(DIM, SEQ, drop_path=0.3)).to(self.dtype).train(self.twin.training)
        if self.fused:
            fastmixer.fuse(made, strict=True)
        return made

    @property
    def dtype(self) -> torch.dtype:
        return self.twin[0].norm1.weight.dtype

    # ---- random numbers ----------------------------------------------------------------------------------

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def values(self, name: str, like: Tensor) -> Tensor:
        """New values for a parameter: none trivial, and no larger or smaller from step to step."""
        if like.ndim == 2:
            return self.normal(*like.shape) * like.shape[1] ** -0.5
        return self.normal(*like.shape) * 0.3 + (name in ("0.norm1.weight", "0.norm2.weight"))

    def weights(self) -> dict[str, Tensor]:
        return {name: self.values(name, tensor) for name, tensor in self.twin.state_dict().items()}

    # ---- the steps; each says what it chose --------------------------------------------------------------

    def train(self) -> str:
        """A step of an optimizer: both take the fused gradients, so that their weights stay the same."""
        self.model.train()
        self.twin.train()
        _, _, *gradients = self.judged(training, self.normal(BATCH, SEQ, DIM), self.normal(BATCH, SEQ, DIM))
        fused = self.random.random() < 0.5
        for module in (self.model, self.twin):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.01, fused=fused)
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()
        return f"fused={fused}"

    def eval(self) -> None:
        self.model.eval()
        self.twin.eval()

    def load_state_dict(self) -> str:
        weights, assign = self.weights(), self.random.random() < 0.5
        for module in (self.model, self.twin):
            module.load_state_dict(copy.deepcopy(weights), assign=assign)
        return f"assign={assign}"

    def edit(self, edits: tuple[Callable, ...] = VERSIONED) -> str:
        edit = self.random.choice(edits)
        name, parameter = self.random.choice(list(self.twin.named_parameters()))
        values = self.values(name, parameter)
        for module in (self.model, self.twin):
            edit(module, name, values.clone())
        return f"{name} {edit.__name__}"

    def edit_unseen(self) -> str:
        """Not while frozen: that is the contract."""
        fastmixer.unfreeze(self.model)
        return self.edit(UNSEEN)

    def descend(self) -> None:
        """A training loop that writes through ``.data``; both take the fused gradients."""
        self.model.train()
        self.twin.train()
        for _ in range(2):
            _, _, *found = self.judged(training, self.normal(BATCH, SEQ, DIM), self.normal(BATCH, SEQ, DIM))
            for module in (self.model, self.twin):
                for parameter, gradient in zip(module.parameters(), found, strict=True):
                    parameter.data.sub_(0.01 * gradient)

    def average(self) -> None:
        """An exponential average is swapped in for an evaluation, and out again: torch_ema's way."""
        fastmixer.unfreeze(self.model)
        own = [[parameter.data.clone() for parameter in m.parameters()] for m in (self.model, self.twin)]
        averages = [self.values(name, parameter) for name, parameter in self.twin.named_parameters()]
        for values in ([averages, averages], own):
            for module, its in zip((self.model, self.twin), values, strict=True):
                for parameter, value in zip(module.parameters(), its, strict=True):
                    parameter.data.copy_(value)
            self.check()

    def adapt(self) -> str:
        """LoRA layers come, are merged and unmerged, and go again, merged into the weights or not."""
        fastmixer.unfreeze(self.model)
        targets = self.random.sample(["mlp_tokens.fc1", "mlp_tokens.fc2", "mlp_channels.fc1"], 2)
        config = self.peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        seed, merges = self.random.randrange(2**32), self.random.random() < 0.5
        adapted = []
        for module in (self.model, self.twin):
            torch.manual_seed(seed)
            adapted.append(self.peft.get_peft_model(module, config))
        fused, self.fused = self.fused, False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", fastmixer.FallbackWarning)
            for step in ("merge_adapter", "unmerge_adapter"):
                self.check(same=False)
                for one in adapted:
                    getattr(one, step)()
            self.check(same=False)
        for one in adapted:
            one.merge_and_unload() if merges else one.unload()
        self.fused = fused
        self.model.requires_grad_()
        self.twin.requires_grad_()
        return f"{targets}, merges={merges}"

    def share_memory(self) -> None:
        self.model.share_memory()

    def freeze(self) -> str:
        if not self.fused:
            return "unfused"
        self.eval()
        fastmixer.freeze(self.model)
        for _ in range(2):  # without gradients, which would thaw
            self.check(modes=(torch.no_grad, torch.inference_mode))
            assert all(forward.frozen is not None for _, forward in fused_forwards(self.model))
        assert fastmixer.stale(self.model) == []

    def unfreeze(self) -> str:
        return str(fastmixer.unfreeze(self.model))

    def to(self) -> str:
        dtype = self.random.choice(DTYPES)
        for module in (self.model, self.twin):
            module.to(dtype)
        return str(dtype)

    def fuse(self) -> str:
        self.fused = True
        return fastmixer.fuse(self.model, strict=True).rows[0].reason

    def unfuse(self) -> str:
        self.fused = self.kind is fastmixer.MixerBlock
        return str(fastmixer.unfuse(self.model))

    def deepcopy(self) -> None:
        self.model = copy.deepcopy(self.model)

    def save_and_load(self) -> str:
        what = self.random.choice(("model", "pickle", "state_dict"))
        file = io.BytesIO()
        if what == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
            return what
        torch.save(self.model.state_dict() if what == "state_dict" else self.model, file)
        file.seek(0)
        if what == "model":
            self.model = torch.load(file, weights_only=False)
        else:
            self.model = self.another()
            self.model.load_state_dict(torch.load(file))
        return what

    STEPS = (
        train, eval, load_state_dict, edit, edit_unseen, to, fuse, unfuse, deepcopy, save_and_load, descend,
        average, adapt, share_memory, freeze, freeze, unfreeze,
    )  # fmt: skip

    def step(self) -> str:
        step = self.random.choice(self.STEPS)
        return f"{step.__name__}({step(self) or ''})"

    # ---- what is judged ----------------------------------------------------------------------------------

    def check(
        self, same: bool = True, modes: tuple = (torch.no_grad, torch.inference_mode, torch.enable_grad)
    ) -> None:
        """The model has its twin's weights and mode, and computes what they say; same: and trains them."""
        for (name, mine), theirs in zip(self.model.named_parameters(), self.twin.parameters(), strict=True):
            assert torch.equal(mine, theirs) and (mine.requires_grad or not same), name
        assert self.model.training == self.twin.training
        mode = self.random.choice(modes)
        autocast = self.dtype == torch.float32 and self.random.random() < 0.3
        with mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            self.judged(lambda module, x: [module(x)], self.normal(BATCH, SEQ, DIM))

    def judged(self, run: Callable[..., list[Tensor]], *inputs: Tensor) -> list[Tensor]:
        """What ``run`` gives for the model, held to the twin's error.

        All tensors together, each in units of the truth, and with the last comparisons of this kind: the
        largest of a few hundred errors means little.
        """
        truth, seed, calls = copy.deepcopy(self.twin).double(), self.random.randrange(2**32), len(self.calls)
        results = []
        for module, dtype in ((self.model, self.dtype), (self.twin, self.dtype), (truth, torch.float64)):
            torch.manual_seed(seed)  # of stochastic depth
            results.append(run(module, *(tensor.to(dtype) for tensor in inputs)))
        assert len(self.calls) - calls == self.fused, "the wrong path"
        assert all(mine.dtype == its.dtype for mine, its in zip(*results[:2], strict=True))
        units = [float(tensor.detach().square().mean().sqrt()) or 1.0 for tensor in results[2]]
        pool = self.pools[self.dtype, torch.is_autocast_enabled("cpu"), len(results[0])]
        pool.append([torch.cat([flat(t) / unit for t, unit in zip(r, units, strict=True)]) for r in results])
        pooled = (torch.cat(parts) for parts in zip(*pool, strict=True))
        compared = parity.compare(*pooled, accumulate_dtype(self.dtype))
        assert compared.ok, compared
        return results[0]


def flat(tensor: Tensor) -> Tensor:
    return tensor.detach().double().flatten()


def training(module: nn.Module, x: Tensor, g: Tensor) -> list[Tensor]:
    """The output, and the gradients of x and every parameter for the output's gradient g."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], g)]


class Footprint(NamedTuple):
    """What is alive: tensors, Python's blocks of memory, bytes of the process."""

    tensors: int
    blocks: int
    resident: int

    @classmethod
    def now(cls) -> Footprint:
        gc.collect()
        tensors = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(tensors, sys.getallocatedblocks(), pages * os.sysconf("SC_PAGE_SIZE"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one with every call that takes the fused path."""
    made: list[None] = []
    replace_calls(monkeypatch, lambda run, x, halves: made.append(None) or run(x, halves))
    return made


def soak(kind: type[nn.Module], seed: int, steps: int, calls: list) -> list[Footprint]:
    """The footprints after each fifth of a walk. A failure tells its step; the same seed repeats it."""
    walk, latest = Walk(kind, seed, calls), deque(maxlen=12)
    footprints = []
    with fastmixer.backend("triton"):
        for number in range(1, steps + 1):
            latest.append("(not finished)")
            try:
                latest[-1] = walk.step()
                walk.check()
            except Exception as error:
                last = ", ".join(latest)
                raise AssertionError(f"seed {seed}, {kind.__name__}, step {number}, after {last}") from error
            if number % (steps // 5) == 0:
                walk.pools.clear()
                walk.unfreeze()
                footprints.append(Footprint.now())
    return footprints


@pytest.mark.parametrize(("kind", "seed"), [(TimmBlock, 1), (fastmixer.MixerBlock, 2)])
def test_twenty_steps(kind: type[nn.Module], seed: int, calls: list) -> None:
    first, *_, last = soak(kind, seed, 20, calls)
    assert last.tensors <= first.tensors


@generated(quick=0, more=2, most=6)
def test_walks_of_five_hundred_steps(draw: str, calls: list) -> None:
    """No mismatch, and a step leaves less than a block's structure is made of, or its weights are."""
    seed, steps = int(draw.rpartition("-")[2]), 500
    kind = (TimmBlock, fastmixer.MixerBlock)[seed % 2]
    footprints = soak(kind, seed, steps, calls)
    made, structures = TimmBlock(DIM, SEQ), []
    for _ in range(2):
        before = sys.getallocatedblocks()
        structures.append(match(made))
    pieces = sys.getallocatedblocks() - before  # of the second: the first may have filled caches
    assert 10 < pieces < 1000
    weights = sum(parameter.nbytes for parameter in TimmBlock(DIM, SEQ).parameters())
    _, first, *_, last = footprints
    assert last.tensors <= first.tensors, footprints
    assert last.blocks - first.blocks < steps * pieces, footprints
    assert last.resident - first.resident < steps * weights, footprints

"""What races in ``benchmarks.blocks``: the cases, the opponents of each direction, and their parity gate."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import fastmixer
from benchmarks import measure
from fastmixer import parity, verify
from fastmixer.cli import did_you_mean
from fastmixer.model import ALIASES, MODELS

TRUTH_SAMPLES = 16  # the fp64 truth is computed so many samples at a time, to bound its memory


@dataclass(frozen=True)
class Case:
    """One block shape at one batch; sizes B, S, C, D, E in words."""

    model: str
    batch: int
    dtype: str
    tokens: int
    channels: int
    token_hidden: int
    channel_hidden: int

    @property
    def flops(self) -> int:
        """Of the matrix products of a forward."""
        return 4 * self.batch * self.tokens * self.channels * (self.token_hidden + self.channel_hidden)

    @property
    def activation_bytes(self) -> int:
        """Of one tensor of x's shape."""
        return self._itemsize * self.batch * self.tokens * self.channels

    @property
    def parameter_bytes(self) -> int:
        S, C, D, E = self.tokens, self.channels, self.token_hidden, self.channel_hidden
        return self._itemsize * (2 * S * D + S + D + 2 * C * E + C + E + 4 * C)

    @property
    def _itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize


@dataclass
class Subject:
    """The two blocks of a case, with the same weights, and inputs to rotate through.

    inputs: (N, B, S, C); where gradients are raced (N, 2, B, S, C): x and the gradient of the output.
    """

    eager: nn.Module
    fused: nn.Module
    inputs: Tensor


# A function that gets a Subject and returns the call to time.
Opponents = dict[str, Callable[[Subject], measure.Call]]


@dataclass(frozen=True)
class Race:
    """One direction: who races, and what any implementation must at least compute and move.

    opponents: by name. Those that start with "fused" must pass the parity gate.
    weigh: whose memory is measured, as calls that record no CUDA graph: a replay allocates nothing.
    products: matrix FLOPs, in forwards. activations, parameters: how often each is read or written.
    """

    kind: str
    trains: bool
    opponents: Opponents
    products: int
    activations: int
    parameters: int
    formulas: dict[str, str]
    weigh: Opponents = field(default_factory=dict)

    def flops(self, case: Case) -> int:
        return self.products * case.flops

    def bytes(self, case: Case) -> int:
        return self.activations * case.activation_bytes + self.parameters * case.parameter_bytes

    def call(self, block: nn.Module) -> measure.Call:
        """What is timed of an eager block."""
        return training_step(block) if self.trains else block


def make_cases(models: Iterable[str], batches: Iterable[int], dtype: str) -> list[Case]:
    """The block of every model (a key of ``fastmixer.model.MODELS``, or "B/16") at every batch.

    Raises ValueError for an unknown model, with the nearest known ones.
    """
    found = []
    batches = tuple(batches)
    for name in models:
        name = ALIASES.get(name, name)
        if name not in MODELS:
            raise ValueError(f"models: unknown model {name!r}; {did_you_mean(name, [*MODELS, *ALIASES])}")
        config = MODELS[name]
        tokens, channels = (224 // config.patch_size) ** 2, config.embed_dim
        found += [
            Case(name, batch, dtype, tokens, channels, channels // 2, 4 * channels) for batch in batches
        ]
    return found


def make_subject(case: Case, race: Race, device: torch.device) -> Subject:
    """timm's block with random weights, biases and norms, a fused copy, and enough inputs to be L2-cold."""
    from timm.models.mlp_mixer import MixerBlock

    dtype = getattr(torch, case.dtype)
    ratios = case.token_hidden / case.channels, case.channel_hidden / case.channels
    eager = MixerBlock(case.channels, case.tokens, mlp_ratio=ratios)
    verify.randomise(eager)
    eager = eager.to(device, dtype).train(race.trains)
    fused = copy.deepcopy(eager)
    fastmixer.fuse(fused, strict=True)
    shape = (2,) * race.trains + (case.batch, case.tokens, case.channels)
    copies = measure.cold_copies(math.prod(shape) * dtype.itemsize, device)
    return Subject(eager, fused, torch.randn(copies, *shape, device=device, dtype=dtype))


# ---- calls -----------------------------------------------------------------------------------------------


def training_step(
    block: nn.Module, parameters_of: nn.Module | None = None, memory: str = "balanced"
) -> measure.Call:
    """A forward and a backward of ``block``: (2, B, S, C) -> the output and every gradient by name.

    x is the first of the two and the gradient of the output the second. The parameters' ``grad`` is None
    before and after, so that calls are alike and keep nothing.

    Args:
        block: what is called with x.
        parameters_of: the module that has the parameters; block by default.
        memory: what ``fastmixer.memory`` is told.
    """
    parameters = dict((parameters_of or block).named_parameters())

    def call(pair: Tensor) -> dict[str, Tensor]:
        x, given = pair
        x = x.detach().requires_grad_()
        with fastmixer.memory(memory):
            output = block(x)
            torch.autograd.backward(output, given)
        answers = {"output": output.detach(), "x": x.grad}
        for name, parameter in parameters.items():
            answers[name], parameter.grad = parameter.grad, None
        return answers

    return call


def _compiled(mode: str, trains: bool) -> Callable[[Subject], measure.Call]:
    def make(subject: Subject) -> measure.Call:
        torch._dynamo.reset()  # else the limit on recompilations is reached after a few shapes
        block = torch.compile(subject.eager, mode=mode, dynamic=False)
        return training_step(block, subject.eager) if trains else block

    return make


def _step_of_fused(memory: str) -> Callable[[Subject], measure.Call]:
    """With packed weights made anew, as in training, where every step changes the weights."""

    def make(subject: Subject) -> measure.Call:
        step = training_step(subject.fused, memory=memory)

        def call(pair: Tensor) -> dict[str, Tensor]:
            subject.fused.forward.clear()
            return step(pair)

        return call

    return make


FORMULAS = {
    "floor_ms": "max(flops / product_tflop_per_s, bytes / copy_gb_per_s), with the ceilings of this file",
    "ratios": "median of the one divided by median of the other: above 1 the second is faster",
    "parity": "err = ||a - truth|| / ||truth|| with an fp64 truth; err_fused <= 1.25 err_eager + 8 eps, "
    "max_fused <= 2 max_eager + 16 eps max |truth|",
}
FORWARD = Race(
    kind="blocks-forward",
    trains=False,
    opponents={
        "eager": lambda subject: subject.eager,
        "compile": _compiled("max-autotune", trains=False),
        "fused": lambda subject: subject.fused,
        "fused_graph": lambda subject: measure.graphed(subject.fused, subject.inputs[0]),
    },
    products=1,
    activations=2,
    parameters=1,
    formulas={
        **FORMULAS,
        "flops": "4 * batch * tokens * channels * (token_hidden + channel_hidden)",
        "bytes": "itemsize * (2 * batch * tokens * channels + parameters): x, weights read once, y written "
        "once",
    },
)
BACKWARD = Race(
    kind="blocks-forward-backward",
    trains=True,
    opponents={
        "eager": lambda subject: training_step(subject.eager),
        "compile": _compiled("max-autotune", trains=True),
        "fused": _step_of_fused("balanced"),
        "fused_lean": _step_of_fused("lean"),
        "fused_graph": lambda subject: measure.graphed(
            _step_of_fused("balanced")(subject), subject.inputs[0]
        ),
    },
    weigh={
        "eager": lambda subject: training_step(subject.eager),
        "compile": _compiled("max-autotune-no-cudagraphs", trains=True),
        "fused": _step_of_fused("balanced"),
        "fused_lean": _step_of_fused("lean"),
    },
    products=3,
    activations=5,
    parameters=3,
    formulas={
        **FORMULAS,
        "flops": "3 * the forward's 4 * batch * tokens * channels * (token_hidden + channel_hidden): each "
        "product of the forward has two in the backward; recomputed products do not count as work done",
        "bytes": "itemsize * (5 * batch * tokens * channels + 3 * parameters). Forward: x and weights read, "
        "y written. Backward: it starts when all of y exists, and x and weights do not stay on the chip so "
        "long, so they are read again; the gradient of y read, those of x and the weights written",
        "parity": FORMULAS["parity"] + "; for the output and each gradient on its own; the figures are those "
        "of the tensor nearest its bound, the ratios err_fused / err_eager of all",
        "peak_bytes": "max_memory_allocated during one forward and backward after a warm-up, minus what was "
        "allocated before: what is kept for the backward, temporaries, y and the gradients; not x, the "
        "gradient of y, the weights and packed copies of them. compile is measured without CUDA graphs",
    },
)


# ---- the gate --------------------------------------------------------------------------------------------


def gate(subject: Subject, race: Race, call: measure.Call) -> dict[str, parity.Parity]:
    """The parity of all that ``call`` returns, by name, against the eager block, upcast to fp64.

    Every check draws an input of its own, so that a right answer to an earlier one, left in reused memory,
    cannot pass for an element that was never written.
    """
    given = torch.randn_like(subject.inputs[0])
    # Cloned, because the memory of a CUDA graph's answers is written by its next replay.
    fused = {name: tensor.clone() for name, tensor in _named(call(given)).items()}
    eager = _named(race.call(subject.eager)(given))
    truth = _truth(race.call(copy.deepcopy(subject.eager).double()), given)
    accumulate = parity.accumulate_dtype(given.dtype)
    return {name: parity.compare(fused[name], eager[name], truth[name], accumulate) for name in truth}


def _named(answer: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
    return {"output": answer} if isinstance(answer, Tensor) else answer


def _truth(exact: measure.Call, given: Tensor) -> dict[str, Tensor]:
    """What the fp64 block answers, a few samples at a time: parameters' gradients are sums over samples."""
    pieces: dict[str, list[Tensor]] = {"output": [], "x": []}
    sums: dict[str, Tensor] = {}
    for part in given.split(TRUTH_SAMPLES, dim=-3):
        for name, tensor in _named(exact(part.double())).items():
            if name in pieces:
                pieces[name].append(tensor)
            else:
                sums[name] = sums[name] + tensor if name in sums else tensor
    return {name: torch.cat(tensors) for name, tensors in pieces.items() if tensors} | sums

"""One op in its real launcher: what is compiled (on meta tensors), checked and timed (on a device).

The launchers run as they do for a model, but for the one op's choice. So buffers, strides, padding and the
constants that a kernel is compiled with are those of the real thing.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmixer import parity, reference
from fastmixer.configs import Choice, Library, Problem, Target
from fastmixer.configs.ops import OPS, OUTPUTS, half_of
from fastmixer.configs.predict.cost import Select
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import channel_mixing, launch, token_mixing
from fastmixer.ops.launch import Call, Context, Launch
from fastmixer.ops.layer_norm import dense
from fastmixer.ops.layouts import Kept
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import MixingParams, Needs

TRUTH_SAMPLES = 16  # the fp64 truth is computed so many samples at a time, to bound its memory
PER_SAMPLE = ("output", "norm", "x")  # answers with a batch axis; the others are sums over samples


class Rejected(RuntimeError):
    """A choice fails, and the reason is its own."""


def poison(item: Launch) -> None:
    """Fills what the launch writes and does not read with NaN."""
    tensors = {name: t for name in item.args if (t := item.tensor(name)) is not None}
    outputs = {name for name in OUTPUTS.get(item.kernel_name, ()) if name in tensors}
    read = {tensor.data_ptr() for name, tensor in tensors.items() if name not in outputs}
    for name in outputs:
        if tensors[name].data_ptr() not in read:
            tensors[name].fill_(float("nan"))


class Trial:
    """One op and problem with random parameters and inputs, and ``copies`` of those to rotate through.

    On the device "meta" launches are recorded only. ``select`` chooses what all other ops run with.
    """

    def __init__(
        self, op: str, problem: Problem, target: Target, device: torch.device, select: Select, copies: int = 1
    ) -> None:
        self.op, self.problem, self.device = op, problem, device
        self.half = half_of(op)
        self._reference = reference.token_mixing if self.half == "token" else reference.channel_mixing
        self.backward = op in OPS and OPS[op].direction == "backward"
        on_meta = device.type == "meta"
        execute = (lambda item: None) if on_meta else launch.execute
        self._context = Context(target, Kept(), select, execute)  # kept: the parameters never change
        self._generator = None if on_meta else torch.Generator(device).manual_seed(0)
        width = problem.tokens if self.half == "token" else problem.channels
        self.params = self._random_params(width, problem.hidden)
        before = self._random_params(problem.tokens, max(16, problem.channels // 2))
        with torch.no_grad():
            self.inputs = [self._random_inputs(before) for _ in range(copies)]

    def _random(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Of x's dtype: autocast has the parameters in it too, beside an fp32 x."""
        dtype = self.problem.x_dtype
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self._generator) * scale

    def _random_params(self, width: int, hidden: int) -> MixingParams:
        return MixingParams(
            1 + self._random(self.problem.channels, scale=0.3),
            self._random(self.problem.channels, scale=0.3),
            self._random(hidden, width, scale=width**-0.5),
            self._random(hidden, scale=0.3),
            self._random(width, hidden, scale=hidden**-0.5),
            self._random(width, scale=0.3),
            approximate=self.problem.approximate,
        )

    def _random_inputs(self, before: MixingParams) -> tuple[Tensor | None, ...]:
        """x, its moments as the launch before leaves them, and for the backward g and the kept p."""
        B, S, C, hidden, _, dtype = self.problem[:6]
        x = self._random(B, S, C) + self._random(B, S, 1)
        moments = g = p = None
        if self.half == "channel":  # x is what the token half returns, in as many blocks of moments
            x, moments = token_mixing.forward(x, before, dtype, self._context)
        elif self.backward:
            moments = row_moments(x, self._context)
        if self.backward:
            g = self._random(B, S, C)
        if self.op == "channel_mlp_hidden_bwd":
            p = launch.empty_hidden(B * S, hidden, dtype, self.device)
            channel_mixing.forward(x, self.params, dtype, self._context, moments, p=p)
        return x, moments, g, p

    def run(
        self, choice: Choice, copy: int = 0, before: Callable[[Launch], None] = lambda item: None
    ) -> dict[str, Tensor]:
        """What the op's half answers with ``choice`` for the op; ``before`` is called with every launch."""
        x, moments, g, p = self.inputs[copy]
        if choice is Library.REFERENCE:
            with torch.no_grad(), self._autocast():
                return {"output": self._reference(x, **self.params._asdict())}

        def choose(op: str, problem: Problem, target: Target) -> Choice:
            return choice if op == self.op else self._context.choose(op, problem, target)

        def execute(item: Launch) -> None:
            before(item)
            self._context.execute(item)

        overwrite = self.op == "channel_fc2"
        if overwrite:
            # In a block x is the token half's and may be overwritten, which is what ADDMM gains by. It reads
            # x too: in the same one again and again values would grow. So every choice gets a copy.
            x = x.clone()
        half = self.params, self.problem.dtype, replace(self._context, choose=choose, execute=execute)
        needs = Needs(*[True] * 7)
        with torch.no_grad():
            if self.backward and self.half == "channel":
                return channel_mixing.backward(g, x, moments, *half, needs, p=p)
            if self.backward:
                return token_mixing.backward(g, x, moments, *half, needs)
            if self.half == "channel":
                return {"output": channel_mixing.forward(x, *half, moments, overwrite=overwrite)}
            return dict(zip(("output", "moments"), token_mixing.forward(x, *half, moments), strict=True))

    def own_launch(self, choice: Choice, copy: int = 0) -> Launch:
        """The op's own launch, after it has run; RuntimeError where its launcher launches no such kernel."""
        own: list[Launch] = []
        kernel = OPS[self.op].kernel
        self.run(choice, copy, lambda item: own.append(item) if item.kernel_name == kernel else None)
        if not own:
            raise RuntimeError(f"op {self.op}: its launcher did not launch the kernel {kernel}")
        return own[-1] if self.op == "token_wgrad_fc2" else own[0]  # fc1's is launched before it

    def calls(self, choice: Choice, timed: str) -> list[Callable[[], object]]:
        """What to time, one call per copy of the inputs; ``timed`` as ``timed_as`` says."""
        copies = range(len(self.inputs))
        if timed == "half":
            return [functools.partial(self.run, choice, copy) for copy in copies]
        launches = [self.own_launch(choice, copy) for copy in copies]
        return [functools.partial(self._context.execute, item) for item in launches]

    def check(self, choice: Choice) -> float:
        """Parity of all that the op's half answers: the largest error as a multiple of eager's.

        Outputs hold NaN before kernels run, so that what nobody wrote is seen. Raises Rejected if it fails.
        """
        answers = self.run(choice, before=poison)
        if "moments" in answers:  # what they are for: the next half's LayerNorm
            y, moments = answers["output"], answers.pop("moments")
            with torch.no_grad():
                call = Call(self.half, self.params, self.problem, self._context)
                answers["norm"] = dense(call, y, moments=moments)
        accumulate = accumulate_dtype(self.problem.dtype)
        results = {name: parity.compare(t, *self.expected[name], accumulate) for name, t in answers.items()}
        failed = [f"{name}: {result}" for name, result in results.items() if not result.ok]
        if failed:
            raise Rejected(f"fails parity: {'; '.join(failed)}")
        return max(result.ratio for result in results.values())

    @functools.cached_property
    def expected(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, what eager answers and the fp64 truth, computed a few samples at a time."""
        x, _, g, _ = self.inputs[0]
        given = [x] if g is None else [x, g]
        with self._autocast():
            eager = self._answers(self.params, self.problem.dtype, *given)
        exact = MixingParams(*(tensor.double() for tensor in self.params[:6]))
        chunks = zip(*(tensor.split(TRUTH_SAMPLES) for tensor in given), strict=True)
        parts = [self._answers(exact, torch.float64, *(t.double() for t in chunk)) for chunk in chunks]
        truth = {name: [part[name] for part in parts] for name in eager}
        return {
            name: (eager[name], torch.cat(pieces) if name in PER_SAMPLE else sum(pieces))
            for name, pieces in truth.items()
        }

    def _answers(
        self, params: MixingParams, dtype: torch.dtype, x: Tensor, g: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The reference's answers with products in ``dtype``, by the names that ``check`` compares."""
        if g is not None:
            leaves = [tensor.detach().requires_grad_() for tensor in (x, *params[:6])]
            gradients = torch.autograd.grad(self._reference(*leaves), leaves, g)
            return dict(zip(Needs._fields, gradients, strict=True))
        with torch.no_grad():
            y = self._reference(x, **params._asdict())
            if self.half == "channel":
                return {"output": y}
            norm = F.layer_norm(y, y.shape[-1:], params.norm_weight, params.norm_bias, params.eps)
            return {"output": y, "norm": norm.to(dtype)}

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Autocast, where the products' dtype is not the parameters' own."""
        dtype = self.problem.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != self.problem.x_dtype)

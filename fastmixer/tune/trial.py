"""One op in its real launcher: what is compiled (on meta tensors), checked and timed (on a device).

The launchers run as they do for a model, but for the one op's choice. So buffers, strides, padding and the
constants that a kernel is compiled with are those of the real thing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmixer import parity, reference
from fastmixer.configs import Library, Problem, Target
from fastmixer.configs.ops import OPS, outputs_of
from fastmixer.configs.problem import Choice
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import channel_mixing, launch, token_mixing
from fastmixer.ops.launch import Context, Launch
from fastmixer.ops.layer_norm import dense
from fastmixer.ops.layouts import Kept
from fastmixer.ops.row_moments import row_moments
from fastmixer.params import MixingParams, Needs
from fastmixer.tune.loop import Verdict

TRUTH_SAMPLES = 16  # the fp64 truth is computed so many samples at a time, to bound its memory

Select = Callable[[str, Problem, Target], Choice]
Call = Callable[[], object]


def poison(item: Launch) -> None:
    """Fills what the launch writes and does not read with NaN."""
    kernel = next(name for name, kernel in vars(launch.kernels()).items() if kernel is item.kernel)
    names = outputs_of(kernel)
    read = {
        arg.data_ptr() for name, arg in item.args.items() if isinstance(arg, Tensor) and name not in names
    }
    for name in names:
        if item.args[name] is not None and item.args[name].data_ptr() not in read:
            item.args[name].fill_(float("nan"))


class Trial:
    """One op and problem with random parameters and inputs; ``select`` chooses for all other ops.

    Args:
        op, problem: as ``configs.select`` takes them.
        target: what is launched for.
        device: where the tensors are; on "meta" launches are recorded only.
        select: what all other ops run with.
        copies: of the inputs, to rotate through.
    """

    def __init__(
        self, op: str, problem: Problem, target: Target, device: torch.device, select: Select, copies: int = 1
    ) -> None:
        self.op, self.problem, self.target, self.device, self.select = op, problem, target, device, select
        self.half = "token" if op.startswith("token") else "channel"
        self.backward = op in OPS and OPS[op].direction == "backward"
        self._on_meta = device.type == "meta"
        self._generator = None if self._on_meta else torch.Generator(device).manual_seed(0)
        self.params = self._random_params(
            problem.tokens if self.half == "token" else problem.channels, problem.hidden
        )
        before = self._random_params(problem.tokens, max(16, problem.channels // 2))
        with torch.no_grad():
            self.inputs = [self._inputs(before) for _ in range(copies)]
        self._expected: dict[str, tuple[Tensor, Tensor]] = {}

    def _random(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self._generator) * scale

    def _random_params(self, width: int, hidden: int) -> MixingParams:
        """Parameters of x's dtype, as autocast has them beside an fp32 x."""
        dtype, C = self.problem.x_dtype, self.problem.channels
        return MixingParams(
            1 + self._random(C, dtype=dtype, scale=0.3),
            self._random(C, dtype=dtype, scale=0.3),
            self._random(hidden, width, dtype=dtype, scale=width**-0.5),
            self._random(hidden, dtype=dtype, scale=0.3),
            self._random(width, hidden, dtype=dtype, scale=hidden**-0.5),
            self._random(width, dtype=dtype, scale=0.3),
        )

    def _inputs(self, before: MixingParams) -> dict[str, Any]:
        """x, its moments as the launch before leaves them, and for the backward g and the kept p."""
        B, S, C, hidden, x_dtype, dtype = self.problem
        context = Context(self.target, None, self.select, self._execute)
        x = self._random(B, S, C, dtype=x_dtype) + self._random(B, S, 1, dtype=x_dtype)
        moments = None
        if self.half == "channel":  # x is what the token half returns, in as many blocks of moments
            x, moments = token_mixing.forward(x, before, dtype, context)
        elif self.backward:
            moments = row_moments(x, context)
        found = {"x": x, "moments": moments, "g": None, "p": None}
        if self.backward:
            found["g"] = self._random(B, S, C, dtype=x_dtype)
        if self.op == "channel_mlp_hidden_bwd":
            found["p"] = launch.empty_hidden(B * S, hidden, dtype, self.device)
            channel_mixing.forward(x, self.params, dtype, context, moments, p=found["p"])
        return found

    def _execute(self, item: Launch) -> None:
        if not self._on_meta:
            launch.execute(item)

    # ---- running ------------------------------------------------------------------------------------------

    def run(
        self,
        choice: Choice,
        copy: int = 0,
        before: Callable[[Launch], None] = lambda item: None,
        kept: Kept | None = None,
    ) -> dict[str, Tensor]:
        """What the op's half answers with ``choice`` for the op; ``before`` is called with every launch."""
        given, dtype = self.inputs[copy], self.problem.dtype
        x, moments = given["x"], given["moments"]
        if choice is Library.REFERENCE:
            with torch.no_grad(), self._autocast():
                return {"output": self._mix(x, self.params)}

        def select(op: str, problem: Problem, target: Target) -> Choice:
            return choice if op == self.op else self.select(op, problem, target)

        def execute(item: Launch) -> None:
            before(item)
            self._execute(item)

        context = Context(self.target, kept, select, execute)
        with torch.no_grad():
            if self.backward:
                needs = Needs(*[True] * 7)
                arguments = given["g"], x, moments, self.params, dtype, context, needs
                if self.half == "token":
                    return token_mixing.backward(*arguments)
                return channel_mixing.backward(*arguments, p=given["p"])
            if self.half == "channel":
                return {"output": channel_mixing.forward(x, self.params, dtype, context, moments)}
            y, y_moments = token_mixing.forward(x, self.params, dtype, context, moments)
            return {"output": y, "moments": y_moments}

    def launches(self, choice: Choice, copy: int = 0, kept: Kept | None = None) -> list[Launch]:
        """The op's own launches, after they have run.

        Raises:
            RuntimeError: its launcher does not launch its kernel.
        """
        found: list[Launch] = []
        self.run(choice, copy, lambda item: found.append(item) if self._is_mine(item) else None, kept)
        if not found:
            raise RuntimeError(f"op {self.op}: its launcher did not launch the kernel {OPS[self.op].kernel}")
        return found

    def _is_mine(self, item: Launch) -> bool:
        if item.kernel is not getattr(launch.kernels(), OPS[self.op].kernel):
            return False
        if self.op.startswith("token_wgrad") and not self.op.endswith("fc1"):
            return item.args["dw1_ptr"] is None
        return not self.op.startswith("token_wgrad") or item.args["dw1_ptr"] is not None

    def calls(self, choice: Choice, timed: str) -> list[Call]:
        """What to time, one call a copy of the inputs; ``timed`` as ``loop.timed_as`` says."""
        kept = Kept()  # of weights that never change
        copies = range(len(self.inputs))
        if timed == "kernel":
            recorded = [self.launches(choice, copy, kept) for copy in copies]
            return [lambda mine=mine: [self._execute(item) for item in mine] for mine in recorded]
        return [lambda copy=copy: self.run(choice, copy, kept=kept) for copy in copies]

    # ---- the gate -----------------------------------------------------------------------------------------

    def check(self, choice: Choice) -> Verdict:
        """Parity of all that the op's half answers, against eager with the fp64 truth.

        What kernels write holds NaN before they run, so that an element nobody wrote is seen.
        """
        answers = self.run(choice, before=poison)
        if "moments" in answers:  # what they are for: the next half's LayerNorm
            context = Context(self.target, None, self.select, self._execute)
            moments = answers.pop("moments")
            with torch.no_grad():
                norm = dense(answers["output"], self.problem, context, params=self.params, moments=moments)
            answers["norm"] = norm
        accumulate = accumulate_dtype(self.problem.dtype)
        found = {
            name: parity.compare(answer, *self.expected()[name], accumulate)
            for name, answer in answers.items()
        }
        failed = [f"{name}: {verdict}" for name, verdict in found.items() if not verdict.ok]
        return Verdict(not failed, max(verdict.ratio for verdict in found.values()), "; ".join(failed))

    def expected(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By name, what eager answers and the truth; computed once."""
        if not self._expected:
            given = self.inputs[0]
            with self._autocast():
                eager = self._answers(given["x"], given["g"], self.params)
            truth = self._truth(given["x"], given["g"])
            self._expected = {name: (eager[name], truth[name]) for name in truth}
        return self._expected

    def _truth(self, x: Tensor, g: Tensor | None) -> dict[str, Tensor]:
        """The reference in fp64, a few samples at a time: parameters' gradients are sums over samples."""
        exact = MixingParams(*(t.double() for t in self.params[:6]), *self.params[6:])
        pieces: dict[str, list[Tensor]] = {}
        for start in range(0, x.shape[0], TRUTH_SAMPLES):
            part = slice(start, start + TRUTH_SAMPLES)
            answers = self._answers(x[part].double(), None if g is None else g[part].double(), exact)
            for name, answer in answers.items():
                pieces.setdefault(name, []).append(answer)
        by_sample = ("output", "norm", "x")
        return {n: torch.cat(parts) if n in by_sample else sum(parts) for n, parts in pieces.items()}

    def _answers(self, x: Tensor, g: Tensor | None, params: MixingParams) -> dict[str, Tensor]:
        """The reference's answers, by the names that ``check`` compares."""
        if g is None:
            with torch.no_grad():
                y = self._mix(x, params)
                if self.half == "channel":
                    return {"output": y}
                norm = F.layer_norm(y, y.shape[-1:], params.norm_weight, params.norm_bias, params.eps)
                return {
                    "output": y,
                    "norm": norm if x.dtype == torch.float64 else norm.to(self.problem.dtype),
                }
        leaves = [t.detach().requires_grad_() for t in (x, *params[:6])]
        with torch.enable_grad():
            y = self._mix(leaves[0], MixingParams(*leaves[1:], *params[6:]))
        found = torch.autograd.grad(y, leaves, g)
        return dict(zip(Needs._fields, found, strict=True))

    def _mix(self, x: Tensor, params: MixingParams) -> Tensor:
        mixing = reference.token_mixing if self.half == "token" else reference.channel_mixing
        return mixing(x, **params._asdict())

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Autocast, where the products' dtype is not the parameters' own."""
        dtype = self.problem.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != self.problem.x_dtype)

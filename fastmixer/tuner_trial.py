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

from . import launch, launch_backward, launch_forward, parity, reference
from .configs import Library, Problem, Target
from .configs.tiles import Choice
from .half import Half
from .launch import Context, Launch
from .launch_norm import dense
from .packing import Kept
from .tuner import Verdict
from .tuner_cases import BACKWARD

TRUTH_SAMPLES = 16  # the fp64 truth is computed so many samples at a time, to bound its memory

Select = Callable[[str, Problem, Target], Choice]
Call = Callable[[], object]

# op: its kernel in launch.kernels().
KERNELS = {
    "channel_fc1": "fc1",
    "channel_fc2": "fc2",
    "token_mixing": "token_mixing",
    "token_fc1": "fc1",
    "token_fc2": "fc2",
    "channel_mlp_hidden_bwd": "mlp_hidden_bwd",
    "channel_mlp_hidden_bwd_recompute": "mlp_hidden_bwd",
    "token_mlp_hidden_bwd_recompute": "mlp_hidden_bwd",
    "token_dgrad": "token_dgrad",
    "token_wgrad_fc1": "token_wgrad",
    "token_wgrad_fc2": "token_wgrad",
}
# What a kernel writes and does not read.
OUTPUTS = {
    "fc1": ("g_ptr", "p_ptr"),
    "fc2": ("y_ptr", "y_moments_ptr"),
    "token_mixing": ("y_ptr", "y_moments_ptr"),
    "mlp_hidden_bwd": ("hidden_ptr", "dhidden_ptr", "db1_ptr"),
    "token_dgrad": ("dn_ptr",),
    "token_wgrad": ("dw1_ptr", "db1_ptr", "dw2_ptr"),
    "gelu_fwd": ("g_ptr",),  # may be p
    "residual_fwd": ("y_ptr",),  # may be o
}


def poison(item: Launch) -> None:
    """Fills what the launch writes and does not read with NaN."""
    names = next((OUTPUTS[k] for k in OUTPUTS if getattr(launch.kernels(), k) is item.kernel), ())
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
        self.of = "token" if op.startswith("token") else "channel"
        self.backward = op in BACKWARD
        self._on_meta = device.type == "meta"
        self._generator = None if self._on_meta else torch.Generator(device).manual_seed(0)
        self.half = self._random_half(
            problem.tokens if self.of == "token" else problem.channels, problem.hidden
        )
        before = self._random_half(problem.tokens, max(16, problem.channels // 2))
        with torch.no_grad():
            self.inputs = [self._inputs(before) for _ in range(copies)]
        self._expected: dict[str, tuple[Tensor, Tensor]] = {}

    def _random(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device, generator=self._generator) * scale

    def _random_half(self, width: int, hidden: int) -> Half:
        """Parameters of x's dtype, as autocast has them beside an fp32 x."""
        dtype, C = self.problem.x_dtype, self.problem.channels
        return Half(
            1 + self._random(C, dtype=dtype, scale=0.3),
            self._random(C, dtype=dtype, scale=0.3),
            self._random(hidden, width, dtype=dtype, scale=width**-0.5),
            self._random(hidden, dtype=dtype, scale=0.3),
            self._random(width, hidden, dtype=dtype, scale=hidden**-0.5),
            self._random(width, dtype=dtype, scale=0.3),
        )

    def _inputs(self, before: Half) -> dict[str, Any]:
        """x, its moments as the launch before leaves them, and for the backward g and the kept p."""
        B, S, C, hidden, x_dtype, dtype = self.problem
        context = Context(self.target, None, self.select, self._execute)
        x = self._random(B, S, C, dtype=x_dtype) + self._random(B, S, 1, dtype=x_dtype)
        moments = None
        if self.of == "channel":  # x is what the token half returns, in as many blocks of moments
            x, moments = launch_forward.token_mixing(x, before, dtype, context)
        elif self.backward:
            moments = launch.row_moments(x, context)
        found = {"x": x, "moments": moments, "g": None, "p": None}
        if self.backward:
            found["g"] = self._random(B, S, C, dtype=x_dtype)
        if self.op == "channel_mlp_hidden_bwd":
            found["p"] = launch.empty_hidden(B * S, hidden, dtype, self.device)
            launch_forward.channel_mixing(x, self.half, dtype, context, moments, p=found["p"])
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
                return {"output": self._mix(x, self.half)}

        def select(op: str, problem: Problem, target: Target) -> Choice:
            return choice if op == self.op else self.select(op, problem, target)

        def execute(item: Launch) -> None:
            before(item)
            self._execute(item)

        context = Context(self.target, kept, select, execute)
        with torch.no_grad():
            if self.backward:
                needs = launch_backward.Needs(*[True] * 7)
                arguments = given["g"], x, moments, self.half, dtype, context, needs
                if self.of == "token":
                    return launch_backward.token_mixing(*arguments)
                return launch_backward.channel_mixing(*arguments, p=given["p"])
            if self.of == "channel":
                return {"output": launch_forward.channel_mixing(x, self.half, dtype, context, moments)}
            y, y_moments = launch_forward.token_mixing(x, self.half, dtype, context, moments)
            return {"output": y, "moments": y_moments}

    def launches(self, choice: Choice, copy: int = 0, kept: Kept | None = None) -> list[Launch]:
        """The op's own launches, after they have run.

        Raises:
            RuntimeError: its launcher does not launch its kernel.
        """
        found: list[Launch] = []
        self.run(choice, copy, lambda item: found.append(item) if self._is_mine(item) else None, kept)
        if not found:
            raise RuntimeError(f"op {self.op}: its launcher did not launch the kernel {KERNELS[self.op]}")
        return found

    def _is_mine(self, item: Launch) -> bool:
        if item.kernel is not getattr(launch.kernels(), KERNELS[self.op]):
            return False
        if self.op.startswith("token_wgrad") and not self.op.endswith("fc1"):
            return item.args["dw1_ptr"] is None
        return not self.op.startswith("token_wgrad") or item.args["dw1_ptr"] is not None

    def calls(self, choice: Choice, timed: str) -> list[Call]:
        """What to time, one call a copy of the inputs; ``timed`` as ``tuner.timed_as`` says."""
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
                norm = dense(answers["output"], self.problem, context, half=self.half, moments=moments)
            answers["norm"] = norm
        accumulate = parity.accumulate_dtype(self.problem.dtype)
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
                eager = self._answers(given["x"], given["g"], self.half)
            truth = self._truth(given["x"], given["g"])
            self._expected = {name: (eager[name], truth[name]) for name in truth}
        return self._expected

    def _truth(self, x: Tensor, g: Tensor | None) -> dict[str, Tensor]:
        """The reference in fp64, a few samples at a time: parameters' gradients are sums over samples."""
        exact = Half(*(t.double() for t in self.half[:6]), *self.half[6:])
        pieces: dict[str, list[Tensor]] = {}
        for start in range(0, x.shape[0], TRUTH_SAMPLES):
            part = slice(start, start + TRUTH_SAMPLES)
            answers = self._answers(x[part].double(), None if g is None else g[part].double(), exact)
            for name, answer in answers.items():
                pieces.setdefault(name, []).append(answer)
        by_sample = ("output", "norm", "x")
        return {n: torch.cat(parts) if n in by_sample else sum(parts) for n, parts in pieces.items()}

    def _answers(self, x: Tensor, g: Tensor | None, half: Half) -> dict[str, Tensor]:
        """The reference's answers, by the names that ``check`` compares."""
        if g is None:
            with torch.no_grad():
                y = self._mix(x, half)
                if self.of == "channel":
                    return {"output": y}
                norm = F.layer_norm(y, y.shape[-1:], half.norm_weight, half.norm_bias, half.eps)
                return {
                    "output": y,
                    "norm": norm if x.dtype == torch.float64 else norm.to(self.problem.dtype),
                }
        leaves = [t.detach().requires_grad_() for t in (x, *half[:6])]
        with torch.enable_grad():
            y = self._mix(leaves[0], Half(*leaves[1:], *half[6:]))
        found = torch.autograd.grad(y, leaves, g)
        return dict(zip(launch_backward.Needs._fields, found, strict=True))

    def _mix(self, x: Tensor, half: Half) -> Tensor:
        mixing = reference.token_mixing if self.of == "token" else reference.channel_mixing
        return mixing(x, **half._asdict())

    def _autocast(self) -> contextlib.AbstractContextManager:
        """Autocast, where the products' dtype is not the parameters' own."""
        dtype = self.problem.dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != self.problem.x_dtype)

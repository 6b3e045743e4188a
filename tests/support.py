"""Cases, inputs and the comparison that the kernel tests share."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmixer import parity, reference
from fastmixer.configs import (
    INTERPRETER,
    ONE_PASS,
    TARGETS,
    Choice,
    Library,
    Problem,
    Target,
    TileConfig,
    select_kernels,
    target_of,
)
from fastmixer.configs.tiles import token_pieces
from fastmixer.dtypes import accumulate_dtype
from fastmixer.ops import autograd, launch
from fastmixer.params import MixingParams


@dataclass(frozen=True)
class Case:
    """One block to compare: B samples, S tokens, C channels, D and E hidden units, and how it is given."""

    B: int
    S: int
    C: int
    D: int
    E: int
    dtype: torch.dtype = torch.bfloat16  # of the products
    x_dtype: torch.dtype | None = None  # None: dtype
    norm_dtype: torch.dtype | None = None  # None: x_dtype
    weight_dtype: torch.dtype | None = None  # None: dtype; another one means autocast
    layout: str = "contiguous"
    biases: tuple[bool, ...] = (True, True, True, True)  # norm weight, norm bias, fc1 bias, fc2 bias
    approximate: str = "none"
    eps: float = 1e-6
    scale: str = "none"
    std: float = 1.0  # of x; the branch is of the size of 1
    mean: float = 0.0  # of each row, in standard deviations
    outliers: int = 0  # channels that are 30 times as large
    tiles: TileConfig | None = None  # for every product; None: the default for the device
    one_pass: bool | None = None  # None: as select decides
    g_layout: str = "contiguous"  # of the output's gradient
    lean: bool = False
    seed: int = field(default=0, compare=False)


def make_x(case: Case, generator: torch.Generator) -> Tensor:
    """x (B, S, C) in the case's layout, on the CPU."""
    B, S, C = case.B, case.S, case.C
    dtype = case.x_dtype or case.dtype
    x = torch.randn(B, S, C, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (B, S, 1), generator=generator) * 2 - 1
    x = x + case.mean * sign
    if case.outliers:
        x[..., torch.randperm(C, generator=generator)[: case.outliers]] *= 30
    return laid_out((x * case.std).to(dtype), case.layout)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of x (B, S, C) in another layout; an expanded one repeats the first of them."""
    B, S, C = x.shape
    if layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "batch last":
        return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if layout == "channel slice":
        return torch.cat([x, x, x], dim=2)[..., C : 2 * C]
    if layout == "token slice":
        return torch.cat([x, x], dim=1)[:, S:]
    if layout == "strided channels":
        return x.repeat_interleave(2, dim=2)[..., ::2]
    if layout == "expanded" and B:
        return x[:1].expand(B, S, C)
    if layout == "expanded everywhere" and B:  # the gradient of a sum
        one = x[:1, :1, :1]
        # At least 1: where draws are pooled, a few large numbers would make all of the largest error.
        return (one.sign() * (1 + one.abs() % 1)).expand(B, S, C)
    return x


LAYOUTS = (
    "contiguous",
    "transposed",
    "batch last",
    "channel slice",
    "token slice",
    "strided channels",
    "expanded",
)
SCALES = ("none", "float", "scalar", "vector", "column")


def make_half(case: Case, mixes: str, generator: torch.Generator) -> MixingParams:
    """Random parameters of one half, none of them trivial, on the CPU."""
    width, hidden = (case.S, case.D) if mixes == "tokens" else (case.C, case.E)

    def random(
        *shape: int, scale: float = 1.0, dtype: torch.dtype = case.weight_dtype or case.dtype
    ) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(dtype)

    norm = case.norm_dtype or case.x_dtype or case.dtype
    has = case.biases
    gamma = (1 + 0.3 * torch.randn(case.C, generator=generator, dtype=torch.float64)).to(norm)
    scale = {
        "none": None,
        "float": 0.75,
        "scalar": torch.tensor(1.25),
        "vector": torch.rand(case.B, generator=generator) * 2,
        "column": (torch.rand(case.B, 1, 1, generator=generator) > 0.4).float() / 0.6,
    }[case.scale]
    return MixingParams(
        gamma if has[0] else None,
        random(case.C, scale=0.3, dtype=norm) if has[1] else None,
        random(hidden, width, scale=width**-0.5),
        random(hidden, scale=0.3) if has[2] else None,
        random(width, hidden, scale=hidden**-0.5),
        random(width, scale=0.3) if has[3] else None,
        case.eps,
        case.approximate,
        scale,
    )


def block_inputs(case: Case) -> tuple[Tensor, dict[str, MixingParams], Tensor]:
    """x, both halves by name and an output gradient, on the CPU."""
    generator = torch.Generator().manual_seed(case.seed)
    x = make_x(case, generator)
    halves = {half: make_half(case, f"{half}s", generator) for half in ("token", "channel")}
    g = torch.randn(x.shape, generator=generator).to(x.dtype)
    return x, halves, laid_out(g, case.g_layout)


def moved(params: MixingParams, to: torch.device | torch.dtype) -> MixingParams:
    """The half with all its tensors moved or cast."""
    return MixingParams(*(t.to(to) if isinstance(t, Tensor) else t for t in params))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fills every uninitialised allocation with NaN, so that an element nobody wrote is caught."""
    torch.use_deterministic_algorithms(
        True
    )  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SHARED_MEMORY = TARGETS["sm_80"].shared_memory  # the least of the GPUs of data centers with CUDA


def fitting(tiles: TileConfig, problem: Problem) -> TileConfig:
    """Tiles of a one-pass kernel, with fewer stages and then halved until SHARED_MEMORY holds a program.

    For every device alike, so that the interpreter tests what a GPU runs. A stage holds two operands of the
    smaller edge by all tokens, and at most two of the larger one stay: no less than compiled code asks for.
    """
    row = 2 * sum(token_pieces(problem.tokens)) * problem.dtype.itemsize
    m, n, stages = tiles.block_m, tiles.block_n, tiles.num_stages
    while row * (stages * min(m, n) + max(m, n)) + 4 * m * n > SHARED_MEMORY:
        if stages > 1:
            stages -= 1
        else:
            m, n = (m // 2, n) if m > n else (m, n // 2)
    return dataclasses.replace(tiles, block_m=m, block_n=n, num_stages=stages)


A100 = Target("cuda", 80, 3, 163 * 1024)  # dW1 and dW2 take a launch each beyond 64 tokens


def with_sms(count: int) -> Target:
    """The interpreter's target with so many SMs, which decide how sums over samples are split."""
    return dataclasses.replace(INTERPRETER, multiprocessors=count)


def context_of(case: Case, device: torch.device) -> launch.Context:
    """The launch context with the case's tiles and design."""

    def choose(op: str, problem: Problem, target: Target) -> TileConfig | None:
        one_pass = op in ONE_PASS
        if one_pass and (case.one_pass is False or select_kernels(op, problem, target) is None):
            return None
        if op == "layer_norm_bwd" and case.tiles:  # its tiles hold whole rows
            return dataclasses.replace(select_kernels(op, problem, target), block_m=case.tiles.block_m // 4)
        if one_pass and case.tiles:
            return fitting(case.tiles, problem)
        return case.tiles or select_kernels(op, problem, target)

    return launch.Context(target_of(device), choose=choose)


def with_library(context: launch.Context, choices: dict[str, Library]) -> launch.Context:
    """The context with a library in place of the tiles of some ops."""

    def choose(op: str, problem: Problem, target: Target) -> Choice:
        return choices[op] if op in choices else context.choose(op, problem, target)

    return dataclasses.replace(context, choose=choose)


def _fused(
    part: str,
    x: Tensor,
    token: MixingParams,
    channel: MixingParams,
    context: launch.Context,
    dtype: torch.dtype,
) -> Tensor:
    halves = {"token": token, "channel": channel}
    return autograd.mix(x, {half: halves[half] for half in HALVES[part]}, dtype, context)


def _eager(part: str, x: Tensor, token: MixingParams, channel: MixingParams) -> Tensor:
    if part == "token":
        return reference.token_mixing(x, **token._asdict())
    if part == "channel":
        return reference.channel_mixing(x, **channel._asdict())
    return reference.mixer_block(x, token, channel)


def run_case(
    part: str,
    case: Case,
    device: torch.device,
    repeats: int = 1,
    *,
    context: launch.Context | None = None,
    bad_element: float | None = None,
) -> parity.Parity:
    """The parity of ``part`` ("token", "channel", "block"), pooled over ``repeats`` independent draws.

    Pooling gives tiny shapes enough elements for a relative error to mean something. ``context`` replaces
    the case's own; ``bad_element`` is put into the middle of x.
    """
    context = context or context_of(case, device)
    generator = torch.Generator().manual_seed(case.seed)
    fused, eager, truth = [], [], []
    with torch.no_grad():
        for _ in range(repeats):
            x = make_x(case, generator).to(device)
            if bad_element is not None:
                x[case.B // 2, case.S // 2, case.C // 2] = bad_element
            token, channel = (moved(make_half(case, m, generator), device) for m in ("tokens", "channels"))
            with poisoned():
                fused.append(_fused(part, x, token, channel, context, case.dtype))
            assert fused[-1].dtype == x.dtype and fused[-1].shape == x.shape
            eager.append(_eager(part, x, token, channel))
            exact = (moved(params, torch.float64) for params in (token, channel))
            truth.append(_eager(part, x.double(), *exact))
    together = (torch.stack(t).cpu() for t in (fused, eager, truth))
    return parity.compare(*together, accumulate_dtype(case.dtype))


# ---- gradients -------------------------------------------------------------------------------------------

HALVES = {"token": ("token",), "channel": ("channel",), "block": ("token", "channel")}


def leaves(x: Tensor, halves: dict[str, MixingParams]) -> dict[str, Tensor]:
    """x and the halves' parameters, by name: what gradients are asked of."""
    named = {f"{of}.{name}": t for of, params in halves.items() for name, t in params._asdict().items()}
    parameters = {
        name: t for name, t in named.items() if isinstance(t, Tensor) and not name.endswith("residual_scale")
    }
    return {"x": x, **parameters}


def gradients(
    run: Callable[[Tensor, dict[str, MixingParams]], Tensor],
    x: Tensor,
    halves: dict[str, MixingParams],
    g: Tensor,
) -> dict[str, Tensor]:
    """The gradients that ``run`` leaves at x and every parameter, for the output's gradient g."""
    asked = leaves(x, halves)
    for tensor in asked.values():
        tensor.requires_grad_()
    found = torch.autograd.grad(run(x, halves), list(asked.values()), g)
    return dict(zip(asked, found, strict=True))


def run_eager(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
    for of, params in halves.items():
        x = _eager(of, x, params, params)
    return x


def fused_run(case: Case, context: launch.Context) -> Callable[[Tensor, dict[str, MixingParams]], Tensor]:
    """The fused halves with gradients, launched in ``context``."""

    def run(x: Tensor, halves: dict[str, MixingParams]) -> Tensor:
        return autograd.mix(x, halves, case.dtype, context, lean=case.lean)

    return run


def run_gradients(
    part: str, case: Case, device: torch.device, repeats: int = 1, *, context: launch.Context | None = None
) -> dict[str, parity.Parity]:
    """The parity of every gradient of ``part``, by name, each pooled over ``repeats`` independent draws."""
    context = context or context_of(case, device)
    generator = torch.Generator().manual_seed(case.seed)
    found: list[list[dict[str, Tensor]]] = [[], [], []]
    under_autocast = torch.autocast(device.type, case.dtype, enabled=case.weight_dtype is not None)
    for _ in range(repeats):
        x = make_x(case, generator).to(device)
        halves = {
            of: moved(make_half(case, {"token": "tokens", "channel": "channels"}[of], generator), device)
            for of in HALVES[part]
        }
        g = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(device, x.dtype)
        g = laid_out(g, case.g_layout)

        def copies(dtype: torch.dtype | None = None, x: Tensor = x, halves: dict = halves) -> tuple:
            twins = {of: moved(params, dtype or params.fc1_weight.device) for of, params in halves.items()}
            twins = {of: MixingParams(*(_leaf(t) for t in params)) for of, params in twins.items()}
            return _leaf(x if dtype is None else x.to(dtype)), twins

        with poisoned():
            found[0].append(gradients(fused_run(case, context), *copies(), g))
        with under_autocast:
            found[1].append(gradients(run_eager, *copies(), g))
        found[2].append(gradients(run_eager, *copies(torch.float64), g.double()))
    accumulate = accumulate_dtype(case.dtype)
    results = {}
    for name in found[0][0]:
        fused, eager, truth = (torch.stack([draw[name] for draw in draws]).cpu() for draws in found)
        assert fused.dtype == eager.dtype, f"{name}: {fused.dtype}, eager {eager.dtype}"
        results[name] = parity.compare(fused, eager, truth, accumulate)
    return results


def assert_parity(results: dict[str, parity.Parity]) -> None:
    """Every gradient that ``run_gradients`` compared is within its bounds."""
    bad = {name: str(result) for name, result in results.items() if not result.ok}
    assert results and not bad, bad


def _leaf(value: object) -> object:
    """A tensor without history that shares its memory, so that the layout stays."""
    return value.detach() if isinstance(value, Tensor) else value

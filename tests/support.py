"""Cases, inputs and the comparison that the kernel tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastmixer import launch, parity, reference
from fastmixer.configs import Problem, Target, TileConfig, select, target_of
from fastmixer.half import Half


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
    layout: str = "contiguous"
    biases: tuple[bool, ...] = (True, True, True, True)  # norm weight, norm bias, fc1 bias, fc2 bias
    approximate: str = "none"
    eps: float = 1e-6
    scale: str = "none"
    mean: float = 0.0  # of each row, in standard deviations
    outlier: bool = False
    tiles: TileConfig | None = None  # for every product; None: the default for the device
    one_pass: bool | None = None  # None: as select decides
    seed: int = field(default=0, compare=False)


def make_x(case: Case, generator: torch.Generator) -> Tensor:
    """x (B, S, C) in the case's layout, on the CPU."""
    B, S, C = case.B, case.S, case.C
    dtype = case.x_dtype or case.dtype
    x = torch.randn(B, S, C, generator=generator, dtype=torch.float64)
    sign = torch.randint(0, 2, (B, S, 1), generator=generator) * 2 - 1
    x = x + case.mean * sign
    if case.outlier:
        x[..., torch.randint(C, (), generator=generator)] *= 30
    x = x.to(dtype)
    if case.layout == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if case.layout == "batch last":
        return x.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    if case.layout == "channel slice":
        return torch.cat([x, x, x], dim=2)[..., C : 2 * C]
    if case.layout == "token slice":
        return torch.cat([x, x], dim=1)[:, S:]
    if case.layout == "strided channels":
        return x.repeat_interleave(2, dim=2)[..., ::2]
    if case.layout == "expanded" and B:
        return x[:1].expand(B, S, C)
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


def make_half(case: Case, mixes: str, generator: torch.Generator) -> Half:
    """Random parameters of one half, none of them trivial, on the CPU."""
    width, hidden = (case.S, case.D) if mixes == "tokens" else (case.C, case.E)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = case.dtype) -> Tensor:
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
    return Half(
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


def moved(half: Half, to: torch.device | torch.dtype) -> Half:
    """The half with all its tensors moved or cast."""
    return Half(*(t.to(to) if isinstance(t, Tensor) else t for t in half))


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


def context_of(case: Case, device: torch.device) -> launch.Context:
    """The launch context with the case's tiles and design."""

    def choose(op: str, problem: Problem, target: Target) -> TileConfig | None:
        if op == "token_mixing" and case.one_pass is False:
            return None
        if op == "token_mixing" and case.one_pass is None and select(op, problem, target) is None:
            return None
        return case.tiles or select(op, problem, target)

    return launch.Context(target_of(device), select=choose)


def _fused(
    part: str, x: Tensor, token: Half, channel: Half, context: launch.Context, dtype: torch.dtype
) -> Tensor:
    if part == "channel":
        return launch.channel_mixing(x, channel, dtype, context)
    y, moments = launch.token_mixing(x, token, dtype, context)
    return y if part == "token" else launch.channel_mixing(y, channel, dtype, context, moments)


def _eager(part: str, x: Tensor, token: Half, channel: Half) -> Tensor:
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
            exact = (moved(half, torch.float64) for half in (token, channel))
            truth.append(_eager(part, x.double(), *exact))
    together = (torch.stack(t).cpu() for t in (fused, eager, truth))
    return parity.compare(*together, parity.accumulate_dtype(case.dtype))

"""Does a block's forward compute what its modules suggest? Tried out in float64 on random weights.

A structure shows which modules a block has, not what it does with them: a block that normalises after the
MLP, or scales its branches, has the same modules. So before a block is fused its own forward is run on a copy
and compared with :func:`fastmixer.reference.mixer_block`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from fastmixer import reference
from fastmixer.adapters.structure import HOOKS, Structure

SEED = 20210504  # arbitrary; fixed, so that a verdict does not change from run to run

_MODULE_STATE = frozenset(nn.Module().__dict__) | {"forward", "_fused"}


def settings_key(block: nn.Module, structure: Structure) -> Hashable:
    """Equal for blocks whose forward must give the same verdict: same classes, shapes and settings.

    Made of strings, numbers and classes only, so that it can be pickled with the block.
    """
    forward = type(block).forward
    halves = [
        (
            type(half.mlp),
            _attributes(half.mlp),
            half.norm.eps,
            half.act.approximate,
            tuple(None if p is None else tuple(p.shape) for p in half.parameters()),
        )
        for half in (structure.token, structure.channel)
    ]
    return (
        type(block),
        getattr(forward, "__module__", ""),
        getattr(forward, "__qualname__", ""),
        type(structure.drop_path),
        _attributes(block),
        *halves,
    )


def disproof(
    block: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    rematch: Callable[[nn.Module], Structure | str],
) -> str | None:
    """Why ``block`` cannot be taken for a Mixer block after trying it, or None when it behaves like one.

    Tried in eval mode, and in training mode with the dropouts off and stochastic depth replaced by two known
    factors, which also proves where and in which order the block draws them. The block itself, and the global
    random state, stay as they are.

    Args:
        block: a block whose structure matched.
        run: calls the block's own forward: ``run(copy, x)``.
        rematch: finds the structure of the copy.
    """
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _difference(block, run, rematch)
    except (
        Exception
    ) as error:  # a foreign forward may raise anything: that is a reason, not a failure of ours
        return f"trying out its forward failed with {type(error).__name__}: {error}"


def _difference(block: nn.Module, run: Callable, rematch: Callable) -> str | None:
    generator = torch.Generator("cpu").manual_seed(SEED)
    twin = _random_copy(block, generator)
    structure = rematch(twin)
    if isinstance(structure, str):
        return f"a copy of it {structure}"
    seq_len, dim = structure.token.fc1.weight.shape[1], structure.channel.fc1.weight.shape[1]
    x = torch.randn((1, seq_len, dim), generator=generator, dtype=torch.float64)

    twin.eval()
    expected = reference.mixer_block(x, structure.token.half(), structure.channel.half())
    problem = _compare(run(twin, x.clone()), expected, structure)
    if problem is not None:
        return f"its forward does not compute a Mixer block: {problem}"

    twin.train()
    for dropout in structure.dropouts:
        dropout.p = 0.0
    token_half, channel_half = structure.token.half(), structure.channel.half()
    if structure.drop_path is not None:
        factors = torch.tensor([0.75, 1.5], dtype=torch.float64)
        twin.drop_path = _FixedFactors(factors)
        token_half, channel_half = (
            half._replace(residual_scale=factor)
            for half, factor in zip((token_half, channel_half), factors, strict=True)
        )
    expected = reference.mixer_block(x, token_half, channel_half)
    problem = _compare(run(twin, x.clone()), expected, structure)
    return None if problem is None else f"its forward does not compute a Mixer block in training: {problem}"


def _compare(result: object, expected: Tensor, structure: Structure) -> str | None:
    if not isinstance(result, Tensor):
        return f"it returns {type(result).__name__}"
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"it returns {tuple(result.shape)} {result.dtype} for {tuple(expected.shape)} {expected.dtype}"
    error = ((result - expected).norm() / expected.norm()).item()
    # A sum of n terms is off by at most n rounding errors; four sums and two normalisations in a row.
    terms = sum(max(half.fc1.weight.shape) for half in (structure.token, structure.channel))
    bound = 8 * terms * torch.finfo(torch.float64).eps
    return None if error <= bound else f"relative difference {error:.1e} in float64"


def _random_copy(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A deep copy with random float64 parameters on the CPU, and without the block's own hooks."""
    # What the memo already holds is not copied: neither the real weights, which may be large, on a GPU or on
    # "meta", nor hooks, which may hold on to anything.
    memo: dict[int, object] = {}
    for parameter in block.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
        if value.ndim == 2:
            value /= value.shape[1] ** 0.5
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for hooks in HOOKS:
        own = block.__dict__[hooks]
        memo[id(own)] = type(own)()
    state = block.__dict__
    for name in ("forward", "_fused"):
        if name in state:
            memo[id(state[name])] = "left out"
    twin = copy.deepcopy(block, memo)
    for name in ("forward", "_fused"):
        twin.__dict__.pop(name, None)
    return twin


def _attributes(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """The plain attributes of ``module``, which its forward may consult."""
    return tuple(
        (name, repr(value)) for name, value in sorted(module.__dict__.items()) if name not in _MODULE_STATE
    )


class _FixedFactors(nn.Module):
    """Stands in for stochastic depth: multiplies by the given factors, one a call; fails beyond the last."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = list(factors)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.pop(0)

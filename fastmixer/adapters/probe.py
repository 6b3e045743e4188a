"""Does a block's forward compute what its modules suggest? Tried out in float64 on random weights.

A structure shows which modules a block has, not what it does with them: a block that normalises after the
MLP, or scales its branches, has the same modules. So before a block is fused its own forward is run on a copy
and compared with :func:`fastmixer.reference.mixer_block`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

from fastmixer import reference
from fastmixer.adapters.structure import HOOKS, Structure, parameters_of

SEED = 20210504  # arbitrary; fixed, so that a verdict does not change from run to run

# What a fused block carries, see FusedForward.install and MixerBlock.
INSTALLED = ("forward", "_replicate_for_data_parallel", "_fused", "train", "_apply")

# What PyTorch or fastmixer keeps in a module, as opposed to the module's own settings.
_MODULE_STATE = frozenset(nn.Module().__dict__) | {
    *INSTALLED,
    "_is_replica",
    "_former_parameters",
    "_compiled_call_impl",
}


def settings_key(block: nn.Module, structure: Structure) -> Hashable:
    """Equal for blocks whose forward must give the same verdict: same classes, shapes and settings.

    Made of strings, numbers and classes only, so that it can be pickled with the block.
    """
    forward = type(block).forward
    # Rates need no trial of their own, and differ from block to block: what draws, is left out.
    drawing = {id(m) for m in (structure.token.drop_path, structure.channel.drop_path, *structure.dropouts)}
    return (
        type(block),
        getattr(forward, "__module__", ""),
        getattr(forward, "__qualname__", ""),
        _attributes(block),
        *(kind if id(module) in drawing else (kind, _attributes(module)) for module, kind in structure.inner),
        *(
            tuple(None if p is None else tuple(p.shape) for p in half.parameters())
            for half in (structure.token, structure.channel)
        ),
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
    leading = (2, 3)[: structure.ndim - 2]  # more than one each: nothing may mix samples, nor series
    shape = (*leading, structure.token.width, structure.channel.width)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)

    twin.eval()
    expected = _expected(x, structure)
    problem = _compare(run(twin, x.clone()), expected, structure)
    if problem is not None:
        return f"its forward does not compute a Mixer block: {problem}"

    twin.train()
    for dropout in structure.dropouts:
        dropout.p = 0.0
    expected = _expected(x, structure, _fix_factors(twin, structure))
    problem = _compare(run(twin, x.clone()), expected, structure)
    return None if problem is None else f"its forward does not compute a Mixer block in training: {problem}"


def _expected(x: Tensor, structure: Structure, scales: Sequence[Tensor | None] = (None, None)) -> Tensor:
    """What a Mixer block makes of x (*, S, C), with these residual scales of its two halves."""
    halves = (
        half.half(scale) for half, scale in zip((structure.token, structure.channel), scales, strict=True)
    )
    return reference.mixer_block(x.flatten(0, -3), *halves).view_as(x)


def _fix_factors(twin: nn.Module, structure: Structure) -> list[Tensor | None]:
    """Puts two known factors in place of stochastic depth; returns those of the two halves."""
    factors = torch.tensor([0.75, 1.5], dtype=torch.float64)
    fixed: dict[nn.Module, _FixedFactors] = {}
    scales: list[Tensor | None] = []
    for half, factor in zip((structure.token, structure.channel), factors, strict=True):
        if half.drop_path is not None:
            fixed.setdefault(half.drop_path, _FixedFactors()).factors.append(factor)
        scales.append(None if half.drop_path is None else factor)
    for module in list(twin.modules()):
        for name, child in module._modules.items():
            if child in fixed:
                module._modules[name] = fixed[child]
    return scales


def _compare(result: object, expected: Tensor, structure: Structure) -> str | None:
    if not isinstance(result, Tensor):
        return f"it returns {type(result).__name__}"
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"it returns {tuple(result.shape)} {result.dtype} for {tuple(expected.shape)} {expected.dtype}"
    error = ((result - expected).norm() / expected.norm()).item()
    # A sum of n terms is off by at most n rounding errors; four sums and two normalisations in a row.
    terms = sum(max(half.width, half.hidden) for half in (structure.token, structure.channel))
    bound = 8 * terms * torch.finfo(torch.float64).eps
    return None if error <= bound else f"relative difference {error:.1e} in float64"


def _random_copy(block: nn.Module, generator: torch.Generator) -> nn.Module:
    """A deep copy with random float64 parameters on the CPU, and without the block's own hooks."""
    # What the memo already holds is not copied: neither the real weights, which may be large, on a GPU or on
    # "meta", nor hooks, which may hold on to anything.
    memo: dict[int, object] = {}
    for parameter in block.parameters():
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
        if value.ndim > 1:
            value /= value.shape[1] ** 0.5
        memo[id(parameter)] = nn.Parameter(value, requires_grad=False)
    for hooks in HOOKS:
        own = block.__dict__[hooks]
        memo[id(own)] = type(own)()
    state = block.__dict__
    for name in INSTALLED:
        if name in state:
            memo[id(state[name])] = "left out"
    twin = copy.deepcopy(block, memo)
    for name in INSTALLED:
        twin.__dict__.pop(name, None)
    return twin


def _attributes(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """The plain attributes of ``module``, which its forward may consult."""
    hidden = _MODULE_STATE | parameters_of(module).keys()  # a replica has its parameters among them
    return tuple((name, repr(value)) for name, value in sorted(module.__dict__.items()) if name not in hidden)


class _FixedFactors(nn.Module):
    """Stands in for stochastic depth: multiplies by its factors, one a call; fails beyond the last."""

    def __init__(self) -> None:
        super().__init__()
        self.factors: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors.pop(0)

"""Does a block's forward compute what its modules suggest? Tried out in float64 on random weights.

A structure shows which modules a block has, not what it does with them: a block that normalises after the
MLP, or scales its branches, has the same modules. So before a block is fused its own forward is run on a copy
and compared with :func:`fastmixer.reference.mixer_block`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence

import numpy
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from fastmixer import reference
from fastmixer.blocks.state import (
    ATTACHED,
    INSTALLED,
    attributes_of,
    class_attributes,
    classes_of,
    described,
)
from fastmixer.blocks.structure import HOOKS, Structure

SEED = 20210504  # arbitrary; fixed, so that a verdict does not change from run to run


def settings_key(block: nn.Module, structure: Structure) -> Hashable:
    """Equal for blocks whose forward must give the same verdict: same classes, shapes and settings.

    The classes count with the code of their methods, so that a verdict that was pickled with a block does not
    outlive a change of its source. A digest, which can be pickled.
    """
    # Rates need no trial of their own, and differ from block to block: what draws, is left out.
    halves = structure.token, structure.channel
    drawing = {id(half.drop_path) for half in halves if half.draws_per_sample}
    drawing |= {id(dropout) for dropout in structure.dropouts}
    modules = [block, *(module for module, _ in structure.inner)]
    key = (
        [None if id(m) in drawing else described(dict(sorted(attributes_of(m).items()))) for m in modules],
        [(kind.__module__, kind.__qualname__) for m in modules for kind in classes_of(m)],
        [described(class_attributes(k)) for k in dict.fromkeys(k for m in modules for k in classes_of(m))],
        [None if p is None else tuple(p.shape) for half in halves for p in half.parameters()],
    )
    return hashlib.sha256(repr(key).encode()).hexdigest()


def disproof(
    block: nn.Module,
    run: Callable[[nn.Module, Tensor], Tensor],
    rematch: Callable[[nn.Module], Structure | str],
) -> str | None:
    """Why ``block`` cannot be taken for a Mixer block after trying it, or None when it behaves like one.

    Tried in eval mode, and in training mode with the dropouts off and stochastic depth replaced by two known
    factors, which also proves where and in which order the block draws them. In training the gradients count
    too. The block itself, its classes and all global state stay as they are.

    Args:
        block: a block whose structure matched.
        run: calls the block's own forward: ``run(copy, x)``.
        rematch: finds the structure of the copy.
    """
    try:
        with _undisturbed(), _restored([kind for m in block.modules() for kind in classes_of(m)]):
            return _difference(block, run, rematch)
    # A foreign forward may raise anything: that is a reason, not a failure of ours.
    except Exception as error:
        return f"trying out its forward failed with {type(error).__name__}: {error}"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The same trial whatever the caller has switched on, and the caller's random numbers left alone."""
    default_dtype, python_state = torch.get_default_dtype(), random.getstate()
    numpy_state = numpy.random.get_state()
    switched_off = (
        _disable_current_modes(),
        torch.device("cpu"),
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autograd.set_detect_anomaly(False),
        torch.random.fork_rng(devices=[]),
        warnings.catch_warnings(),
    )
    with contextlib.ExitStack() as stack:
        if torch._C._functorch.peek_interpreter_stack() is not None:  # inside a torch.func transform
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        for context in switched_off:
            stack.enter_context(context)
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(default_dtype)
            random.setstate(python_state)
            numpy.random.set_state(numpy_state)


@contextlib.contextmanager
def _restored(kinds: Sequence[type]) -> Iterator[None]:
    """Puts back the attributes of these classes, which a copy of a block shares with it."""
    saved = [(kind, class_attributes(kind)) for kind in dict.fromkeys(kinds)]
    values = [value for _, attributes in saved for value in attributes.values()]
    contents = [(value, copy.copy(value)) for value in values if isinstance(value, (list, dict, set))]
    try:
        yield
    finally:
        for value, content in contents:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        for kind, attributes in saved:
            now = class_attributes(kind)
            for name in now.keys() - attributes.keys():
                delattr(kind, name)
            for name, value in attributes.items():
                if now.get(name) is not value:
                    setattr(kind, name, value)


def _difference(block: nn.Module, run: Callable, rematch: Callable) -> str | None:
    generator = torch.Generator("cpu").manual_seed(SEED)
    twin = _random_copy(block, generator)
    structure = rematch(twin)
    if isinstance(structure, str):
        return f"a copy of it {structure}"
    twin.eval()
    problem = _try(twin, run, structure, (None, None), generator)
    if problem is not None:
        return problem
    twin.train()
    for dropout in structure.dropouts:
        dropout.p = 0.0
    with torch.enable_grad():
        return _try(twin, run, structure, _fix_factors(structure), generator)


def _try(
    twin: nn.Module,
    run: Callable,
    structure: Structure,
    scales: Sequence[Tensor | None],
    generator: torch.Generator,
) -> str | None:
    """What a call shows against ``twin``: another result than expected, in training also other gradients.

    Or anything left behind. scales: the residual scales of the two halves.
    """
    training, mode = twin.training, " in training" if twin.training else ""
    # More than one each, as nothing may mix samples, nor series; and another batch in training, as what is
    # stored may be the batch's size.
    shape = *(3 if training else 2, 3)[: structure.ndim - 2], *structure.size
    x, cotangent = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    halves = structure.token, structure.channel
    leaves = [x, *(p for half in halves for p in half.parameters() if p is not None)]
    for leaf in leaves:
        leaf.requires_grad_(training)
    params = (half.params(scale) for half, scale in zip(halves, scales, strict=True))
    expected = reference.mixer_block(x.flatten(0, -3), *params).view_as(x)
    expected_gradients = torch.autograd.grad(expected, leaves, cotangent) if training else ()

    before, argument = _state(twin), x.clone()
    result = run(twin, argument)
    after = _state(twin)
    # A sum of n terms is off by at most n rounding errors; four sums and two normalisations in a row.
    terms = sum(max(half.width, half.hidden) for half in halves)
    problem = _difference_of(result, expected, terms)
    if problem is None and training and not result.requires_grad:
        problem = "it gives no gradient"
    elif problem is None and training:
        result.backward(cotangent)  # not autograd.grad, which reentrant activation checkpointing refuses
        gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        together = (torch.cat([one.flatten() for one in each]) for each in (gradients, expected_gradients))
        problem = _difference_of(*together, terms + cotangent.numel(), "its gradients have a ")
    if problem is not None:
        return f"its forward does not compute a Mixer block{mode}: {problem}"
    if not torch.equal(argument, x):
        return f"its forward writes into its input{mode}"
    changed = sorted({name for name in before.keys() | after.keys() if before.get(name) != after.get(name)})
    return f"its forward stores something{mode}: {', '.join(changed)}" if changed else None


def _difference_of(result: object, expected: Tensor, terms: int, prefix: str = "") -> str | None:
    """How ``result`` differs from what was expected, by more than sums of so many terms may."""
    if not isinstance(result, Tensor):
        return f"it returns {type(result).__name__}"
    if result.shape != expected.shape or result.dtype != expected.dtype:
        return f"it returns {tuple(result.shape)} {result.dtype} for {tuple(expected.shape)} {expected.dtype}"
    error = ((result - expected).norm() / expected.norm()).item()
    bound = 8 * terms * torch.finfo(torch.float64).eps
    return None if error <= bound else f"{prefix}relative difference {error:.1e} in float64"


def _state(twin: nn.Module) -> dict[str, object]:
    """All that a call could leave behind in ``twin``, its modules and their classes, by name."""
    values: dict[str, object] = {}
    for path, module in twin.named_modules():
        parameters = {k: None if p is None else p.detach() for k, p in module._parameters.items()}
        state = {**module.__dict__, **parameters, **module._buffers}
        for name in ("_parameters", "_buffers", "_modules"):
            del state[name]
        for name, value in state.items():
            values[f"{path}.{name}" if path else name] = described(value)
        for kind in classes_of(module):
            values |= {f"{kind.__qualname__}.{k}": described(v) for k, v in class_attributes(kind).items()}
    return values


def _fix_factors(structure: Structure) -> list[Tensor | None]:
    """Has stochastic depth multiply by a known factor, another one in each half; returns them.

    A call beyond the last fails.
    """
    drop_paths = structure.token.drop_path, structure.channel.drop_path
    factors = torch.tensor([0.75, 1.5], dtype=torch.float64)
    for drop_path in {*drop_paths} - {None}:
        own = iter([factor for factor, user in zip(factors, drop_paths, strict=True) if user is drop_path])
        drop_path.forward = lambda x, own=own: x * next(own)
    return [factor if drop_path else None for factor, drop_path in zip(factors, drop_paths, strict=True)]


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
    attached = (*INSTALLED, *ATTACHED)
    for name in attached:
        if name in state:
            memo[id(state[name])] = "left out"
    twin = copy.deepcopy(block, memo)
    for name in attached:
        twin.__dict__.pop(name, None)
    return twin

"""Who races at which level: PyTorch three ways, other implementations, ceilings, a ViT of the same size."""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import fastmixer
from fastmixer import demo

from . import measure
from .levels import CLASSES, Case, Subject, autocast, make_call

Make = Callable[[Subject], measure.Call]
HALVES, WHOLE = ("token", "channel"), ("block", "model")
PACKAGES = {"lucidrains": ("mlp_mixer_pytorch", "mlp-mixer-pytorch"), "flax": ("flax", "jax and flax")}
SAME_COUNTS = {"flops": None, "parameters": None}  # as many as the case has


@dataclass(frozen=True)
class Opponent:
    """One that races.

    make: from a subject, the call that is timed.
    judged: whether the parity gate looks at it: it has the subject's weights.
    plain: makes the call that is captured into a CUDA graph, weighed and whose launches are counted, where
        that is another: one that records no CUDA graphs of its own.
    weighed: whether that is done.
    """

    levels: tuple[str, ...]
    make: Make
    judged: bool = False
    directions: tuple[str, ...] = ("forward", "forward_backward")
    plain: Make | None = None
    weighed: bool = True


def choose(case: Case, names: Iterable[str]) -> dict[str, Opponent]:
    """Those of ``names`` that race at the case's level and in its direction, in the order of the names."""
    known = {name: OPPONENTS[name] for name in names if name in OPPONENTS}
    return {k: o for k, o in known.items() if case.level in o.levels and case.direction in o.directions}


def left_out(names: Iterable[str], device: torch.device) -> dict[str, str]:
    """Which of ``names`` cannot race on this machine, and why."""
    reasons = {}
    for name in names:
        module, package = PACKAGES.get(name, (None, None))
        if module and importlib.util.find_spec(module) is None:
            reasons[name] = f"{package} not installed"
        elif name == "flax" and (reason := _why_not_flax(device)):
            reasons[name] = reason
    return reasons


def _why_not_flax(device: torch.device) -> str | None:
    from . import flax_mixer

    try:
        platform = flax_mixer.platform()
    except Exception as error:  # jax raises many kinds where its plug-in and the driver do not agree
        return f"jax does not work: {type(error).__name__}: {error}"
    expected = "cpu" if device.type == "cpu" else "gpu"
    return None if platform == expected else f"jax runs on its {platform}, not on a {expected}"


def _compiled(mode: str, subject: Subject) -> measure.Call:
    return make_call(torch.compile(subject.eager, mode=mode, dynamic=False), subject.case)


def _frozen(subject: Subject) -> measure.Call:
    """Fused, with weights that were packed once: what serves."""
    model = copy.deepcopy(subject.fused).eval()
    with autocast(subject.case, subject.items[0].device):
        fastmixer.freeze(model)
    return make_call(model, subject.case)


def _lucidrains(subject: Subject) -> measure.Call:
    """lucidrains' model with the case's sizes.

    Its two factors are both of ``dim``, the first for the tokens; with its defaults, 4 and 0.5, the token MLP
    is eight times the paper's and the channel MLP an eighth.
    """
    from mlp_mixer_pytorch import MLPMixer

    case, shape = subject.case, subject.case.shape
    tokens, channels = shape.ratios
    model = MLPMixer(
        image_size=shape.image, channels=3, patch_size=shape.patch, dim=shape.channels, depth=shape.blocks,
        num_classes=CLASSES, expansion_factor=tokens, expansion_factor_token=channels,
    )  # fmt: skip
    module = model if case.level == "model" else model[2]  # after cutting into patches and embedding them
    demo.randomise(module)
    return _placed_call(module, subject)


def _flax(subject: Subject) -> measure.Call:
    from . import flax_mixer

    return measure.Blocking(flax_mixer.make_call(subject.case, subject.items[0]))


def make_vit(case: Case) -> nn.Module:
    """timm's ViT of the size that the model's name says: S/16 for mixer_s16_224."""
    import timm

    size, patch = case.model.removeprefix("mixer_")[0], case.shape.patch
    names = {"s": "small", "b": "base", "l": "large", "h": "huge"}
    return timm.create_model(f"vit_{names[size]}_patch{patch}_224", pretrained=False, num_classes=CLASSES)


def own_counts(name: str, case: Case) -> dict[str, int | None]:
    """FLOPs and parameters of an opponent that is another network than the case's, counted on no device."""
    if name != "vit":
        return SAME_COUNTS
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = make_vit(case).train(case.trains)
        images = torch.empty(1, 3, case.shape.image, case.shape.image, requires_grad=case.trains)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(case.trains):
        logits = model(images)
        if case.trains:
            logits.sum().backward()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return {"flops": case.batch * counter.get_total_flops(), "parameters": parameters}


def _placed_call(module: nn.Module, subject: Subject) -> measure.Call:
    x = measure.as_tuple(subject.items[0])[0]
    return make_call(module.to(x.device, x.dtype).train(subject.case.trains), subject.case)


def _cublas(subject: Subject) -> measure.Call:
    """The channel half's matrix products alone: 2 forward, 4 more backward."""
    case, mlp = subject.case, subject.eager.mlp
    w1, w2 = (fc.weight.detach().to(case.product_dtype) for fc in (mlp.fc1, mlp.fc2))
    dtype = case.product_dtype
    inputs = [[t.flatten(0, 1).to(dtype) for t in measure.as_tuple(item)] for item in subject.items]
    turns = itertools.cycle(inputs)  # cast beforehand: a call takes the next of these, whatever it is given

    def products(_: measure.Item) -> Tensor | tuple[Tensor, ...]:
        x, *given = next(turns)
        hidden = x @ w1.t()
        y = hidden @ w2.t()
        if not given:
            return y
        dhidden = given[0] @ w2
        return y, given[0].t() @ hidden, dhidden @ w1, dhidden.t() @ x

    return products


def _copy(subject: Subject) -> measure.Call:
    """Moves the bytes of the token half's activations: x read, y written; backward x, g read, dx written."""
    return (lambda item: (item[0].clone(), item[0] + item[1])) if subject.case.trains else Tensor.clone


OPPONENTS = {
    "eager": Opponent(HALVES + WHOLE, lambda subject: make_call(subject.eager, subject.case), judged=True),
    "compile": Opponent(HALVES + WHOLE, partial(_compiled, "default"), judged=True),
    "compile_max_autotune": Opponent(
        HALVES + WHOLE,
        partial(_compiled, "max-autotune"),
        judged=True,
        plain=partial(_compiled, "max-autotune-no-cudagraphs"),
    ),
    "fused": Opponent(HALVES + WHOLE, lambda subject: make_call(subject.fused, subject.case), judged=True),
    "fused_lean": Opponent(
        ("channel", *WHOLE),
        lambda subject: make_call(subject.fused, subject.case, memory="lean"),
        judged=True,
        directions=("forward_backward",),
    ),
    "fused_frozen": Opponent(WHOLE, _frozen, judged=True, directions=("forward",)),
    "lucidrains": Opponent(WHOLE, _lucidrains),
    "cublas": Opponent(("channel",), _cublas),
    "copy": Opponent(("token",), _copy),
    "flax": Opponent(WHOLE, _flax, directions=("forward",), weighed=False),
    "vit": Opponent(("model",), lambda subject: _placed_call(make_vit(subject.case), subject)),
}

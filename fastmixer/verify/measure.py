"""What ``verify`` measures: a fused model's outputs, gradients and times, against the truth and eager.

Three copies of one model see the same photographs: fp64 (the truth, its weights upcast from the dtype), eager
in the dtype, and fused. Every block is judged on its own: when a fused block has run, the eager and the fp64
block get the very input it got, so errors of earlier blocks do not add up. For the gradients they get it
again, with one random gradient of the output, which counts too: in training other code computes it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from fastmixer import dispatch, timing
from fastmixer.blocks.surgery import FuseReport
from fastmixer.dtypes import accumulate_dtype
from fastmixer.notices import FallbackWarning, ThawWarning
from fastmixer.parity import Parity, compare

TIMED_RUNS, WARM_UP_RUNS = 50, 10
WHOLE_MODEL = "end to end"

Advance = Callable[[str], None]  # called with the name of the step that begins


@dataclass
class Result:
    """What was compared of one model, and how long it takes.

    blocks: by name the comparison, or why the block was not fused. top5: "fused and eager" -> how many
    classes the top fives of both share, mean. gradients: by block and tensor; None: not asked for.
    milliseconds: on a GPU, by "eager", "torch.compile" and "fused", or why there is no time.
    """

    blocks: dict[str, Parity | str]
    logits: Parity
    top5: dict[str, float]
    gradients: dict[str, dict[str, Parity]] | None = None
    milliseconds: dict[str, float | str] = field(default_factory=dict)

    @property
    def compared(self) -> dict[str, Parity]:
        """The blocks that are fused."""
        return {name: block for name, block in self.blocks.items() if isinstance(block, Parity)}

    @property
    def ok(self) -> bool:
        parts = [self.compared, {"logits": self.logits}, *(self.gradients or {}).values()]
        passed = all(parity.ok for part in parts for parity in part.values())
        return passed and bool(self.compared) and self.gradients != {}


def outputs(
    eager: nn.Module,
    fused: nn.Module,
    report: FuseReport,
    images: Tensor,
    advance: Advance,
    keep: Collection[str] = (),
) -> tuple[Result, dict[str, Tensor]]:
    """Compares every fused block and the logits on ``images`` (batch, 3, H, W).

    ``fused`` is a copy of ``eager`` that ``fuse`` reported ``report`` on; both in the images' dtype. Beside
    the result: what the blocks named in ``keep`` were given.
    """
    truth = copy.deepcopy(eager).double()
    blocks: dict[str, Parity | str] = {row.name: row.reason for row in report}
    inputs: dict[str, Tensor] = {}

    def judge_block(name: str, block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        x = args[0]
        if name in keep:
            inputs[name] = x
        with dispatch.backend("torch"):
            expected, rounded = truth.get_submodule(name)(x.double()), eager.get_submodule(name)(x)
        blocks[name] = judge(output, rounded, expected)
        advance(f"fused, after {name}")

    with torch.no_grad(), fused_or_error(), contextlib.ExitStack() as hooks:
        advance("fp64 truth")
        with dispatch.backend("torch"):
            logits = {"truth": truth(images.double())}
            advance("eager")
            logits["eager"] = eager(images)
        advance("fused")
        for row in report.fused:
            hook = functools.partial(judge_block, row.name)
            hooks.enter_context(fused.get_submodule(row.name).register_forward_hook(hook))
        with dispatch.backend("triton"):
            logits["fused"] = fused(images)
    pairs = itertools.combinations(("fused", "eager", "truth"), 2)
    top5 = {f"{a} and {b}": shared_top(logits[a], logits[b]) for a, b in pairs}
    return Result(blocks, judge(logits["fused"], logits["eager"], logits["truth"]), top5), inputs


def judge(fused: Tensor, eager: Tensor, truth: Tensor) -> Parity:
    """The parity of a tensor of a model on photographs; a truth that is not finite is a failure.

    A sound model gives finite ones: NaN agreeing with NaN would prove nothing.
    """
    result = compare(fused, eager, truth, accumulate_dtype(eager.dtype))
    return result if truth.isfinite().all() else replace(result, misplaced=max(result.misplaced, 1))


@contextlib.contextmanager
def fused_or_error() -> Iterator[None]:
    """A block that quietly ran unfused would be compared with itself: makes that an error, and a thaw too."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.simplefilter("error", ThawWarning)
        yield


def shared_top(a: Tensor, b: Tensor) -> float:
    """How many classes the 5 largest logits of ``a`` and ``b`` share; both (batch, classes), the mean."""
    k = min(5, a.shape[-1])
    common = a.topk(k).indices.unsqueeze(-1) == b.topk(k).indices.unsqueeze(-2)
    return float(common.any(-1).double().sum(-1).mean())


# ---- gradients -------------------------------------------------------------------------------------------


def gradients(
    eager: nn.Module, fused: nn.Module, inputs: dict[str, Tensor], images: Tensor | None, advance: Advance
) -> dict[str, dict[str, Parity]]:
    """Of each block, by name, that got one of ``inputs`` and, if there are ``images``, of the whole model."""
    results = {}
    for name, x in inputs.items():
        advance(f"gradients of {name}")
        results[name] = block_gradients(eager.get_submodule(name), fused.get_submodule(name), x)
    if images is not None:
        advance(f"gradients {WHOLE_MODEL}")
        whole = block_gradients(eager, fused, images, parameters=False)
        results[WHOLE_MODEL] = {"logits": whole["output"], "images": whole["x"]}
    return results


def block_gradients(
    eager: nn.Module, fused: nn.Module, x: Tensor, *, parameters: bool = True
) -> dict[str, Parity]:
    """The comparison of "output", "x" (its gradient) and, unless they are left out, every parameter's."""
    truth = copy.deepcopy(eager).double()
    with dispatch.backend("triton"), fused_or_error():
        candidate = _backward(fused, x, x.dtype, parameters)
    with dispatch.backend("torch"):
        baseline = _backward(eager, x, x.dtype, parameters)
        exact = _backward(truth, x.double(), x.dtype, parameters)
    return {name: judge(candidate[name], baseline[name], exact[name]) for name in exact}


def _backward(module: nn.Module, x: Tensor, dtype: torch.dtype, parameters: bool) -> dict[str, Tensor]:
    """The output and the gradients, by name, for a gradient of the output drawn in ``dtype``."""
    with torch.enable_grad():
        sources = {"x": x.detach().requires_grad_()}
        if parameters:
            sources |= {name: p for name, p in module.named_parameters() if p.requires_grad}
        output = module(sources["x"])
        upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        # A gradient that was forgotten counts as zeros, and fails.
        grads = torch.autograd.grad(
            output, list(sources.values()), upstream.to(output), allow_unused=True, materialize_grads=True
        )
    return {"output": output.detach(), **dict(zip(sources, grads, strict=True))}


def time_on_gpu(
    eager: nn.Module, fused: nn.Module, images: Tensor, advance: Advance
) -> dict[str, float | str]:
    """Median milliseconds of the whole model: eager, torch.compile in its default mode, fused."""
    with torch.no_grad():
        advance("timing eager")
        times: dict[str, float | str] = {"eager": _median_ms(lambda: eager(images))}
        advance("timing torch.compile")
        try:
            compiled = torch.compile(eager)
            times["torch.compile"] = _median_ms(lambda: compiled(images))
        except RuntimeError as error:  # dynamo's and inductor's errors are; no C compiler, for one
            times["torch.compile"] = f"failed: {str(error).splitlines()[0]}"
        advance("timing fused")
        with dispatch.backend("triton"):
            times["fused"] = _median_ms(lambda: fused(images))
    return times


def _median_ms(call: Callable[[], Tensor]) -> float:
    """Median over calls timed by events on the device, after a warm-up that also compiles."""
    return timing.summarise(timing.event_times([call] * (WARM_UP_RUNS + TIMED_RUNS), WARM_UP_RUNS)).median

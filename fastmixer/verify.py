"""``python -m fastmixer verify``: are a real model's fused blocks as close to the truth as eager PyTorch?

Three copies of one model see the same photographs: fp64 (the truth, its weights upcast from the dtype), eager
in the dtype, and fused. Every block is judged on its own: at the moment a fused block has run, the eager and
the fp64 block get the very input it got, so errors of earlier blocks do not add up, and the fused model runs
once only, which is what takes the time in Triton's interpreter. The logits are judged end to end.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fastmixer import dispatch, interpreter, parity, surgery
from fastmixer.cli import DEFAULT_MODEL, UsageError, did_you_mean
from fastmixer.model import ALIASES, MODELS

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO_PACKAGES = ("timm", "sklearn", "rich", "PIL")
TIMED_RUNS, WARM_UP_RUNS = 50, 10

Advance = Callable[[str], None]  # called when a step is done, with the name of the next


@dataclass(frozen=True)
class Row:
    """One block: its comparison, or why it was not fused."""

    name: str
    parity: parity.Parity | None
    reason: str = ""


@dataclass(frozen=True)
class Result:
    """Everything ``render`` shows."""

    rows: tuple[Row, ...]
    logits: parity.Parity
    top5: dict[str, float]  # "fused and eager" -> how many of both top fives' classes they share, mean
    milliseconds: dict[str, float | str] = field(default_factory=dict)  # or why there is no time; GPU only

    @property
    def ok(self) -> bool:
        compared = [row.parity for row in self.rows if row.parity is not None]
        return bool(compared) and self.logits.ok and all(p.ok for p in compared)


def run(
    name: str = DEFAULT_MODEL,
    dtype: str = "bfloat16",
    batch: int = 1,
    checkpoint: str | None = None,
    *,
    build: Callable[[str], nn.Module] | None = None,
) -> int:
    """Verifies one model, prints the table, and returns the exit code: 0 passed, 1 failed.

    Args:
        name: a timm model, or one of the paper's seven.
        dtype: a torch dtype's name: "bfloat16", "float16" or "float32".
        batch: number of images.
        checkpoint: a file of weights for the model; without one they are random.
        build: makes the model from its name instead of timm.

    Raises:
        UsageError: a package is missing, the model is unknown, the checkpoint does not fit, or no block of
            the model can be fused, so that there is nothing to verify.
    """
    _check_packages()
    device = _device()
    model = (build or build_model)(name)
    weights = _fill(model, checkpoint)
    images = photographs(model, batch).to(device, getattr(torch, dtype))
    model = model.to(device, getattr(torch, dtype)).eval()
    fused = copy.deepcopy(model)
    report = surgery.fuse(fused)
    if not report.fused:
        raise UsageError(f"nothing to verify: no block of {name} can be fused\n{report}")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU, in Triton's interpreter"
    on_gpu = device.type == "cuda"
    with _progress_bar(len(report.fused) + 3 + 3 * on_gpu) as advance:
        result = measure(model, fused, report, images, advance)
        if on_gpu:
            result = replace(result, milliseconds=time_on_gpu(model, fused, images, advance))
    render(result, f"{name}, {dtype}, batch {batch}, on {where}", weights)
    return 0 if result.ok else 1


# ---- the model and its input -----------------------------------------------------------------------------


def build_model(name: str) -> nn.Module:
    """The model that timm calls ``name``, without pretrained weights; or timm's classes as the paper's H/14.

    Raises UsageError for an unknown name, with the nearest known ones.
    """
    import timm

    name = ALIASES.get(name, name)
    if timm.is_model(name):
        try:
            return timm.create_model(name, pretrained=False)
        except RuntimeError as error:  # the part of the name after the dot is not known
            raise UsageError(f"unknown model {name!r}: {error}") from error
    if name in MODELS:
        return timm.models.mlp_mixer.MlpMixer(**asdict(MODELS[name]))
    raise UsageError(f"unknown model {name!r}; {did_you_mean(name, MODELS, timm.list_models())}")


def randomise(model: nn.Module) -> None:
    """Moves every vector parameter off its trivial start and fills matrices of zeros; reproducible.

    A fresh model has LayerNorm weights of 1, biases of about 0 and a head of zeros: with these, code that
    forgot a bias would still agree.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            elif not parameter.any():
                parameter.copy_(noise * parameter[0].numel() ** -0.5)


def photographs(model: nn.Module, batch: int) -> Tensor:
    """(batch, 3, H, W) fp32: scikit-learn's photographs through the model's own preprocessing."""
    from PIL import Image
    from sklearn.datasets import load_sample_images
    from timm.data import create_transform, resolve_model_data_config

    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return torch.stack([transform(_view(photos, index)) for index in range(batch)])


def _view(photos: list[Image], index: int) -> Image:
    """The photographs in turn, whole at first and then another window of each at every further round."""
    lap, which = divmod(index, len(photos))
    photo = photos[which]
    if lap == 0:
        return photo
    width, height = (2 * side // 3 for side in photo.size)
    left, top = lap * 89 % (photo.size[0] - width), lap * 37 % (photo.size[1] - height)
    return photo.crop((left, top, left + width, top + height))


def _fill(model: nn.Module, checkpoint: str | None) -> str:
    """Gives the model its weights and says which."""
    from fastmixer.checkpoint import load_checkpoint

    if checkpoint is None:
        randomise(model)
        return "random weights: LayerNorm and biases are randomised too, no checkpoint was given"
    try:
        load_checkpoint(model, checkpoint)
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(f"--checkpoint: {error}") from error
    return f"weights from {checkpoint}"


def _device() -> torch.device:
    """A GPU, unless Triton is interpreting: its interpreter works on CPU tensors."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise UsageError("verify runs Triton kernels, and triton is not installed (Linux only)") from error
    if interpreter.is_interpreted():
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    raise UsageError(
        "there is no GPU, and triton was imported before TRITON_INTERPRET=1 was set: "
        "set it in the environment before Python starts"
    )


def _check_packages() -> None:
    missing = []
    for package in DEMO_PACKAGES:
        try:
            __import__(package)
        except ModuleNotFoundError as error:
            if error.name != package:  # it is there, and broken: the traceback says more
                raise
            missing.append(package)
    if missing:
        raise UsageError(f'verify needs {", ".join(missing)}: pip install "fastmixer[demo]"')


# ---- the comparison --------------------------------------------------------------------------------------


def measure(
    eager: nn.Module, fused: nn.Module, report: surgery.FuseReport, images: Tensor, advance: Advance
) -> Result:
    """Runs the three models on ``images`` (batch, 3, H, W) and compares every fused block and the logits.

    ``fused`` is a copy of ``eager`` that ``fuse`` reported ``report`` on; both in the images' dtype.
    """
    truth = copy.deepcopy(eager).double()
    accumulate = parity.accumulate_dtype(images.dtype)
    rows = {row.name: Row(row.name, None, row.reason) for row in report.rows}

    def judge(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        plain, exact = eager.get_submodule(name), truth.get_submodule(name)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            with dispatch.backend("torch"):
                expected, rounded = exact(args[0].double()), plain(args[0])
            rows[name] = Row(name, _finite(parity.compare(output, rounded, expected, accumulate), expected))
            advance(f"fused, after {name}")

        return hook

    with torch.no_grad(), _all_or_error():
        advance("fp64 truth")
        with dispatch.backend("torch"):
            logits_truth = truth(images.double())
            advance("eager")
            logits_eager = eager(images)
        advance("fused")
        hooks = [fused.get_submodule(row.name).register_forward_hook(judge(row.name)) for row in report.fused]
        try:
            with dispatch.backend("triton"):
                logits_fused = fused(images)
        finally:
            for hook in hooks:
                hook.remove()
    logits = parity.compare(logits_fused, logits_eager, logits_truth, accumulate)
    top5 = {
        "fused and eager": shared_top(logits_fused, logits_eager),
        "fused and truth": shared_top(logits_fused, logits_truth),
        "eager and truth": shared_top(logits_eager, logits_truth),
    }
    return Result(tuple(rows.values()), _finite(logits, logits_truth), top5)


def _finite(result: parity.Parity, truth: Tensor) -> parity.Parity:
    """Photographs through a sound model give finite truths: NaN agreeing with NaN would prove nothing."""
    if bool(truth.isfinite().all()):
        return result
    return replace(result, misplaced=max(result.misplaced, 1))


@contextlib.contextmanager
def _all_or_error() -> Iterator[None]:
    """A block that quietly ran unfused would be compared with itself: makes that warning an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", dispatch.FallbackWarning)
        yield


def shared_top(a: Tensor, b: Tensor, k: int = 5) -> float:
    """How many classes the ``k`` largest logits of ``a`` and ``b`` share; both (batch, classes), the mean."""
    k = min(k, a.shape[-1])
    common = a.topk(k).indices.unsqueeze(-1) == b.topk(k).indices.unsqueeze(-2)
    return float(common.any(-1).double().sum(-1).mean())


# ---- milliseconds, on a GPU ------------------------------------------------------------------------------


def time_on_gpu(
    eager: nn.Module, fused: nn.Module, images: Tensor, advance: Advance
) -> dict[str, float | str]:
    """Median milliseconds of the whole model: eager, torch.compile in its default mode, fused."""
    times: dict[str, float | str] = {}
    with torch.no_grad():
        advance("timing eager")
        times["eager"] = _median_ms(lambda: eager(images))
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
    for _ in range(WARM_UP_RUNS):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(TIMED_RUNS)]
    for start, end in events:
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


# ---- what the user sees ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _progress_bar(steps: int) -> Iterator[Advance]:
    """A bar on stderr, gone when done; ``steps`` is how often it is advanced."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    started = False
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("preparing", total=steps)

        def advance(description: str) -> None:
            nonlocal started
            progress.update(task, description=description, advance=1 if started else 0)
            started = True

        yield advance


def render(result: Result, title: str, weights: str) -> None:
    """Prints the table and the verdict to stdout."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=140)  # a file or pipe has no width: never cut a cell
    console.print(f"{title}\n{weights}", markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("block", overflow="fold")
    for column in ("eager error", "fused error", "ratio", "eager max", "fused max"):
        table.add_column(column, justify="right")
    table.add_column("verdict", overflow="fold")
    for row in result.rows:
        table.add_row(row.name, *_cells(row.parity, row.reason))
    table.add_section()
    table.add_row("logits", *_cells(result.logits, ""))
    console.print(table)
    for line in _summary(result):
        console.print(line)


def _cells(p: parity.Parity | None, reason: str) -> list[str]:
    if p is None:
        return ["-"] * 5 + [f"[yellow]not fused[/]: {reason}"]
    numbers = [f"{v:.2e}" for v in (p.error_eager, p.error_fused)] + [f"{p.ratio:.2f}"]
    numbers += [f"{v:.2e}" for v in (p.max_eager, p.max_fused)]
    return [*numbers, "[green]ok[/]" if p.ok else "[red]FAILED[/]"]


def _summary(result: Result) -> list[str]:
    compared = [row for row in result.rows if row.parity is not None]
    good = sum(row.parity.ok for row in compared)
    agreement = ", ".join(f"{pair} {count:g}" for pair, count in result.top5.items())
    times = [
        f"{name} {value:.3f} ms" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.milliseconds.items()
    ]
    verdict = "[bold green]PASSED[/]" if result.ok else "[bold red]FAILED[/]"
    unfused = len(result.rows) - len(compared)
    return [
        "errors: ||a - truth|| / ||truth||, max |a - truth|; a block sees the same input in all three runs",
        f"top-5 classes in common: {agreement}",
        *([f"time for the model (median): {', '.join(times)}"] if times else []),
        f"{verdict}: {good} of {len(compared)} fused blocks"
        + (f" ({unfused} not fused)" if unfused else "")
        + f" and {'' if result.logits.ok else 'not '}the logits are within "
        "1.25 x eager's error + 8 eps (max: 2 x + 16 eps)",
    ]

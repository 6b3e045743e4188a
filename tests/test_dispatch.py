"""Which backend runs a call, who decides it, and what the user hears when it is the reference."""

from __future__ import annotations

import contextvars
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from support import Case, make_half, make_x
from torch.autograd import forward_ad

import fastmixer
from fastmixer import dispatch, functional, reference
from fastmixer.ops import channel_mixing, token_mixing
from fastmixer.params import MixingParams

ON_CPU = "x is on the CPU"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No warning given yet, and no backend chosen by the environment."""
    monkeypatch.setattr(dispatch, "_warned", set())
    monkeypatch.delenv("FASTMIXER_BACKEND", raising=False)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The halves that were given to the launchers."""
    calls: list[str] = []

    def recorded(name: str, original: Callable) -> Callable:
        def record(*args: object, **kwargs: object) -> object:
            calls.append(name)
            return original(*args, **kwargs)

        return record

    for op in (token_mixing, channel_mixing):
        monkeypatch.setattr(op, "forward", recorded(op.__name__.rpartition(".")[2], op.forward))
    return calls


def arguments(device: str = "cpu", **kwargs: object) -> tuple:
    case = Case(B=1, S=3, C=4, D=2, E=5, **{"dtype": torch.float32, **kwargs})
    generator = torch.Generator().manual_seed(0)
    x, token, channel = make_x(case, generator), *(make_half(case, m, generator) for m in ("tokens", "rows"))
    if device == "cpu":
        return x, token, channel
    return x.to(device), *(MixingParams(*(t.to(device) for t in params[:6])) for params in (token, channel))


def mix(*args: torch.Tensor | MixingParams) -> torch.Tensor:
    x, token, channel = args or arguments()
    return functional.mixer_block(x, token, channel)


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """The messages of the FallbackWarnings given so far; any other warning is an error."""
    messages: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("always", fastmixer.FallbackWarning)
        warnings.showwarning = lambda message, *args: messages.append(str(message))
        yield messages


def test_the_innermost_block_decides_and_exceptions_restore() -> None:
    assert fastmixer.current_backend() == "auto"
    with fastmixer.backend("torch"):
        assert fastmixer.current_backend() == "torch"
        with pytest.raises(KeyError), fastmixer.backend("triton"):
            assert fastmixer.current_backend() == "triton"
            raise KeyError
        assert fastmixer.current_backend() == "torch"
        with fastmixer.backend("auto"):
            assert fastmixer.current_backend() == "auto"
        assert fastmixer.current_backend() == "torch"
    assert fastmixer.current_backend() == "auto"


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None, 3])
def test_other_names_are_refused(name: object) -> None:
    message = r"backend must be one of \('auto', 'triton', 'torch'\), got "
    with pytest.raises(ValueError, match=message) as caught, fastmixer.backend(name):
        pytest.fail("the block must not be entered")
    assert repr(name) in str(caught.value) and fastmixer.current_backend() == "auto"


def test_backend_decorates_functions() -> None:
    assert fastmixer.backend("torch")(fastmixer.current_backend)() == "torch"
    assert fastmixer.current_backend() == "auto"


def test_memory_is_chosen_like_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert fastmixer.current_memory() == "balanced"
    with fastmixer.memory("lean"), fastmixer.backend("torch"):
        assert fastmixer.current_memory() == "lean"
        with fastmixer.memory("balanced"):
            assert fastmixer.current_memory() == "balanced"
    monkeypatch.setenv("FASTMIXER_MEMORY", "lean")
    assert fastmixer.current_memory() == "lean"
    monkeypatch.setenv("FASTMIXER_MEMORY", "small")
    with pytest.raises(ValueError, match=r"FASTMIXER_MEMORY must be one of .*, got 'small'"):
        fastmixer.current_memory()
    message = r"memory must be one of \('balanced', 'lean'\), got 'tiny'"
    with pytest.raises(ValueError, match=message), fastmixer.memory("tiny"):
        pytest.fail("the block must not be entered")


def test_a_block_acts_in_its_own_thread_only() -> None:
    seen: dict[str, str] = {}
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with fastmixer.backend("triton"):
            inside.set()
            leave.wait(10)
            seen["other"] = fastmixer.current_backend()

    thread = threading.Thread(target=contextvars.Context().run, args=(other,))
    thread.start()
    assert inside.wait(10) and fastmixer.current_backend() == "auto"
    with fastmixer.backend("torch"):
        leave.set()
        thread.join(10)
        assert fastmixer.current_backend() == "torch" and seen == {"other": "triton"}


def test_environment_variable(monkeypatch: pytest.MonkeyPatch, kernel_calls: list) -> None:
    for value, expected in {"torch": "torch", "triton": "triton", "auto": "auto", "": "auto"}.items():
        monkeypatch.setenv("FASTMIXER_BACKEND", value)
        assert fastmixer.current_backend() == expected
    monkeypatch.setenv("FASTMIXER_BACKEND", "triton")
    mix()
    assert kernel_calls == ["token_mixing", "channel_mixing"]
    with fastmixer.backend("torch"):
        mix()
    assert len(kernel_calls) == 2
    monkeypatch.setenv("FASTMIXER_BACKEND", "gpu")
    with pytest.raises(ValueError, match=r"FASTMIXER_BACKEND must be one of .*, got 'gpu'"):
        mix()


def test_auto_on_the_cpu_warns_once_and_runs_the_reference(warned: list, kernel_calls: list) -> None:
    x, token, channel = arguments()
    for _ in range(3):
        assert torch.equal(mix(x, token, channel), reference.mixer_block(x, token, channel))
        functional.token_mixing(x, **token._asdict())
    assert warned == [f"fastmixer runs the PyTorch reference: {ON_CPU}"] and not kernel_calls


def test_every_reason_is_heard_once(warned: list) -> None:
    x, token, channel = arguments()
    for _ in range(2):
        mix(x, token, channel)
        mix(*arguments("meta"))
    reasons = [ON_CPU, "device type 'meta' is not supported"]
    assert warned == [f"fastmixer runs the PyTorch reference: {reason}" for reason in reasons]


def test_torch_and_triton_are_silent_where_they_do_what_they_say(warned: list, kernel_calls: list) -> None:
    x, token, channel = arguments()
    with fastmixer.backend("torch"):
        mix(x, token, channel)
        mix(x.clone().requires_grad_(), token, channel)
        mix(*arguments("meta"))
        assert not kernel_calls
    with fastmixer.backend("triton"):
        mix(x, token, channel)
        mix(x.clone().requires_grad_(), token, channel).sum().backward()
    assert not warned and len(kernel_calls) == 4


def test_where_warnings_are_errors_every_call_raises() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", fastmixer.FallbackWarning)
        for _ in range(2):
            with pytest.raises(fastmixer.FallbackWarning, match=ON_CPU):
                mix()


def refusal(*args: torch.Tensor | MixingParams) -> str:
    with fastmixer.backend("triton"), pytest.raises(RuntimeError) as caught, torch.no_grad():
        mix(*args)
    prefix = 'backend("triton") cannot run this call: '
    assert str(caught.value).startswith(prefix)
    return str(caught.value).removeprefix(prefix)


def test_triton_says_why_it_cannot(warned: list, kernel_calls: list) -> None:
    assert refusal(*arguments("meta")) == "device type 'meta' is not supported"
    with torch.autocast("cpu", torch.bfloat16):
        reason = refusal(*arguments(dtype=torch.float32, x_dtype=torch.float16))
        assert reason == "x is torch.float16 and the products would run in torch.bfloat16"
        reason = refusal(*arguments(dtype=torch.float32, x_dtype=torch.float64, norm_dtype=torch.float32))
        assert reason == "x is torch.float64 and the products would run in torch.bfloat16"
        # autocast leaves float64 weights alone, so they meet a bfloat16 x
        x, token, channel = arguments(dtype=torch.float64, x_dtype=torch.float64, norm_dtype=torch.float32)
        with pytest.raises(TypeError, match="token.fc1_weight must be bfloat16 like x"):
            mix(x.bfloat16(), token, channel)
    assert not warned and not kernel_calls


@pytest.mark.parametrize("capability", [(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)], ids=str)
def test_which_gpus_are_new_enough(capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's before Ampere are not; ROCm counts otherwise."""
    monkeypatch.setattr(dispatch, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Sample GPU")
    for hip in (None, "6.0"):
        monkeypatch.setattr(torch.version, "hip", hip)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            reason = dispatch.why_not_triton(torch.device("cuda"), dtype, dtype)
            too_old = hip is None and capability < (8, 0)
            assert reason == ("Sample GPU is older than compute capability 8.0" if too_old else None)


@pytest.mark.parametrize("role", ["x", "weight"])
def test_tensors_whose_memory_is_not_their_value_are_not_read(role: str, kernel_calls: list) -> None:
    x, token, channel = arguments()

    def negated(tensor: torch.Tensor) -> torch.Tensor:
        return torch.complex(torch.zeros_like(tensor), -tensor).conj().imag

    if role == "x":
        args = (negated(x), token, channel)
    else:
        args = (x, token, channel._replace(fc2_weight=negated(channel.fc2_weight)))
    assert refusal(*args) == "a tensor is a negated view" and not kernel_calls
    with pytest.warns(fastmixer.FallbackWarning):
        assert torch.equal(mix(*args), reference.mixer_block(x, token, channel))


class Scaled(torch.Tensor):
    """A weight kept as integers: what quantization libraries make of ``nn.Linear.weight``."""

    def __new__(cls, tensor: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(
            cls, tensor.shape, dtype=tensor.dtype, device=tensor.device
        )

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    @classmethod
    def __torch_dispatch__(
        cls, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ):
        unwrapped = [a.tensor if isinstance(a, Scaled) else a for a in args]
        return function(*unwrapped, **(kwargs or {}))


def test_tensor_subclasses_are_left_to_their_own_operators(kernel_calls: list) -> None:
    x, token, channel = arguments()
    expected = reference.mixer_block(x, token, channel)
    token = token._replace(fc1_weight=Scaled(token.fc1_weight))
    assert refusal(x, token, channel) == "a Scaled keeps its values in its own way" and not kernel_calls
    with pytest.warns(fastmixer.FallbackWarning), torch.no_grad():
        assert torch.equal(mix(x, token, channel), expected)


def test_function_transforms_run_the_reference() -> None:
    x, token, channel = arguments()
    with fastmixer.backend("triton"), pytest.raises(RuntimeError, match="inside a torch.func transform"):
        torch.vmap(lambda a: mix(a, token, channel))(x[None])
    with pytest.warns(fastmixer.FallbackWarning):
        batched = torch.vmap(lambda a: mix(a, token, channel))(x[None])
    torch.testing.assert_close(batched[0], reference.mixer_block(x, token, channel))


@pytest.mark.parametrize("name", ["auto", "torch", "triton"])
def test_torch_compile_takes_a_call_whole(name: str, kernel_calls: list) -> None:
    """The backend is asked, and warns, while the program is made; then it is part of the program."""
    x, token, channel = arguments()
    torch.compiler.reset()
    compiled = torch.compile(lambda a: 2 * mix(a, token, channel), fullgraph=True, backend="eager")
    with fastmixer.backend(name), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = compiled(x)
        compiled(x)
        fused, expected = bool(kernel_calls), 2 * mix(x, token, channel)
    assert torch.equal(result, expected) and fused == (name == "triton")
    said = [str(w.message) for w in caught if issubclass(w.category, fastmixer.FallbackWarning)]
    assert said == [f"fastmixer runs the PyTorch reference: {ON_CPU}"] * (name == "auto")


def test_torch_compile_refuses_what_the_strict_backend_cannot_run() -> None:
    x, token, channel = arguments()
    token = token._replace(residual_scale=torch.ones(1, requires_grad=True))
    torch.compiler.reset()
    compiled = torch.compile(mix, fullgraph=True, backend="eager")
    with fastmixer.backend("triton"), pytest.raises(Exception, match="residual_scale requires a gradient"):
        compiled(x, token, channel)


@pytest.mark.filterwarnings("ignore::fastmixer.FallbackWarning")
def test_compiled_gradients_are_those_of_the_reference() -> None:
    x, token, channel = arguments()
    torch.compiler.reset()
    compiled = torch.compile(mix, fullgraph=True, backend="aot_eager")
    grads = []
    for block in (compiled, reference.mixer_block):
        leaf = x.clone().requires_grad_()
        block(leaf, token, channel).square().sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_tracing_runs_the_reference(kernel_calls: list) -> None:
    """A trace records operators of torch; what a kernel writes would be a constant in it."""
    x, token, channel = arguments()
    with torch.no_grad(), fastmixer.backend("triton"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and the checks compare traced sizes
        traced = torch.jit.trace(lambda a: mix(a, token, channel), x, check_trace=False)
    assert torch.equal(traced(x + 1), reference.mixer_block(x + 1, token, channel)) and not kernel_calls


@pytest.mark.filterwarnings("ignore")  # the fallback's, and torch.jit's, which forward mode imports
def test_forward_mode_derivatives_are_those_of_the_reference(kernel_calls: list) -> None:
    x, token, channel = arguments()
    tangents = []
    for block in (mix, reference.mixer_block):
        with forward_ad.dual_level(), torch.no_grad(), fastmixer.backend("triton"):
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            tangents.append(forward_ad.unpack_dual(block(dual, token, channel)).tangent)
    assert torch.equal(*tangents) and not kernel_calls
    with forward_ad.dual_level(), fastmixer.backend("triton"):
        mix(x, token, channel)  # no derivative is asked of these tensors
    assert kernel_calls

"""A CUDA device that is none: CPU tensors count as an H100's, and Triton runs natively over a stub driver.

``install()`` makes this process believe in the device, for good: it needs the stub (which
``benchmarks/stub_driver.py`` builds) on ``LD_LIBRARY_PATH`` before Python starts, and no
``TRITON_INTERPRET``.

What a test in it proves: that the code for GPUs runs. Triton specialises, compiles for sm_90, and launches
through its own launcher, whose arguments and shared memory are checked; the host side of this project takes
the paths that it takes on a GPU, and does nothing in a CUDA graph's capture that the fake knows to be wrong.

What it cannot prove: kernels do nothing, so what they write keeps whatever the memory held. Nothing is said
about numbers, times, streams' order, real capture and replay (a replay does nothing), cuBLAS and cuDNN
(PyTorch's own operations run on the CPU), Inductor, the profiler, or memory, which counts as 0 bytes. Every
CPU tensor counts as the device's, so that a mixture of both does not show. What else initialises PyTorch's
CUDA runtime raises.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import stub_driver

SHARED_MEMORY = 227 * 1024  # bytes a program may use, as the stub says
CUDA = torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20, shared_memory_per_block_optin=SHARED_MEMORY, uuid="none",
)  # fmt: skip


class Launch(NamedTuple):
    """A launch as the driver saw it."""

    kernel: str  # without "_kernel"
    programs: int
    threads: int  # of a program
    shared_memory: int  # bytes a program
    captured: bool


class TensorMap(NamedTuple):
    """A matrix and its tiles as the driver was told for a tensor descriptor."""

    address: int
    columns: int
    rows: int
    row_bytes: int  # from one row to the next
    box_columns: int
    box_rows: int


class _TensorMap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in TensorMap._fields[:4]] + [
        (name, ctypes.c_uint) for name in TensorMap._fields[4:]
    ]


class _Launch(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_char_p)] + [
        (name, ctypes.c_uint) for name in ("programs", "threads", "shared_memory", "captured")
    ]


class Gpu:
    """The device as tests see it: what was launched and what was compiled."""

    def __init__(self) -> None:
        from triton import knobs

        self.driver = ctypes.CDLL(stub_driver.LIBRARY)
        self._count = ctypes.c_int.in_dll(self.driver, "fake_count_launches")
        self._capturing = ctypes.c_int.in_dll(self.driver, "fake_capturing")
        self._taken = self._maps = 0
        self._compiled: list[str] = []
        knobs.runtime.jit_cache_hook = self._note

    def _note(self, *, fn: Any, **_: Any) -> bool:
        self._compiled.append(_short(fn.name))
        return False  # compile

    def launches(self) -> list[Launch]:
        """All launches since the last call of this or of ``launched``."""
        first, self._taken = self._taken, self._count.value
        array = (_Launch * self._taken).in_dll(self.driver, "fake_launches")[first:]
        return [
            Launch(_short(e.kernel.decode()), e.programs, e.threads, e.shared_memory, bool(e.captured))
            for e in array
        ]

    def launched(self) -> list[str]:
        """The names of ``launches()``, in order."""
        return [launch.kernel for launch in self.launches()]

    def tensor_maps(self) -> list[TensorMap]:
        """All that were encoded since the last call."""
        count = ctypes.c_int.in_dll(self.driver, "fake_count_tensor_maps").value
        first, self._maps = self._maps, count
        array = (_TensorMap * count).in_dll(self.driver, "fake_tensor_maps")[first:]
        return [TensorMap(*(getattr(entry, name) for name in TensorMap._fields)) for entry in array]

    def compiled(self) -> list[str]:
        """The kernels that this process compiled, or loaded from the cache on disk, since the last call."""
        found, self._compiled = self._compiled, []
        return found

    @property
    def capturing(self) -> bool:
        return bool(self._capturing.value)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """What ``torch.cuda.graph`` does: inside the block launches are recorded for a replay."""
        self.refuse("a capture")
        self._capturing.value = 1
        try:
            yield
        finally:
            self._capturing.value = 0

    def refuse(self, what: str) -> None:
        """Raises RuntimeError while a graph is captured, as ``what`` would."""
        if self.capturing:
            raise RuntimeError(f"fake CUDA: {what} is not permitted when stream is capturing")


def _short(kernel: str) -> str:
    return kernel.rpartition(".")[2].strip("_").removesuffix("_kernel")


def install() -> Gpu:
    """Makes this process believe in the device, and returns it."""
    available, torch.cuda.is_available = torch.cuda.is_available, lambda: True  # Triton looks for a driver
    try:
        gpu = Gpu()
    except BaseException:
        torch.cuda.is_available = available
        raise
    _patch_device(gpu)
    _patch_streams(gpu)
    torch.Generator, torch.autocast = _Generator, _Autocast
    _Pretence(gpu).__enter__()
    _patch_backward(gpu)
    return gpu


# ---- torch.cuda ------------------------------------------------------------------------------------------


def _patch_device(gpu: Gpu) -> None:
    cuda = torch.cuda
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: 0
    cuda.device = lambda device: contextlib.nullcontext()
    cuda.set_device = lambda device: None
    cuda.get_device_properties = lambda device=None: PROPERTIES
    cuda.get_device_capability = lambda device=None: (PROPERTIES.major, PROPERTIES.minor)
    cuda.get_device_name = lambda device=None: PROPERTIES.name
    cuda.is_bf16_supported = lambda including_emulation=True: True
    cuda.synchronize = lambda device=None: gpu.refuse("synchronize")
    cuda.empty_cache = cuda.reset_peak_memory_stats = lambda device=None: None
    cuda.memory_allocated = cuda.max_memory_allocated = lambda device=None: 0
    cuda._lazy_init = _not_emulated
    torch._C._cuda_getCurrentRawStream = lambda device: 0


def _not_emulated(*_: object, **__: object) -> None:
    raise NotImplementedError("fake CUDA: this part of PyTorch's CUDA runtime is not emulated")


def _patch_streams(gpu: Gpu) -> None:
    """Streams without order, events on the host's clock, and graphs that replay nothing."""

    class Event:
        def __init__(self, enable_timing: bool = False) -> None:
            self.time: float | None = None

        def record(self, stream: Stream | None = None) -> None:
            self.time = time.perf_counter()

        def wait(self, stream: Stream | None = None) -> None:
            pass

        def synchronize(self) -> None:
            gpu.refuse("Event.synchronize")

        def elapsed_time(self, end: Event) -> float:
            gpu.refuse("Event.elapsed_time")
            return max((end.time - self.time) * 1e3, 1e-6)

    class Stream:
        cuda_stream = 0

        def wait_stream(self, stream: Stream) -> None:
            pass

        def wait_event(self, event: Event) -> None:
            pass

        def record_event(self, event: Event | None = None) -> Event:
            event = event or Event()
            event.record(self)
            return event

        def synchronize(self) -> None:
            gpu.refuse("Stream.synchronize")

    class CUDAGraph:
        captured = False

        def replay(self) -> None:
            gpu.refuse("replay")
            if not self.captured:
                raise RuntimeError("fake CUDA: replay of a graph that was not captured")

    @contextlib.contextmanager
    def graph(made: CUDAGraph) -> Iterator[None]:
        with gpu.capture():
            yield
        made.captured = True

    current = [Stream()]
    default = current[0]

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    cuda = torch.cuda
    cuda.Event, cuda.Stream, cuda.CUDAGraph, cuda.graph, cuda.stream = Event, Stream, CUDAGraph, graph, on
    cuda.current_stream = lambda device=None: current[-1]
    cuda.default_stream = lambda device=None: default
    torch.Tensor.record_stream = lambda tensor, stream: None
    cuda.is_current_stream_capturing = lambda: gpu.capturing


class _Generator(torch.Generator):
    """A generator of the device is the CPU's."""

    def __new__(cls, device: object = "cpu") -> torch.Generator:
        return super().__new__(cls, "cpu")


class _Autocast(torch.autocast):
    """Autocast of the device, which those ask about who look, and the CPU's, which PyTorch applies."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(device_type, *args, **kwargs)
        self._applied = contextlib.nullcontext()
        if device_type == "cuda":
            self._applied = torch.amp.autocast("cpu", *args, **kwargs)

    def __enter__(self) -> Any:
        self._applied.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> Any:
        self._applied.__exit__(*error)
        return super().__exit__(*error)


# ---- tensors ---------------------------------------------------------------------------------------------

# Of a tensor on the device these wait for it.
READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__", "equal",
    "allclose", "masked_select", "unique", "__array__",
}  # fmt: skip
# These take the host's memory, which a graph would read again when it is long gone.
FROM_HOST = {"tensor", "as_tensor", "asarray", "from_numpy", "pin_memory"}
FACTORIES = {
    "empty",
    "zeros",
    "ones",
    "full",
    "arange",
    "linspace",
    "eye",
    "rand",
    "randn",
    "randint",
    "randperm",
}


class _Pretence(TorchFunctionMode):
    """Tensors on the CPU say that they are on the device, and what is asked for there is made on the CPU."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self._gpu = gpu

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function is torch.device:
            return function(*args, **kwargs)
        if name == "__get__":
            return self._attribute(function, *args, **kwargs)
        if self._gpu.capturing:
            self._watch(name, args, kwargs)
        found = function(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})
        return 0 if name == "get_device" and found == -1 else found

    @staticmethod
    def _attribute(function: Callable, *args: Any, **kwargs: Any) -> Any:
        name = getattr(getattr(function, "__self__", None), "__name__", "")
        found = function(*args, **kwargs)
        if name == "device":
            return CUDA if found.type == "cpu" else found
        return args[0].device.type == "cpu" if name == "is_cuda" else found

    def _watch(self, name: str, args: tuple, kwargs: dict) -> None:
        """Refuses what waits for the device, and host memory: a graph copies what it holds at the capture."""
        if name in READS | FROM_HOST:
            self._gpu.refuse(name)
        device = kwargs.get("device", "cpu")
        if name in FACTORIES and not str(device).startswith(("cuda", "meta")):
            self._gpu.refuse(f"{name} in host memory")
        if name == "__getitem__" and getattr(args[1], "dtype", None) == torch.bool:
            self._gpu.refuse("a mask as an index")
        if name == "to" and any(
            isinstance(a, (str, torch.device)) and "cpu" in str(a) for a in (*args, *kwargs.values())
        ):
            self._gpu.refuse("a copy to the host")


def _patch_backward(gpu: Gpu) -> None:
    """The engine runs backwards without the caller's modes."""
    node = torch.autograd.function.BackwardCFunction
    apply = node.apply

    def pretending(self: Any, *gradients: Any) -> Any:
        with _Pretence(gpu):
            return apply(self, *gradients)

    node.apply = pretending


def _on_cpu(value: Any) -> Any:
    """``value``, or the CPU where it names the device."""
    if isinstance(value, (torch.device, str)) and str(value).partition(":")[0] == "cuda":
        return torch.device("cpu")
    return value

"""The cache of packed weights: what it keeps, and that nothing stale ever comes out of it."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastmixer
from fastmixer import launch, packing
from fastmixer.packing import PackedLinear, WeightCache


class Counted:
    """A cache of one weight; ``get`` copies it, and ``builds`` counts how often that was done."""

    def __init__(self) -> None:
        self.cache = WeightCache()
        self.builds = 0

    def get(self, *sources: Tensor | None, settings: tuple = ()) -> PackedLinear:
        def build() -> PackedLinear:
            self.builds += 1
            return PackedLinear(sources[0].detach().clone(), None)

        return self.cache.get("fc1", settings, sources, build)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def add_one_in_place(linear: nn.Linear) -> None:
    with torch.no_grad():
        linear.weight.add_(1)


def take_a_step(linear: nn.Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.SGD(linear.parameters(), lr=1.0).step()


def take_a_fused_step(linear: nn.Linear) -> None:
    linear.weight.grad = torch.ones_like(linear.weight)
    torch.optim.AdamW(linear.parameters(), lr=1.0, fused=True).step()


def load(linear: nn.Linear, **kwargs: bool) -> None:
    linear.load_state_dict({name: value + 1 for name, value in linear.state_dict().items()}, **kwargs)


def swap_data(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data + 1


def write_through_a_view(linear: nn.Linear) -> None:
    linear.weight.detach()[0].fill_(7)


def transpose_square(linear: nn.Linear) -> None:
    """The same memory at the same version, read in another order."""
    linear.weight.data = linear.weight.data[:, :3].t()


CHANGES = [
    add_one_in_place,
    take_a_step,
    take_a_fused_step,
    load,
    lambda linear: load(linear, assign=True),
    swap_data,
    write_through_a_view,
    transpose_square,
    lambda linear: linear.to(torch.float64),
    lambda linear: nn.init.normal_(linear.weight),
    lambda linear: setattr(linear, "weight", nn.Parameter(linear.weight.detach() + 1)),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_packed_anew(change: Callable[[nn.Linear], object]) -> None:
    linear, counted = layer(), Counted()
    before = counted.get(linear.weight, linear.bias)
    assert counted.get(linear.weight, linear.bias) is before and counted.builds == 1
    change(linear)
    after = counted.get(linear.weight, linear.bias)
    assert counted.builds == 2 and torch.equal(after.weight, linear.weight)
    assert counted.get(linear.weight, linear.bias) is after and counted.builds == 2


def test_every_source_and_setting_counts() -> None:
    linear, counted = layer(), Counted()
    counted.get(linear.weight, linear.bias, None)
    with torch.no_grad():
        linear.bias.add_(1)
    counted.get(linear.weight, linear.bias, None)
    assert counted.builds == 2
    counted.get(linear.weight, None, None)
    assert counted.builds == 3
    counted.get(linear.weight, linear.bias, None)
    counted.get(linear.weight, linear.bias, linear.bias)
    assert counted.builds == 5
    counted.get(linear.weight, linear.bias, linear.bias, settings=("other",))
    assert counted.builds == 6
    counted.get(linear.weight.detach(), linear.bias, linear.bias, settings=("other",))
    assert counted.builds == 6  # the same memory under another object


def test_memory_that_is_freed_and_used_again_is_not_mistaken() -> None:
    """An allocator hands the same address out again; a new tensor starts at version 0 as the old one did."""
    counted, memory, seen = Counted(), bytearray(16), set()
    for value in range(20):
        memory[:] = torch.full((4,), float(value)).numpy().tobytes()
        weight = torch.frombuffer(memory, dtype=torch.float32)
        seen.add((weight.data_ptr(), weight._version))
        assert torch.equal(counted.get(weight).weight, weight)
        del weight  # its storage goes, the memory is used again
    assert len(seen) == 1 and counted.builds == 20


def test_the_cache_does_not_keep_the_weights_alive() -> None:
    counted = Counted()
    weight = torch.zeros(1000)
    storage = torch.multiprocessing.reductions.StorageWeakRef(weight.untyped_storage())
    counted.get(weight)
    assert not storage.expired()
    del weight
    assert storage.expired()


def test_inference_tensors_are_never_cached() -> None:
    counted = Counted()
    with torch.inference_mode():
        weight = torch.zeros(3, 3)
        counted.get(weight)
        weight.add_(1)
        assert torch.equal(counted.get(weight).weight, weight)
        counted.get(torch.zeros(3, 3).clone())
    counted.get(torch.zeros(3), weight)
    assert counted.builds == 4 and len(counted.cache) == 0


def test_normal_weights_are_cached_in_inference_mode() -> None:
    linear, counted = layer(), Counted()
    with torch.inference_mode():
        kept = counted.get(linear.weight)
        assert counted.get(linear.weight) is kept
    assert counted.get(linear.weight) is kept and counted.builds == 1


def test_a_weight_that_changes_while_it_is_packed_is_packed_again() -> None:
    weight, cache = torch.zeros(3), WeightCache()

    def build() -> PackedLinear:
        packed = PackedLinear(weight.clone(), None)
        weight.add_(1)  # as another thread may
        return packed

    cache.get("fc1", (), (weight,), build)
    again = cache.get("fc1", (), (weight,), lambda: PackedLinear(weight.clone(), None))
    assert torch.equal(again.weight, weight)


def test_clear() -> None:
    linear, counted = layer(), Counted()
    counted.get(linear.weight)
    linear.weight.data.add_(1)  # what no version tells
    assert len(counted.cache) == 1
    counted.cache.clear()
    assert len(counted.cache) == 0
    assert torch.equal(counted.get(linear.weight).weight, linear.weight)


def test_a_build_that_fails_leaves_no_entry() -> None:
    cache, weight = WeightCache(), torch.zeros(3)

    def fail() -> PackedLinear:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        cache.get("fc1", (), (weight,), fail)
    assert len(cache) == 0


def through_torch_save(cache: WeightCache) -> WeightCache:
    buffer = io.BytesIO()
    torch.save(cache, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache)), through_torch_save],
)
def test_copies_are_empty(duplicate: Callable[[WeightCache], WeightCache]) -> None:
    linear, counted = layer(), Counted()
    counted.get(linear.weight)
    other = duplicate(counted.cache)
    assert type(other) is WeightCache and len(other) == 0 and len(counted.cache) == 1
    other.get("fc1", (), (linear.weight,), lambda: PackedLinear(linear.weight, None))
    assert len(other) == 1


def test_many_threads_always_get_what_their_weight_holds() -> None:
    cache, wrong = WeightCache(), []
    weights = [torch.full((8,), float(value)) for value in range(3)]

    def work(first: int) -> None:
        for step in range(400):
            weight = weights[(first + step) % 3]
            packed = cache.get("fc1", (), (weight,), lambda w=weight: PackedLinear(w.clone(), None))
            if not torch.equal(packed.weight, weight):
                wrong.append((first, step))
            if step % 50 == 0:
                cache.clear()

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(cache) <= 1


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched, in order."""
    names: list[str] = []
    original = launch.Launch

    def record(*args: object) -> launch.Launch:
        names.append(next(name for name, kernel in vars(launch.kernels()).items() if kernel is args[0]))
        return original(*args)

    monkeypatch.setattr(launch, "Launch", record)
    return names


BLOCK = ["row_moments", "token_mixing", "fc1", "fc2"]
PACKING = ["row_moments", "pack_linear", "pack_linear", "token_mixing", "pack_linear", "fc1", "fc2"]


def block(dtype: torch.dtype, tokens: int = 10) -> fastmixer.MixerBlock:
    torch.manual_seed(0)
    made = fastmixer.MixerBlock(24, tokens, dtype=dtype).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def run(made: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), fastmixer.backend("triton"):
        return made(x)


def test_a_block_in_eval_packs_once_and_then_launches_four_times(launched: list) -> None:
    made, x = block(torch.bfloat16), torch.randn(2, 10, 24, dtype=torch.bfloat16)
    first = run(made, x)
    assert launched == PACKING
    for _ in range(2):
        del launched[:]
        assert torch.equal(run(made, x), first) and launched == BLOCK
    del launched[:]
    run(made, torch.randn(3, 10, 24, dtype=torch.bfloat16))
    with torch.inference_mode():
        run(made, x)
    assert launched == 2 * BLOCK


def test_a_long_sequence_takes_five_launches(launched: list) -> None:
    made, x = block(torch.bfloat16, 300), torch.randn(1, 300, 24, dtype=torch.bfloat16)
    first = run(made, x)
    del launched[:]
    assert torch.equal(run(made, x), first) and launched == ["row_moments", "fc1", "fc2", "fc1", "fc2"]


def test_a_block_without_a_cache_packs_in_every_call(launched: list) -> None:
    made, x = block(torch.bfloat16), torch.randn(1, 10, 24, dtype=torch.bfloat16)
    run(made, x)
    halves = made._fused_forward()._structure.halves(x)
    for _ in range(2):
        del launched[:]
        with torch.no_grad(), fastmixer.backend("triton"):
            fastmixer.functional.mixer_block(x, *halves)
        assert launched == PACKING


@pytest.mark.parametrize(
    "dtype, tokens", [(torch.bfloat16, 10), (torch.float16, 300), (torch.float32, 16)], ids=str
)
def test_a_changed_parameter_is_never_stale(dtype: torch.dtype, tokens: int, launched: list) -> None:
    """Each parameter in turn, in place: the block gives what a copy with an empty cache gives."""
    made, x = block(dtype, tokens), torch.randn(1, tokens, 24, dtype=dtype)
    previous = run(made, x)
    for name, parameter in made.named_parameters():
        with torch.no_grad():
            parameter.mul_(1.5)
        result, fresh = run(made, x), run(copy.deepcopy(made), x)
        assert torch.equal(result, fresh) and not torch.equal(result, previous), name
        previous = result


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_checkpoint_is_never_stale(assign: bool, launched: list) -> None:
    made, other, x = block(torch.bfloat16), block(torch.bfloat16), torch.randn(1, 10, 24).bfloat16()
    nn.init.normal_(other.mlp_channels.fc1.weight)
    nn.init.normal_(other.norm2.weight)
    before = run(made, x)
    made.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(run(made, x), run(other, x)) and not torch.equal(run(made, x), before)
    del launched[:]
    run(made, x)
    assert launched == BLOCK


def test_a_block_follows_a_change_of_dtype(launched: list) -> None:
    made, x = block(torch.float32), torch.randn(1, 10, 24)
    run(made, x)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        made.to(dtype)
        assert torch.equal(run(made, x.to(dtype)), run(copy.deepcopy(made), x.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(made, x)
        assert torch.equal(inside, run(copy.deepcopy(made), x))
    assert not torch.equal(run(made, x), inside)


def test_while_a_graph_is_captured_weights_are_packed_into_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay must pack what the weights are then; a packed copy from before the capture would go stale."""
    counted, linear = Counted(), layer()
    before = counted.get(linear.weight)
    with monkeypatch.context() as patched:
        patched.setattr(packing, "_capturing", lambda sources: True)
        recorded = counted.get(linear.weight)
        assert counted.builds == 2 and recorded is not before
    assert counted.get(linear.weight) is before and counted.builds == 2

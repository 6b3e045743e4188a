"""What packing writes; and that a call runs the weights of its own moment, whoever wrote them."""

from __future__ import annotations

import copy
import dataclasses
import gc
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from support import Case, context_of
from torch import Tensor, nn

import fastmixer
from fastmixer.ops import launch, layouts, packing
from fastmixer.ops.layouts import Layout

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CPU = torch.device("cpu")
BLOCK = ["pack_weights", "row_moments", "token_mixing", "fc1", "fc2"]


# ---- what is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("strides", [(2**28 + 8, 1), (1, 2**28 + 8)])
def test_weight_offsets_beyond_int32(strides) -> None:
    weight = torch.randn(20, 16)
    far = torch.empty(19 * strides[0] + 15 * strides[1] + 1).as_strided((20, 16), strides)
    far.copy_(weight)
    context = context_of(Case(1, 16, 8, 20, 8), CPU)
    packed = [packing.pack({"fc1": Layout(w, None, BF16, (32, 16))}, context)["fc1"] for w in (weight, far)]
    assert torch.equal(packed[0].weight, packed[1].weight)


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_what_packing_writes(dtype: torch.dtype) -> None:
    """Folded: round(W gamma / s), its row sums, s, W beta + b. In the padding: the bias as hi + lo.

    All of them and a plain one in one launch.
    """
    g = torch.Generator().manual_seed(0)
    weight, bias, gamma, beta = (torch.randn(*s, generator=g) for s in ((21, 37), (21,), (37,), (37,)))
    launches: list[launch.Launch] = []
    context = context_of(Case(1, 8, 8, 8, 8), CPU)
    context = dataclasses.replace(context, execute=lambda one: launches.append(one) or launch.execute(one))
    layouts = {
        "folded": Layout(weight, bias, dtype, norm=(gamma, beta)),
        "padded": Layout(weight, bias, dtype, (32, 48), bias_in_padding=True),
        "with bias": Layout(weight, bias, dtype, (32, 48)),
        "plain": Layout(weight.t(), None, dtype),
    }
    packed = packing.pack(layouts, context)
    assert len(launches) == 1 and packed.keys() == layouts.keys()

    folded, product = packed["folded"], weight * gamma
    scale = torch.ones(21)
    if dtype == FP16:
        scale = 2.0 ** product.abs().amax(1).log2().floor()
        assert torch.equal(folded.scale, scale)
    else:
        assert folded.scale is None
        scale *= 2.0**32
    assert torch.equal(folded.weight[:, :37], (product / scale[:, None]).to(dtype))
    assert not folded.weight[:, 37:].any()
    torch.testing.assert_close(folded.rank1, folded.weight.double().sum(1).float())
    torch.testing.assert_close(folded.bias, (weight.double() @ beta.double() + bias.double()).float())

    hi, expected = bias.to(dtype), torch.zeros(32, 48, dtype=dtype)
    expected[:21, :37] = weight.to(dtype)
    assert torch.equal(packed["with bias"].weight, expected)
    assert torch.equal(packed["with bias"].bias, F.pad(bias, (0, 11)))
    expected[:21, 37], expected[:21, 38] = hi, (bias - hi.float()).to(dtype)
    assert torch.equal(packed["padded"].weight, expected) and packed["padded"].bias is None
    assert torch.equal(packed["plain"].weight[:, :21], weight.t().to(dtype))
    assert packed["plain"].weight.shape == (37, 32) and not packed["plain"].weight[:, 21:].any()


def test_the_scale_of_folded_rows_is_a_power_of_2_up_to_the_largest() -> None:
    """Zeros and what is not finite are left alone; 65504 ** 2 is beyond float16, and fits."""
    weight = torch.tensor([0.0, 1e-40, float("inf"), 65504.0, 2.0**-14]).unsqueeze(1).expand(5, 16)
    gamma = torch.full((16,), 65504.0)
    layout = Layout(weight, None, FP16, norm=(gamma, None))
    packed = packing.pack({"fc1": layout}, context_of(Case(1, 8, 8, 8, 8), CPU))["fc1"]
    assert packed.scale.log2().tolist() == [0, -117, 0, 31, 1]
    assert packed.weight[[0, 1, 3, 4]].isfinite().all() and packed.weight[2].isinf().all()
    assert ((packed.weight[[1, 3, 4]] >= 1) & (packed.weight[[1, 3, 4]] <= 2)).all()


@pytest.mark.parametrize(
    ("weight", "readable"),
    [
        (torch.zeros(20, 32, dtype=BF16), True),
        (torch.zeros(20, 48, dtype=BF16)[:, :30], True),  # rows that begin where vectors do
        (torch.zeros(20, 30, dtype=BF16), False),
        (torch.zeros(20, 64, dtype=BF16)[:, ::2], False),
        (torch.zeros(32, 20, dtype=BF16).t(), False),
        (torch.zeros(20, 32, dtype=FP16), False),
        (torch.zeros(20, 32, dtype=FP32), False),
    ],
)
def test_a_layer_is_read_as_it_lies_where_a_kernel_can(weight: Tensor, readable: bool) -> None:
    lying = Layout(weight, None, BF16).as_it_lies()
    assert (lying is not None) == readable and (lying is None or lying.weight is weight)
    assert Layout(weight, None, BF16, norm=(None, None)).as_it_lies() is None
    assert Layout(weight, None, BF16, (32, 48)).as_it_lies() is None


def test_layers_larger_than_a_program() -> None:
    """Of more rows and columns than it takes: the next layer begins behind all of its programs."""
    weight = torch.randn(300, 1030, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 1000.0
    folded = Layout(weight, None, FP16, norm=(None, None))
    plain = Layout(weight, None, FP16)
    packed = packing.pack({"folded": folded, "plain": plain}, context_of(Case(1, 8, 8, 8, 8), CPU))
    assert (packed["folded"].scale == 512).all()
    assert torch.equal(packed["folded"].weight[:, :1030], (weight / 512).to(FP16))
    assert torch.equal(packed["plain"].weight[:, :1030], weight.to(FP16))


# ---- launches of a block ---------------------------------------------------------------------------------


def block(dtype: torch.dtype = FP32, tokens: int = 10) -> fastmixer.MixerBlock:
    torch.manual_seed(0)
    made = fastmixer.MixerBlock(24, tokens, dtype=dtype).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.3)
    return made


def run(made: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad(), fastmixer.backend("triton"):
        return made(x)


def run_anew(made: fastmixer.MixerBlock, x: Tensor) -> Tensor:
    """What the weights are worth now: of a new block whose weights are copies."""
    fresh = fastmixer.MixerBlock(24, x.shape[1], dtype=made.norm1.weight.dtype).eval()
    fresh.load_state_dict(made.state_dict())
    return run(fresh, x)


def test_a_call_takes_five_launches_and_packs_in_one_of_them(launched: list) -> None:
    made, x = block(BF16), torch.randn(2, 10, 24, dtype=BF16)
    first = run(made, x)
    assert launched == BLOCK
    assert torch.equal(run(made, x), first) and launched == 2 * BLOCK
    with torch.inference_mode():
        run(made, x)
    assert launched == 3 * BLOCK


def test_a_long_sequence_takes_six(launched: list) -> None:
    made, x = block(BF16, 300), torch.randn(1, 300, 24, dtype=BF16)
    run(made, x)
    assert launched == ["pack_weights", "row_moments", "fc1", "fc2", "fc1", "fc2"]


def test_autocast_packs_all_four_weights_in_the_same_launch(launches: list) -> None:
    with torch.autocast("cpu", BF16):
        run(block(), torch.randn(1, 10, 24))
    assert [len(item.args["layers"]) for item in launches if item.kernel_name == "pack_weights"] == [4]


def test_a_step_packs_once_forward_and_once_a_half_backward(launched: list) -> None:
    made, x = block(BF16), torch.randn(2, 10, 24, dtype=BF16)
    with fastmixer.backend("triton"):
        y = made(x)
        assert [name for name in launched if name == "pack_weights"] == ["pack_weights"]
        del launched[:]
        y.sum().backward()
    assert [name for name in launched if name == "pack_weights"] == 2 * ["pack_weights"]


def test_nothing_packed_outlives_a_call() -> None:
    """Neither the forward's, until the backward, nor the backward's."""
    made, x = block(BF16), torch.randn(2, 10, 24, dtype=BF16)

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    run(made, x)
    before = tensors()
    run(made, x)
    assert tensors() == before
    with fastmixer.backend("triton"):
        y = made(x)
    packed = [t for t in gc.get_objects() if isinstance(t, layouts.PackedLinear)]
    assert not packed, "autograd keeps what the backward reads, not what was packed for the forward"
    y.sum().backward()


# ---- writes ----------------------------------------------------------------------------------------------


def with_optimizer(made: nn.Module, **options: bool) -> None:
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(made.parameters(), lr=0.1, **options).step()


def through_numpy(made: nn.Module) -> None:
    for parameter in made.parameters():
        parameter.detach().numpy()[...] *= 1.5


def through_dlpack(made: nn.Module) -> None:
    for parameter in made.parameters():
        torch.from_dlpack(parameter.detach()).mul_(1.5)


def through_a_flat_vector(made: nn.Module) -> None:
    flat = nn.utils.parameters_to_vector(made.parameters()).detach().clone()
    nn.utils.vector_to_parameters(flat, made.parameters())
    flat.mul_(1.5)


def through_storage(made: nn.Module) -> None:
    for parameter in made.parameters():
        torch.tensor([], dtype=parameter.dtype).set_(parameter.untyped_storage()).mul_(1.5)


def foreach(made: nn.Module) -> None:
    data = [parameter.data for parameter in made.parameters()]
    torch._foreach_copy_(data, [value * 1.5 for value in data])


def swapped(made: nn.Module) -> None:
    other = copy.deepcopy(made)
    for mine, its in zip(made.parameters(), other.parameters(), strict=True):
        its.data.mul_(1.5)
        mine.data, its.data = its.data, mine.data


def assigned(made: nn.Module) -> None:
    made.load_state_dict({name: value * 1.5 for name, value in made.state_dict().items()}, assign=True)


def replaced(made: nn.Module) -> None:
    for module in made.modules():
        for name, parameter in list(module._parameters.items()):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def gradient_descent(made: nn.Module) -> None:
    """The loop of many a tutorial, and of meta-learning."""
    for parameter in made.parameters():
        parameter.data.sub_(parameter.data * -0.5)


def exponential_average(made: nn.Module) -> None:
    """As torch_ema and Lightning swap an average in: each value copied into ``.data``."""
    for parameter in made.parameters():
        parameter.data.copy_(parameter.data * 1.5)


@torch.no_grad()
def in_place(made: nn.Module) -> None:
    for parameter in made.parameters():
        parameter.mul_(1.5)


def under_inference_mode(made: nn.Module) -> None:
    with torch.inference_mode():
        for parameter in made.parameters():
            parameter.data.mul_(1.5)


def with_the_version_put_back(made: nn.Module) -> None:
    """As FSDP and activation offloading do."""
    for parameter in made.parameters():
        with torch.autograd._unsafe_preserve_version_counter(parameter), torch.no_grad():
            parameter.mul_(1.5)


WRITES = {
    f.__name__: f
    for f in (
        in_place, gradient_descent, exponential_average, foreach, swapped, assigned, replaced, through_numpy,
        through_dlpack, through_a_flat_vector, through_storage, under_inference_mode,
        with_the_version_put_back, with_optimizer,
    )
} | {"a fused optimizer": lambda made: with_optimizer(made, fused=True),
     "a foreach optimizer": lambda made: with_optimizer(made, foreach=True)}  # fmt: skip


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_every_write_is_seen_by_the_next_call(write: Callable[[nn.Module], None]) -> None:
    made, x = block(), torch.randn(1, 10, 24)
    before = run(made, x)
    for _ in range(2):
        write(made)
        after = run(made, x)
        assert torch.equal(after, run_anew(made, x)) and not torch.equal(after, before)
        before = after


def double(made: nn.Module) -> None:
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(2)


def test_a_write_of_another_process_is_seen() -> None:
    made, x = block().share_memory(), torch.randn(1, 10, 24)
    before = run(made, x)
    learner = mp.get_context("spawn").Process(target=double, args=(made,))
    learner.start()
    learner.join()
    assert learner.exitcode == 0
    after = run(made, x)
    assert torch.equal(after, run_anew(made, x)) and not torch.equal(after, before)


def test_gradient_descent_by_hand_follows_the_reference() -> None:
    """Four steps that write through ``.data``, the backward's weights among them."""

    def losses(backend: str) -> list[float]:
        made, found = block().train(), []
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(4, 10, 24, generator=generator), torch.randn(4, 10, 24, generator=generator)
        with fastmixer.backend(backend):
            for _ in range(4):
                loss = (made(x) - y).square().mean()
                found.append(loss.item())
                made.zero_grad()
                loss.backward()
                for parameter in made.parameters():
                    parameter.data.sub_(0.3 * parameter.grad.data)
        return found

    found, expected = losses("triton"), losses("torch")
    assert found == pytest.approx(expected, rel=1e-4) and expected[-1] < expected[0]


def test_a_backward_reads_what_the_weights_are_then() -> None:
    """As eager's does: a write between forward and backward that leaves no version."""

    def gradient(backend: str) -> Tensor:
        made, x = block(), torch.randn(1, 10, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with fastmixer.backend(backend):
            y = made(x)
            made.mlp_channels.fc2.weight.data.mul_(2)
            y.square().sum().backward()
        return x.grad

    torch.testing.assert_close(gradient("triton"), gradient("torch"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype, tokens", [(BF16, 10), (FP16, 300), (FP32, 16)], ids=str)
def test_each_parameter_counts(dtype: torch.dtype, tokens: int) -> None:
    made, x = block(dtype, tokens), torch.randn(1, tokens, 24, dtype=dtype)
    previous = run(made, x)
    for name, parameter in made.named_parameters():
        parameter.data.mul_(1.5)
        result = run(made, x)
        assert torch.equal(result, run_anew(made, x)) and not torch.equal(result, previous), name
        previous = result


def test_a_block_follows_a_change_of_dtype() -> None:
    made, x = block(), torch.randn(1, 10, 24)
    run(made, x)
    for dtype in (BF16, FP16, FP32):
        made.to(dtype)
        assert torch.equal(run(made, x.to(dtype)), run_anew(made, x.to(dtype)))
    with torch.autocast("cpu", BF16):
        inside = run(made, x)
        assert torch.equal(inside, run_anew(made, x))
    assert not torch.equal(run(made, x), inside)

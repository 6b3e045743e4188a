"""Sums of partial results: several gradients of any shapes and dtypes in one launch."""

from __future__ import annotations

import torch
from support import Case, context_of

from fastmixer.ops import launch
from fastmixer.ops.reduce import Partial, sum_partials
from fastmixer.params import MixingParams

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


def test_all_sums_of_a_half_in_one_launch(device: torch.device, launched: list[str]) -> None:
    """Padding does not count, a transposed sum is turned, and each has its parameter's dtype."""
    D, S, C = 33, 50, 70
    shapes = {"norm_weight": (C,), "fc1_weight": (D, S), "fc1_bias": (D,), "fc2_weight": (S, D)}
    dtypes = {"norm_weight": FP32}
    tensors = {n: torch.empty(s, dtype=dtypes.get(n, BF16), device=device) for n, s in shapes.items()}
    params = MixingParams(**{**dict.fromkeys(MixingParams._fields[:6]), **tensors})
    generator = torch.Generator().manual_seed(0)

    def partials(name: str, *shape: int) -> Partial:
        sums = torch.randn(shape, generator=generator).to(device)
        return Partial(name, sums, transposed=name == "fc2_weight")

    given = [
        partials("norm_weight", 5, C),
        partials("fc1_weight", 44, 48, 64),  # padded to whole tiles
        partials("fc1_bias", 44, 48),
        partials("fc2_weight", 17, 48, 64),  # of the transpose (D, S)
    ]
    found = sum_partials(given, params, context_of(Case(1, S, C, D, 8, BF16), device))
    assert launched == ["sum_partials"] and list(found) == [one.name for one in given]
    for one in given:
        exact = one.sums.double().sum(0)
        exact = exact.t() if one.transposed else exact
        expected = exact[tuple(slice(size) for size in shapes[one.name])]
        result, dtype = found[one.name], tensors[one.name].dtype
        assert result.shape == shapes[one.name] and result.dtype == dtype and result.is_contiguous()
        bound = expected.abs() * torch.finfo(dtype).eps + 50 * torch.finfo(FP32).eps
        assert bool(((result.double() - expected).abs() <= bound).all())


def test_nothing_to_sum_launches_nothing(device: torch.device, launched: list[str]) -> None:
    params = MixingParams(*[None] * 6)
    assert sum_partials([], params, context_of(Case(1, 3, 4, 5, 6, FP32), device)) == {} and not launched


def test_the_number_of_partial_sums_is_no_constant_of_the_code() -> None:
    """It depends on the batch: Triton would compile anew for 1 and for multiples of 16."""
    launches: list[launch.Launch] = []
    context = launch.Context(context_of(Case(1, 3, 4, 5, 6, FP32), torch.device("cpu")).target)
    context = launch.Context(context.target, execute=launches.append)
    params = MixingParams(torch.empty(70), *[None] * 5)
    for count in (1, 16, 17):
        sum_partials([Partial("norm_weight", torch.empty(count, 70))], params, context)
    assert {item.kernel_name for item in launches} == {"sum_partials"}
    assert [item.args["items"][0][2] for item in launches] == [1.0, 16.0, 17.0]
    assert all(isinstance(item.args["items"][0][2], float) for item in launches)

"""Ways to write a parameter of a module, by its name: first those that PyTorch shows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def swapped(module: nn.Module, name: str, values: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(module.get_submodule(owner), attribute, nn.Parameter(values))


@torch.no_grad()
def copied(module: nn.Module, name: str, values: Tensor) -> None:
    module.get_parameter(name).copy_(values)


@torch.inference_mode()
def copied_in_inference_mode(module: nn.Module, name: str, values: Tensor) -> None:
    module.get_parameter(name).copy_(values)


@torch.no_grad()
def multiplied(module: nn.Module, name: str, values: Tensor) -> None:
    module.get_parameter(name).mul_(-1)


@torch.no_grad()
def sliced(module: nn.Module, name: str, values: Tensor) -> None:
    module.get_parameter(name)[2:5] = values[2:5]


def through_a_view(module: nn.Module, name: str, values: Tensor) -> None:
    module.get_parameter(name).detach().view(-1)[1::2].neg_()


@torch.no_grad()
def for_each(module: nn.Module, name: str, values: Tensor) -> None:
    torch._foreach_copy_([module.get_parameter(name)], [values])


def data_swapped(module: nn.Module, name: str, values: Tensor) -> None:
    module.get_parameter(name).data = values


def data_written(module: nn.Module, name: str, values: Tensor) -> None:
    module.get_parameter(name).data.copy_(values)


def data_for_each(module: nn.Module, name: str, values: Tensor) -> None:
    torch._foreach_copy_([module.get_parameter(name).data], [values])


def through_dlpack(module: nn.Module, name: str, values: Tensor) -> None:
    torch.from_dlpack(module.get_parameter(name).detach()).copy_(values)


def through_numpy(module: nn.Module, name: str, values: Tensor) -> None:
    """Bit patterns: NumPy has no bfloat16."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.itemsize]
    module.get_parameter(name).detach().view(bits).numpy()[...] = values.view(bits).numpy()


def through_shared_memory(module: nn.Module, name: str, values: Tensor) -> None:
    """What another process does: the same memory, mapped a second time."""
    parameter = module.get_parameter(name)
    if not parameter.is_shared():
        parameter.data = parameter.data.clone().share_memory_()
    mine = parameter.untyped_storage()
    other = torch.UntypedStorage._new_shared_filename_cpu(*mine._share_filename_cpu_())
    assert other.data_ptr() != mine.data_ptr()
    torch.empty(0, dtype=values.dtype).set_(other, 0, values.shape).copy_(values)


# Those that PyTorch shows, and those that it does not.
VERSIONED = (
    copied, copied_in_inference_mode, multiplied, sliced, through_a_view, for_each, swapped, data_swapped,
)  # fmt: skip
UNSEEN = data_written, data_for_each, through_dlpack, through_numpy, through_shared_memory

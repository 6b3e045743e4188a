"""Which dtype what is computed in: one place for each such decision."""

from __future__ import annotations

import torch


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and biases beside ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def product_dtype(device: torch.device, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype that matrix products run in: autocast's on ``device`` if it is on, else the weights' own.

    device: that of x. float64 weights stay float64, because autocast leaves float64 tensors alone.
    """
    if weight_dtype == torch.float64 or device.type == "meta":  # asking about "meta" raises
        return weight_dtype
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight_dtype


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

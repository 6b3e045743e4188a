"""Sums of partial results: all that a half's backward is left with, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmixer import configs
from fastmixer.configs import cdiv
from fastmixer.ops.launch import Context, kernels, run
from fastmixer.params import Gradients, MixingParams


class Partial(NamedTuple):
    """Partial sums of the gradient of one parameter.

    name: of the parameter. sums: (P, ...) contiguous, accumulation dtype; the last axes are maybe padded.
    transposed: a sum is the gradient's transpose.
    """

    name: str
    sums: Tensor
    transposed: bool = False


def sum_partials(partials: Sequence[Partial], params: MixingParams, context: Context) -> Gradients:
    """The gradients by name, cut to the parameters' shapes and in their dtypes; one launch, or none."""
    gradients: Gradients = {}
    items, tiles, programs = [], [], 0
    for name, sums, transposed in partials:
        parameter = getattr(params, name)
        out = gradients[name] = torch.empty(parameter.shape, dtype=parameter.dtype, device=sums.device)
        matrix = out.unsqueeze(0) if out.dim() == 1 else out.t() if transposed else out
        sums = sums.view(sums.shape[0], -1, sums.shape[-1])
        N, K = matrix.shape
        tile = configs.sum_tile(N, K, context.target)
        items.append((sums, out, float(sums.shape[0]), N, K, *sums.stride()[:2], *matrix.stride()))
        tiles.append(tile)
        programs += cdiv(N, tile[1]) * cdiv(K, tile[2])
    if items:
        run(context, kernels().sum_partials, programs, items=tuple(items), TILES=tuple(tiles))
    return gradients

"""Convolutions by `ops.winograd_convolution`: 3 by 3 pixels, stride 1, float32 in channels_last on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emr_kernels import ops
from emr_kernels.ops.winograd import TILE, UNIT, compiled

#: Tiles from which it is faster than oneDNN with both weights at hand: fewer have to wait for the weight, four times as
#: large.
_LEAST_TILES = 8
#: The same where the weight is transformed for this one call.
_LEAST_TILES_ONCE = 64


def serves(tensor: torch.Tensor, weight: torch.Tensor, options: tuple[Any, ...], once: bool) -> bool:
    """Whether `convolution` takes an input (or a cotangent) of this convolution, and pays.

    once: the weight is transformed for this call alone.
    """
    stride, padding, dilation, transposed, _, groups = options
    if not (
        weight.dim() == 4
        and tuple(weight.shape[2:]) == (3, 3)
        and max(*stride, *dilation) == 1
        and max(padding) <= 2
        and not transposed
        and groups == 1
        and weight.shape[0] % UNIT == weight.shape[1] % UNIT == 0
        and tensor.is_cpu
        and tensor.dtype is weight.dtype is torch.float32
        and tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and compiled()
    ):
        return False
    tiles = tensor.shape[0] * -(-tensor.shape[2] // TILE) * -(-tensor.shape[3] // TILE)
    return tiles >= (_LEAST_TILES_ONCE if once else _LEAST_TILES)


def convolution(
    tensor: torch.Tensor, packed: torch.Tensor, channels: int, bias: torch.Tensor | None, padding: Sequence[int]
) -> torch.Tensor:
    """The convolution of `[N, C, H, W]` to this many channels, with a weight from `ops.winograd_weight`."""
    samples, _, *extents = tensor.shape
    down, across = (extent + 2 * pad - 2 for extent, pad in zip(extents, padding, strict=True))
    result = tensor.new_empty((samples, down, across, channels))
    ops.winograd_convolution(result, tensor.permute(0, 2, 3, 1), packed, bias, padding)
    return result.permute(0, 3, 1, 2)

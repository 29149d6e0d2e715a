"""Convolutions by `ops.winograd_convolution`: 3 by 3 pixels, stride 1, float32 in channels_last on the CPU.

Rounding does not treat equal neighbourhoods alike here. Where values are compared later on, as in max pooling, that
would decide what is a tie in the plain sum: all pixels of a constant background, with another gradient each. So forward
passes take the plain sum there (`Rule.compared`); the others are linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emr_kernels import ops
from emr_kernels.ops._dispatch import operators
from emr_kernels.ops.winograd import READ, TILE, UNIT

#: Tiles from which it is faster than oneDNN with both weights at hand: fewer have to wait for the weight, four times as
#: large.
_LEAST_TILES = 8
#: The same where the weight is transformed for this one call; and where that is more than the C library keeps for the
#: next call (32 MiB), so that it comes in new pages.
_LEAST_TILES_ONCE, _LEAST_TILES_IN_NEW_PAGES = 64, 256
_LARGE_WEIGHT = (32 << 20) // (4 * READ * READ)


def serves(tensor: torch.Tensor, weight: torch.Tensor, options: tuple[Any, ...], once: bool) -> bool:
    """Whether `convolution` takes an input (or a cotangent) of this convolution, and pays.

    once: the weight is transformed for this call alone.
    """
    stride, padding, dilation, transposed, _, groups = options
    if not (
        tensor.is_cpu
        and weight.dim() == 4
        and tuple(weight.shape[2:]) == (3, 3)
        and weight.shape[0] % UNIT == weight.shape[1] % UNIT == 0
        and max(*stride, *dilation) == 1
        and max(padding) <= 2
        and not transposed
        and groups == 1
        and tensor.dtype is weight.dtype is torch.float32
        and tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and operators["winograd_convolution"].compiled()
    ):
        return False
    tiles = tensor.shape[0] * -(-tensor.shape[2] // TILE) * -(-tensor.shape[3] // TILE)
    if not once:
        return tiles >= _LEAST_TILES
    large = weight.shape[0] * weight.shape[1] > _LARGE_WEIGHT
    return tiles >= (_LEAST_TILES_IN_NEW_PAGES if large else _LEAST_TILES_ONCE)


def convolution(
    tensor: torch.Tensor, packed: torch.Tensor, channels: int, bias: torch.Tensor | None, padding: Sequence[int]
) -> torch.Tensor:
    """The convolution of `[N, C, H, W]` to this many channels, with a weight from `ops.winograd_weight`."""
    samples, _, *extents = tensor.shape
    down, across = (extent + 2 * pad - 2 for extent, pad in zip(extents, padding, strict=True))
    result = tensor.new_empty((samples, down, across, channels))
    dense = None if bias is None else bias.contiguous()
    ops.winograd_convolution(result, tensor.permute(0, 2, 3, 1), packed, dense, padding)
    return result.permute(0, 3, 1, 2)

"""The vjp of convolutions that read few channels, in float32 on the CPU: a product, and a sum of patches.

Such are the first layers of all networks of images. oneDNN computes the transposed convolution for 16 channels at a
time, of which an image has one or three; the product of cotangent and weight has a column for each tap and channel
instead, and the patches that come out of it are added up where they overlap. 1.5 to 8 times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emr_kernels import ops
from emr_kernels.linearize.rules.packed import linear
from emr_kernels.ops._dispatch import operators

#: Of the input; from 16 on the transposed convolution is as fast.
_MOST_CHANNELS = 8
#: Elements of patches at a time, which caches hold.
_CHUNK = 1 << 19


def serves(cotangent: torch.Tensor, weight: torch.Tensor, options: tuple[Any, ...]) -> bool:
    """Whether `vjp` takes a convolution, and pays."""
    _, _, dilation, transposed, _, groups = options
    return (
        weight.dim() == 4
        and weight.shape[1] <= _MOST_CHANNELS
        and not transposed
        and groups == 1
        and max(dilation) == 1
        and cotangent.is_cpu
        and cotangent.dtype is weight.dtype is torch.float32
        and cotangent.numel() > 0
        and operators["fold_patches"].compiled()
    )


def vjp(cotangent: torch.Tensor, weight: torch.Tensor, options: tuple[Any, ...], shape: Sequence[int]) -> torch.Tensor:
    """The cotangent of an input of this shape, `[N, C, H, W]`, in channels_last order.

    cotangent: of the output, `[N, D, OH, OW]`. weight: `[D, C, KH, KW]`.
    """
    stride, padding = options[:2]
    samples, channels, height, width = shape
    taps = weight.permute(2, 3, 1, 0).flatten(0, 2)
    rows = cotangent.permute(0, 2, 3, 1)
    images = cotangent.new_empty((samples, height, width, channels))
    size = max(1, _CHUNK // (rows[0, ..., 0].numel() * len(taps)))
    for part, target in zip(rows.split(size), images.split(size), strict=True):
        patches = linear(part.flatten(0, 2), taps, None)
        ops.fold_patches(target, patches.view(*part.shape[:3], *weight.shape[2:], channels), stride, padding)
    return images.permute(0, 3, 1, 2)

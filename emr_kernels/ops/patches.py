"""Overlapping patches of images summed up where they lie: the transpose of cutting a convolution's patches out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from emr_kernels.ops import _checks, _dispatch


def fold_patches_reference(
    images: torch.Tensor,
    patches: torch.Tensor,
    stride_height: int,
    stride_width: int,
    pad_height: int,
    pad_width: int,
) -> None:
    """`fold_patches` in plain PyTorch."""
    if images.numel() == 0 or patches.numel() == 0:
        images.zero_()
        return
    n, down, across, high, wide, _ = patches.shape
    columns = (
        patches.to(torch.promote_types(patches.dtype, torch.float32))
        .permute(0, 5, 3, 4, 1, 2)
        .reshape(n, -1, down * across)
    )
    extents = ((down - 1) * stride_height + high, (across - 1) * stride_width + wide)
    whole = F.fold(columns, extents, (high, wide), stride=(stride_height, stride_width))[:, :, pad_height:, pad_width:]
    inside = whole[:, :, : images.shape[1], : images.shape[2]].permute(0, 2, 3, 1)
    images.zero_()
    images[:, : inside.shape[1], : inside.shape[2]] = inside.to(images.dtype)


def _fold_patches_fake(
    images: torch.Tensor,
    patches: torch.Tensor,
    stride_height: int,
    stride_width: int,
    pad_height: int,
    pad_width: int,
) -> None:
    return None


_fold_patches = _dispatch.define(
    "fold_patches(Tensor(a!) images, Tensor patches, SymInt stride_height, SymInt stride_width, SymInt pad_height, "
    "SymInt pad_width) -> ()",
    fold_patches_reference,
    _fold_patches_fake,
)


def fold_patches(images: torch.Tensor, patches: torch.Tensor, stride: Sequence[int], padding: Sequence[int]) -> None:
    """Overwrite images with the sums of the patches that lie on each pixel; what is outside of an image is left out.

        images[n, i, j] = sum of patches[n, oy, ox, ky, kx] with oy * stride + ky - padding = i, likewise for j

    With patches = cotangent times weight this is the vjp of a convolution with respect to its input.

    Args:
        images: `[N, H, W, C]`, row-major; float32, bfloat16, float16 or float64. Overwritten.
        patches: `[N, OH, OW, KH, KW, C]`, row-major, like images. Halves are summed in float32.
        stride, padding: of the patches, down and across; at least 1, and at least 0.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout.
        RuntimeError: if a tensor requires grad in grad mode (the operator has no derivative of its own).
    """
    for name, tensor, dims in (("images", images, 4), ("patches", patches, 6)):
        _checks.check_floating(name, tensor)
        if tensor.dim() != dims or not tensor.is_contiguous():
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}; expected {dims} extents, "
                "row-major"
            )
    _checks.check_not_differentiated("fold_patches", images=images, patches=patches)
    if patches.dtype != images.dtype or patches.device != images.device:
        raise ValueError(
            f"patches is {patches.dtype} on {patches.device}; expected {images.dtype} on {images.device}, like images"
        )
    if patches.shape[0] != images.shape[0] or patches.shape[5] != images.shape[3]:
        raise ValueError(
            f"patches has shape {tuple(patches.shape)}; expected [{images.shape[0]}, OH, OW, KH, KW, "
            f"{images.shape[3]}], for images of shape {tuple(images.shape)}"
        )
    for name, pair, least in (("stride", stride, 1), ("padding", padding, 0)):
        if len(pair) != 2 or min(pair) < least:
            raise ValueError(f"{name} is {tuple(pair)}; expected two numbers, at least {least}")
    _fold_patches(images, images, patches, *stride, *padding)

"""Augmentation of whole batches on their device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from emr_training.data.splits import as_floats
from emr_training.errors import check_count


class Mixed(NamedTuple):
    """Augmented images x [N, C, H, W] in [0, 1] with labels y [N]; after CutMix also `other` labels [N].

    share [N] is the part of each image that is its label's own; share * loss(y) + (1 - share) * loss(other) is its
    loss.
    """

    x: Tensor
    y: Tensor
    other: Tensor | None = None
    share: Tensor | None = None

    def labels(self, classes: int) -> Tensor:
        """y [N], or after CutMix the probabilities of the classes, [N, classes], in float32."""
        if self.other is None or self.share is None:
            return self.y
        own, other = (F.one_hot(y, classes).float() for y in (self.y, self.other))
        return other.lerp(own, self.share[:, None])


@dataclass(frozen=True)
class Augmentation:
    """Random crop, mirror, cutout and CutMix, in this order, each image by itself.

    crop_padding: pixels of zero padding on every side before a random crop back to the size.
    flip: mirror left and right half of the images.
    cutout: side of a square set to zero around a random pixel, cut off at the borders (DeVries & Taylor 2017).
    cutmix: paste a window of another image of the batch, its share of the area uniform (Yun et al. 2019).
    """

    crop_padding: int = 0
    flip: bool = False
    cutout: int = 0
    cutmix: bool = False

    def __post_init__(self) -> None:
        check_count("crop_padding", self.crop_padding, low=0)
        check_count("cutout", self.cutout, low=0)

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.crop_padding or self.flip or self.cutout or self.cutmix)

    def __call__(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Mixed:
        """Augment images x [N, C, H, W] (uint8, or floating point in [0, 1]); `generator` is on their device."""
        if self.crop_padding:
            x = self._cropped(x, generator)
        if self.flip:
            flipped = torch.rand(len(x), generator=generator, device=x.device) < 0.5
            x = torch.where(flipped[:, None, None, None], x.flip(3), x)
        if self.cutout:
            x = x.masked_fill(self._square(x, generator)[:, None], 0)
        mixed = self._cut_and_mixed(x, y, generator) if self.cutmix else Mixed(x, y)
        # Bytes to the end: a quarter of the memory to move.
        return mixed._replace(x=as_floats(mixed.x))

    def _cropped(self, x: Tensor, generator: torch.Generator) -> Tensor:
        n, _, height, width = x.shape
        pad = self.crop_padding
        padded = F.pad(x, (pad, pad, pad, pad))
        top, left = (torch.randint(2 * pad + 1, (n, 1), generator=generator, device=x.device) for _ in range(2))
        rows = top + torch.arange(height, device=x.device)
        columns = left + torch.arange(width, device=x.device)
        place = torch.arange(n, device=x.device)[:, None, None]
        # [N, H, W, C] by advanced indexing, back to channels first.
        return padded.movedim(1, 3)[place, rows[:, :, None], columns[:, None, :]].movedim(3, 1).contiguous()

    def _square(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Where each image's square is, [N, H, W]."""
        sides = []
        for extent in x.shape[2:]:
            centre = torch.randint(extent, (len(x), 1), generator=generator, device=x.device)
            start = centre - self.cutout // 2
            place = torch.arange(extent, device=x.device)
            sides.append((place >= start) & (place < start + self.cutout))
        return sides[0][:, :, None] & sides[1][:, None, :]

    def _cut_and_mixed(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Mixed:
        partner = torch.randperm(len(x), generator=generator, device=x.device)
        ratio = torch.rand(len(x), 1, generator=generator, device=x.device).sqrt()
        sides = []
        for extent in x.shape[2:]:
            centre = torch.rand(len(x), 1, generator=generator, device=x.device) * extent
            place = torch.arange(extent, device=x.device) + 0.5
            sides.append((place - centre).abs() <= ratio * extent / 2)
        window = sides[0][:, :, None] & sides[1][:, None, :]
        mixed = torch.where(window[:, None], x[partner], x)
        return Mixed(mixed, y, y[partner], 1 - window.flatten(1).float().mean(1))

"""Random numbers that belong to an image, whatever batch it is attacked in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A logical shift to the right: int64's own repeats the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014), in int64 that wraps around."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


@dataclass(frozen=True)
class Noise:
    """Random numbers by key and stream: a function of both, so that neither order nor company of the images matters.

    keys: [N], int64, one for each image. Streams are numbered by the caller; each holds as many numbers as are asked
    for, the first ones the same whatever the count.
    """

    keys: Tensor

    def subset(self, rows: Tensor) -> Noise:
        """These rows (indices, or a mask [N]) alone."""
        return Noise(self.keys[rows])

    def bits(self, stream: int, count: int) -> Tensor:
        """Random int64 [N, count]: SplitMix64's sequence from a start that key and stream give."""
        offset = (stream * 0x632BE59BD9B4E019 + 2**63) % 2**64 - 2**63  # as int64 would wrap
        start = _mixed(self.keys + offset)
        places = torch.arange(1, count + 1, device=self.keys.device)
        return _mixed(start[:, None] + places * _GOLDEN)

    def uniform(self, stream: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform in [0, 1), [N, *shape]; float32 or float64."""
        bits = {torch.float32: 24, torch.float64: 53}[dtype]
        whole = _shifted(self.bits(stream, math.prod(shape)), 64 - bits)
        return (whole.to(dtype) * 2.0**-bits).view(-1, *shape)

    def normal(self, stream: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard Gaussian, [N, *shape], by Box and Muller's formula; float32 or float64."""
        count = math.prod(shape)
        u = self.uniform(stream, (2, count), dtype)
        radius = (-2 * torch.log1p(-u[:, 0])).sqrt()
        return (radius * torch.cos(2 * math.pi * u[:, 1])).view(-1, *shape)

    def signs(self, stream: int, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """1 or -1 with equal chances, [N, *shape]."""
        return ((self.bits(stream, math.prod(shape)) < 0).to(dtype) * 2 - 1).view(-1, *shape)

    def integers(self, stream: int, count: int, bound: int) -> Tensor:
        """Integers in [0, bound), [N, count], int64."""
        # The remainder's bias is of the order bound / 2^63.
        return _shifted(self.bits(stream, count), 1) % bound

"""Philox4x32-10, the counter-based generator of Salmon et al. 2011 ("Parallel random numbers: as easy as 1, 2, 3").

Every number is a function of a key and a counter alone: no state, and the same numbers on every backend.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_INCREMENTS = (0x9E3779B9, 0xBB67AE85)


def _product(a: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of 32-bit numbers; int64 wraps, which leaves all 64 bits right."""
    product = a * multiplier
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: tuple[torch.Tensor, ...], key: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Ten rounds on four words.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2**32).
        key: two numbers in [0, 2**32).

    Returns:
        four int64 tensors with values in [0, 2**32).
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        high0, low0 = _product(a, _MULTIPLIERS[0])
        high1, low1 = _product(c, _MULTIPLIERS[1])
        a, b, c, d = high1 ^ b ^ first, low1, high0 ^ d ^ second, low0
        first, second = (first + _INCREMENTS[0]) & _MASK, (second + _INCREMENTS[1]) & _MASK
    return a, b, c, d


def words(blocks: torch.Tensor, seed: int, offset: int, stream: int) -> torch.Tensor:
    """The four words of each block `[B]` of a stream (0 or 1): int64 `[B, 4]`.

    The key is the seed; the counter is the block in its lower half, the offset in its upper half and the stream in
    its highest bit.
    """
    high = torch.full_like(blocks, (offset >> 32) | (stream << 31))
    low = torch.full_like(blocks, offset & _MASK)
    return torch.stack(philox((blocks & _MASK, blocks >> 32, low, high), (seed & _MASK, seed >> 32)), -1)

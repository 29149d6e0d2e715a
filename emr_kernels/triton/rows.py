"""What the kernels over rows of logits share. A tile is [ROWS, BLOCK]; rows wider than a block take several."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

_BLOCK = 2048
_TILE = 512

# Below the order of every logit, -inf included.
_NOTHING = tl.constexpr(-(2**63))


def tiling(classes: int) -> dict[str, Any]:
    """Rows and classes of a tile, and warps for it: short rows share a program."""
    block = min(max(triton.next_power_of_2(classes), 16), _BLOCK)
    return {"ROWS": max(_TILE // block, 1), "BLOCK": block, "num_warps": 8 if block == _BLOCK else 4}


@triton.jit
def read(logits, n, k, rows, classes):
    """A tile of logits in float32; 0 outside."""
    inside = (n < rows)[:, None] & (k < classes)[None, :]
    return tl.load(logits + n[:, None] * classes + k[None, :], mask=inside, other=0).to(tl.float32)


@triton.jit
def read_at(logits, n, place, rows, classes):
    """One logit of each row; NaN at a place that no class has."""
    inside = (n < rows) & (place >= 0) & (place < classes)
    return tl.load(logits + n * classes + place, mask=inside, other=float("nan")).to(tl.float32)


@triton.jit
def _order(z, k):
    """Whole numbers that order logits: by value with NaN above everything, then the first class first."""
    bits = tl.where(z == 0, 0.0, z).to(tl.int32, bitcast=True)
    key = tl.where(z != z, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))
    return (key.to(tl.int64) << 32) | (k ^ 0x7FFFFFFF).to(tl.int64)


@triton.jit
def value_of(order):
    """The logit again (of either zero, the positive one)."""
    key = (order >> 32).to(tl.int32)
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def place_of(order):
    """Its class."""
    return (order & 0x7FFFFFFF).to(tl.int32) ^ 0x7FFFFFFF


@triton.jit
def largest(logits, n, rows, classes, RANKS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The order of each row's RANKS <= 4 largest logits, falling."""
    first = tl.full([ROWS], _NOTHING, tl.int64)
    second = first
    third = first
    fourth = first
    for start in range(0, classes, BLOCK):
        k = start + tl.arange(0, BLOCK)
        z = read(logits, n, k, rows, classes)
        order = tl.where((k < classes)[None, :], _order(z, k[None, :]), _NOTHING)
        for _ in tl.static_range(RANKS):
            found = tl.max(order, 1)
            order = tl.where(order == found[:, None], _NOTHING, order)
            # Sink it into the ranks so far; what falls out is not wanted.
            lesser = tl.minimum(first, found)
            first = tl.maximum(first, found)
            found = lesser
            lesser = tl.minimum(second, found)
            second = tl.maximum(second, found)
            found = lesser
            lesser = tl.minimum(third, found)
            third = tl.maximum(third, found)
            fourth = tl.maximum(fourth, lesser)
    return first, second, third, fourth


@triton.jit
def log_one_plus(x):
    """log(1 + x) for x >= 0, to the last bits also where x is small: 2 atanh(x / (2 + x)) there."""
    s = x / (2 + x)
    z = s * s
    small = (s + s) + s * z * ((z * 0.298730761 + 0.399774969) * z + 0.666667759)
    return tl.where(x < 0.41, small, tl.log(1 + x))


@triton.jit
def complement(k, e, first, rest):
    """1 - p, of a class whose exp(z - top) is e: to the last bits also where it has nearly everything."""
    return tl.where(k == first, rest / (1 + rest), 1 - e / (1 + rest))

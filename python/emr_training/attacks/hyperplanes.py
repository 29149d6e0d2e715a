"""The shortest way from a point in the box [0, 1]^D to a hyperplane, without leaving the box."""

from __future__ import annotations

import torch
from torch import Tensor


def to_hyperplane(norm: str, x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """The shortest d under `norm` with <w, d> = -gap and x + d in the box, or the one that comes closest to it.

    Where the hyperplane is out of reach every pixel with a weight goes as far as the box lets it. A pixel without a
    weight stays. Under Linf the move is min(t, room) in every pixel, under L2 min(t |w|, room), for the t that solves
    the equation; under L1 pixels go to the edge of the box in the order of their |w|, the last one part of the way.

    Args:
        norm: "Linf", "L2" or "L1".
        x, w: [M, D].
        gap: [M], by how much the linear function is above zero at x.

    Returns:
        d: [M, D].
    """
    direction = -torch.sign(gap)[:, None] * torch.sign(w)
    room = torch.where(direction > 0, 1 - x, x).clamp_min(0)
    slope, needed = w.abs(), gap.abs()
    room = torch.where(slope > 0, room, 0.0)
    if norm == "L1":
        return direction * _by_slope(slope, room, needed)
    return direction * _together(slope, room, needed, torch.ones_like(slope) if norm == "Linf" else slope)


def _together(slope: Tensor, room: Tensor, needed: Tensor, rate: Tensor) -> Tensor:
    """m = min(t * rate, room) [M, D] for the least t with sum(slope * m) >= needed [M], or m = room.

    The sum is concave and piecewise linear in t, so that Newton's steps from 0 never pass the solution, and each either
    ends on its piece or enters a later one.
    """
    reach = slope * rate
    t = torch.zeros_like(needed)
    moved = torch.zeros_like(room)
    for _ in range(room.shape[1] + 1):
        steepness = _inner(reach, (moved < room).to(room.dtype))
        missing = needed - _inner(slope, moved)
        ahead = torch.where((steepness > 0) & (missing > 0), t + missing / steepness, t)
        if not bool((ahead > t).any()):
            break
        t = ahead
        moved = torch.minimum(t[:, None] * rate, room)
    within = _inner(slope, room) > needed
    return torch.where(within[:, None], moved, room)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, [M, D] and [M, D] to [M]."""
    return torch.linalg.vecdot(a, b)


def _by_slope(slope: Tensor, room: Tensor, needed: Tensor) -> Tensor:
    """The least sum of m in [0, room] with sum(slope * m) = needed [M], or m = room."""
    ranked, order = slope.sort(1, descending=True)
    gain = ranked * room.gather(1, order)
    before = gain.cumsum(1) - gain
    part = ((needed[:, None] - before).clamp_min(0) / gain.clamp_min(torch.finfo(gain.dtype).tiny)).clamp_max(1)
    return room * torch.zeros_like(part).scatter(1, order, part)

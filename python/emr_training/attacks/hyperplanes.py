"""The shortest way from a point in the box [0, 1]^D to a hyperplane, without leaving the box."""

from __future__ import annotations

import torch
from torch import Tensor

from emr_kernels import ops


def to_hyperplane(norm: str, x: Tensor, w: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """The shortest d under `norm` with <w, d> = -gap and x + d in the box, or the one that comes closest to it.

    Under Linf and L2 all pixels move together, see `emr_kernels.ops.to_hyperplane`; under L1 they go to the edge of the
    box in the order of their |w|, the last one part of the way. A pixel without a weight stays.

    Args:
        norm: "Linf", "L2" or "L1".
        x, w: [M, D].
        gap: [M], by how much the linear function is above zero at x.

    Returns:
        d: [M, D], and its norm [M].
    """
    if norm != "L1":
        return ops.to_hyperplane(x, w, gap, norm.lower())
    direction = -torch.sign(gap)[:, None] * torch.sign(w)
    room = torch.where(direction > 0, 1 - x, x).clamp_min(0)
    slope = w.abs()
    moves = _by_slope(slope, torch.where(slope > 0, room, 0.0), gap.abs())
    return direction * moves, moves.sum(1)


def _by_slope(slope: Tensor, room: Tensor, needed: Tensor) -> Tensor:
    """The least sum of m in [0, room] with sum(slope * m) = needed [M], or m = room."""
    ranked, order = slope.sort(1, descending=True)
    gain = ranked * room.gather(1, order)
    before = gain.cumsum(1) - gain
    part = ((needed[:, None] - before).clamp_min(0) / gain.clamp_min(torch.finfo(gain.dtype).tiny)).clamp_max(1)
    return room * torch.zeros_like(part).scatter(1, order, part)

"""The shortest way from points in the box [0, 1]^D to hyperplanes, without leaving the box."""

from __future__ import annotations

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype

_NORMS = ("linf", "l2")


def to_hyperplane_reference(
    x: torch.Tensor, w: torch.Tensor, gap: torch.Tensor, norm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`to_hyperplane` in plain PyTorch."""
    dtype = compute_dtype(x)
    point, normal, needed = x.to(dtype), w.to(dtype), gap.to(dtype).abs()
    direction = -torch.sign(gap.to(dtype))[:, None] * torch.sign(normal)
    room = torch.where(direction > 0, 1 - point, point).clamp_min(0)
    slope = normal.abs()
    room = torch.where(slope > 0, room, 0.0)
    moves = _together(slope, room, needed, torch.ones_like(slope) if norm == "linf" else slope)
    d = direction * moves
    length = torch.linalg.vector_norm(d, torch.inf if norm == "linf" else 2, dim=1) if x.shape[1] else needed * 0
    return d.to(x.dtype), length.to(x.dtype)


def _together(slope: torch.Tensor, room: torch.Tensor, needed: torch.Tensor, rate: torch.Tensor) -> torch.Tensor:
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
        advances = ahead > t
        if not bool(advances.any()):
            break
        t = ahead
        # The others stay: under L2 0 times an infinite weight is no number.
        moved = torch.where(advances[:, None], torch.minimum(t[:, None] * rate, room), moved)
    within = _inner(slope, room) > needed
    return torch.where(within[:, None], moved, room)


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Row by row, [M, D] and [M, D] to [M]."""
    return torch.linalg.vecdot(a, b)


def _to_hyperplane_fake(
    x: torch.Tensor, w: torch.Tensor, gap: torch.Tensor, norm: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(gap)


_to_hyperplane = _dispatch.define(
    "to_hyperplane(Tensor x, Tensor w, Tensor gap, str norm) -> (Tensor, Tensor)",
    to_hyperplane_reference,
    _to_hyperplane_fake,
)


def to_hyperplane(
    x: torch.Tensor, w: torch.Tensor, gap: torch.Tensor, norm: str = "linf"
) -> tuple[torch.Tensor, torch.Tensor]:
    """The shortest d with <w, d> = -gap and x + d in the box, or the one that comes closest to it; and its length.

    Where the hyperplane is out of reach every pixel with a weight goes as far as the box lets it. A pixel without a
    weight stays. Under Linf the move is min(t, room) in every pixel, under L2 min(t |w|, room), for the t that solves
    the equation. This is the projection in FAB (Croce and Hein 2020, equation 5), without its sorting.

    Args:
        x, w: `[M, D]`, x in [0, 1]; float32, bfloat16, float16 or float64. Halves are computed in float32.
        gap: `[M]`, like x: by how much the linear function is above zero at x.
        norm: "linf" or "l2".

    Returns:
        d `[M, D]` and its norm `[M]`.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or norm.
        RuntimeError: if a tensor requires grad in grad mode (the operator has no derivative of its own).
    """
    _checks.check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [M, D]")
    _checks.check_like("w", w, "x", x)
    _checks.check_floating("gap", gap)
    if gap.shape != x.shape[:1] or gap.dtype != x.dtype or gap.device != x.device:
        raise ValueError(
            f"gap has shape {tuple(gap.shape)}, {gap.dtype} on {gap.device}; expected ({x.shape[0]},), {x.dtype} on "
            f"{x.device}, one number for each row of x"
        )
    if norm not in _NORMS:
        raise ValueError(f"norm is {norm!r}; expected one of {', '.join(_NORMS)}")
    _checks.check_not_differentiated("to_hyperplane", x=x, w=w, gap=gap)
    d, length = _to_hyperplane(x, x.contiguous(), w.contiguous(), gap.contiguous(), norm)
    return d, length

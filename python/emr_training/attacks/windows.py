"""What Square proposes: a changed window of the image, under each norm."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from emr_training.attacks.balls import Ball
from emr_training.attacks.base import per_row
from emr_training.attacks.noise import Noise


def _remainder(bits: Tensor, bound: int) -> Tensor:
    """Integers in [0, bound) from random int64."""
    return (bits & (2**63 - 1)) % bound


def _signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return (bits < 0).to(dtype) * 2 - 1


class Proposals(ABC):
    """The points of n images [n, C, H, W], and changes to them, one window for each image.

    `width` is the number of random int64 that a proposal takes for each image.
    """

    width: int

    def __init__(self, ball: Ball, x: Tensor, noise: Noise, stream: int) -> None:
        self.ball = ball
        self.x = x.contiguous()
        self.channels, self.height, self.columns = x.shape[1:]
        self.point = self._start(noise, stream).contiguous()

    @abstractmethod
    def _start(self, noise: Noise, stream: int) -> Tensor: ...

    @abstractmethod
    def side(self, part: float) -> int:
        """The side of a window that covers this part of the image."""

    @abstractmethod
    def propose(self, bits: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Candidates [n, C, H, W] from random int64 [n, width], and which rows differ from `point` [n]."""

    @abstractmethod
    def settle(self, accepted: Tensor) -> None:
        """Make the last candidates the points in the rows `accepted` [n]."""

    def keep(self, stays: Tensor) -> None:
        """Drop all images but these (indices)."""
        self.x, self.point = self.x[stays], self.point[stays]

    def _corner(self, row: Tensor, column: Tensor, side: int) -> tuple[Tensor, Tensor, int, int]:
        """Top and left of each image's window, [n] each, from random int64 [n] each; its height and width."""
        height, width = min(side, self.height), min(side, self.columns)
        top, left = _remainder(row, self.height - height + 1), _remainder(column, self.columns - width + 1)
        return top, left, height, width

    def _pixels(self, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
        """Where the pixels of each image's window are in a flat channel: [n, C, pixels]."""
        down = torch.arange(height, device=top.device)[:, None] * self.columns
        inside = (down + torch.arange(width, device=top.device)).flatten()
        return ((top * self.columns + left)[:, None] + inside)[:, None].expand(-1, self.channels, -1)


class Corners(Proposals):
    """Under Linf: one sign for each channel of the window; there the image +- epsilon, cut to the box."""

    def __init__(self, ball: Ball, x: Tensor, noise: Noise, stream: int) -> None:
        x = x.contiguous()
        self.low, self.high = (x - ball.epsilon).clamp_min(0), (x + ball.epsilon).clamp_max(1)
        super().__init__(ball, x, noise, stream)
        self.width = 2 + self.channels

    def _start(self, noise: Noise, stream: int) -> Tensor:
        """Vertical stripes."""
        signs = noise.signs(stream, (self.channels, 1, self.columns), self.x.dtype)
        return torch.where(signs > 0, self.high, self.low)

    def side(self, part: float) -> int:
        return max(round((part * self.height * self.columns) ** 0.5), 1)

    def propose(self, bits: Tensor, side: int) -> tuple[Tensor, Tensor]:
        # Written into the points themselves and taken back where it does not pay: the windows are small.
        self.corner = self._corner(bits[:, 0], bits[:, 1], side)
        self._place = self._pixels(*self.corner)
        flat = self.point.flatten(2)
        self._old = flat.gather(2, self._place)
        up = (bits[:, 2:] < 0)[:, :, None]
        low, high = (bound.flatten(2).gather(2, self._place) for bound in (self.low, self.high))
        self._new = torch.where(up, high, low)
        flat.scatter_(2, self._place, self._new)
        return self.point, (self._new != self._old).flatten(1).any(1)

    def window(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Top [m], left [m] and pixels [m, C, h, w] of the last windows of the images `rows` [m]."""
        top, left, height, width = self.corner
        return top[rows], left[rows], self._new[rows].view(len(rows), self.channels, height, width)

    def settle(self, accepted: Tensor) -> None:
        self.point.flatten(2).scatter_(2, self._place, torch.where(accepted[:, None, None], self._new, self._old))

    def keep(self, stays: Tensor) -> None:
        super().keep(stays)
        self.low, self.high = self.low[stays], self.high[stays]


def bump(side: int, norm: str) -> Tensor:
    """A hill above a pit, [side, side], of norm 1.

    Each is a stack of nested rectangles: a pixel at distance r from the middle (in the maximum norm) has the sum of
    1 / k^2 (L1: 1 / k^4) over k > r, up to the largest rectangle.
    """
    power = {"L2": 2, "L1": 4}[norm]

    def hill(height: int, width: int) -> Tensor:
        reach = max(height // 2, width // 2) + 1
        levels = torch.arange(1, reach + 1, dtype=torch.float64).pow(-power).flip(0).cumsum(0).flip(0)
        down = (torch.arange(height) - height // 2).abs()[:, None]
        across = (torch.arange(width) - width // 2).abs()
        return _unit(levels[torch.maximum(down, across)], norm)

    if side == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return _unit(torch.cat([hill(side // 2, side), -hill(side - side // 2, side)]), norm)


def _unit(tensor: Tensor, norm: str) -> Tensor:
    return tensor / torch.linalg.vector_norm(tensor, 2 if norm == "L2" else 1)


class Bumps(Proposals):
    """Under L2 and L1: the budget of one window moves into another, in the shape of what was there plus a bump."""

    def __init__(self, ball: Ball, x: Tensor, noise: Noise, stream: int) -> None:
        self._order = 2 if ball.norm == "L2" else 1
        self._pairs: dict[int, Tensor] = {}
        super().__init__(ball, x, noise, stream)
        self.width = 5 + self.channels

    def _pair(self, side: int) -> Tensor:
        """The bump and its transpose, [2, side, side]."""
        if side not in self._pairs:
            shape = bump(side, self.ball.norm)
            self._pairs[side] = torch.stack([shape, shape.T]).to(self.x)
        return self._pairs[side]

    def _norm(self, tensor: Tensor, dims: tuple[int, ...]) -> Tensor:
        return torch.linalg.vector_norm(tensor, self._order, dim=dims, keepdim=True)

    def _start(self, noise: Noise, stream: int) -> Tensor:
        """A grid of 5 x 5 bumps with random signs, at distance epsilon."""
        side = max(min(self.height, self.columns) // 5, 1)
        top, left = (max((size - 5 * side) // 2, 0) for size in (self.height, self.columns))
        rows, columns = (self.height - top) // side, (self.columns - left) // side
        bits = noise.bits(stream, (1 + self.channels) * rows * columns).view(-1, 1 + self.channels, rows, columns)
        tiles = self._pair(side)[(bits[:, :1] < 0).long()] * _signs(bits[:, 1:], self.x.dtype)[..., None, None]
        delta = torch.zeros_like(self.x)
        delta[:, :, top : top + rows * side, left : left + columns * side] = tiles.transpose(3, 4).reshape(
            *tiles.shape[:2], rows * side, columns * side
        )
        return self._inside(self.x, delta)

    def _inside(self, x: Tensor, delta: Tensor) -> Tensor:
        """x + delta, under L2 at distance epsilon and cut to the box, under L1 projected."""
        if self._order == 1:
            return self.ball.project(x + delta, x)
        scaled = delta * (self.ball.epsilon / (self._norm(delta, (1, 2, 3)) + 1e-12))
        return (x + scaled).clamp(0, 1)

    def side(self, part: float) -> int:
        side = max(round((part * self.height * self.columns) ** 0.5), 3)
        return min(side + (side + 1) % 2, self.height, self.columns)

    def propose(self, bits: Tensor, side: int) -> tuple[Tensor, Tensor]:
        target, source = (self._pixels(*self._corner(bits[:, i], bits[:, i + 1], side)) for i in (0, 2))
        delta = (self.point - self.x).flatten(2)
        rest = delta.scatter(2, source, 0.0).scatter_(2, target, 0.0)
        epsilon, order = self.ball.epsilon, self._order
        unused = (epsilon**order - self._norm(delta, (1, 2)) ** order).clamp_min(0) / self.channels
        budget = (unused + self._norm(delta - rest, (2,)) ** order) ** (1 / order)
        old = delta.gather(2, target)
        shape = self._pair(side)[(bits[:, 4] < 0).long()].flatten(1)[:, None]
        new = shape * _signs(bits[:, 5:], delta.dtype)[:, :, None] + old / (self._norm(old, (2,)) + 1e-12)
        new = new * (budget / (self._norm(new, (2,)) + 1e-12))
        # Under L1 the projection cuts what is too much, so that the window may begin with more.
        new = new * self.channels if order == 1 else new
        self._candidate = self._inside(self.x, rest.scatter_(2, target, new).view_as(self.x))
        return self._candidate, (self._candidate != self.point).flatten(1).any(1)

    def settle(self, accepted: Tensor) -> None:
        self.point = torch.where(per_row(accepted, self.point), self._candidate, self.point)

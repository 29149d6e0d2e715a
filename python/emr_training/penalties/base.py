"""The interface of a penalty."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Penalty(Protocol):
    """A term that a defense adds to its loss as `strength * penalty(x, y)`.

    `name` is the term's name in losses and logs; `strength` may be changed between steps by a schedule. A
    call takes the images x [N, ...] at which the defense trains (clean or adversarial) and labels y [N],
    and returns a scalar.
    """

    name: str
    strength: float

    def __call__(self, x: Tensor, y: Tensor) -> Tensor: ...

"""The order of training images, in batches that can be taken up again anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class Order:
    """Shuffled indices into `count` images, batch by batch; each epoch has an order of its own.

    Iterating gives the batches that are left of the epoch, as index tensors on the CPU; the state of an order in the
    middle of an epoch goes on with the same batches.
    """

    def __init__(self, count: int, batch_size: int, generator: torch.Generator, *, drop_last: bool = True) -> None:
        self.batches = count // batch_size if drop_last else -(-count // batch_size)
        self._count, self._batch_size, self._generator = count, batch_size, generator
        self._order: Tensor | None = None
        self._position = 0

    def __iter__(self) -> Iterator[Tensor]:
        if self._order is None:
            self._order = torch.randperm(self._count, generator=self._generator)
        while self._position < self.batches:
            start = self._position * self._batch_size
            self._position += 1
            yield self._order[start : start + self._batch_size]
        self._order, self._position = None, 0

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up again."""
        return {"order": self._order, "position": self._position, "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._order, self._position = state["order"], state["position"]
        self._generator.set_state(state["generator"])

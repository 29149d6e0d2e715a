"""The order of training images, in batches that can be taken up again anywhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from emr_training.config import ConfigError, RunConfig


class Mixture:
    """Batches of which a fixed part comes from further images, numbered after the first `count`.

    An epoch is one of the first images; the others go round on their own. `batch_size` and `extra_size` are how many of
    each are in a batch.
    """

    def __init__(
        self, count: int, extra: int, batch_size: int, extra_size: int, generator: torch.Generator, *, drop_last: bool
    ) -> None:
        self._first = Order(count, batch_size, generator, drop_last=drop_last)
        second = torch.Generator().manual_seed(generator.initial_seed() + 1)
        self._second = Order(extra, extra_size, second)
        self._count, self.batches = count, self._first.batches
        self._left: Iterator[Tensor] = iter(())

    def __iter__(self) -> Iterator[Tensor]:
        for index in self._first:
            yield torch.cat([index, self._count + self._next()])

    def _next(self) -> Tensor:
        # Anew at the end of a round; twice where a saved state is at one.
        while (found := next(self._left, None)) is None:
            self._left = iter(self._second)
        return found

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up again."""
        return {"first": self._first.state_dict(), "second": self._second.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._first.load_state_dict(state["first"])
        self._second.load_state_dict(state["second"])
        self._left = iter(())


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


def make_order(config: RunConfig, count: int, extra: int) -> Order | Mixture:
    """The order of `count` training images, with the configured part of each batch from `extra` further ones.

    Raises ConfigError where that part has not enough images, or leaves none.
    """
    trainer = config.trainer
    generator = torch.Generator().manual_seed(trainer.seed)
    added = round(trainer.batch_size * config.data.extra_fraction) if extra else 0
    if not added:
        return Order(count, trainer.batch_size, generator, drop_last=trainer.drop_last)
    if added > extra or added == trainer.batch_size:
        found = f"{added} of {trainer.batch_size} images of a batch, with {extra} further images"
        raise ConfigError(f"data.extra_fraction is {config.data.extra_fraction}: {found}; expected a share they fill")
    return Mixture(count, extra, trainer.batch_size - added, added, generator, drop_last=trainer.drop_last)

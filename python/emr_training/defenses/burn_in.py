"""One defense for the first epochs, another one after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emr_training.defenses.base import Defense, Losses
from emr_training.errors import check_count
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class BurnIn(Defense):
    """`first` in the epochs before `epoch` (the first is 1), `then` from there on: MAIL starts so."""

    first: Defense
    then: Defense
    epoch: int

    def __post_init__(self) -> None:
        check_count("epoch", self.epoch)

    @property
    def penalties(self) -> Sequence[Penalty]:  # type: ignore[override]
        """The penalties of both, each once."""
        found = {id(penalty): penalty for penalty in (*self.first.penalties, *self.then.penalties)}
        return tuple(found.values())

    def at_epoch(self, epoch: int) -> Defense:
        """The defense to use in this epoch."""
        return (self.first if epoch < self.epoch else self.then).at_epoch(epoch)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Raises RuntimeError: which defense it is depends on the epoch."""
        raise RuntimeError("BurnIn was called itself; expected a call of what at_epoch(epoch) returns")

"""A defense whose attack grows over the first epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from emr_training.defenses.base import Defense, Losses
from emr_training.errors import check_count
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class Rising(Defense):
    """`then`, with the fraction epoch / epochs of its attack's epsilon and step size while that is below 1.

    From a large radius at the start, a small network on digits of one colour learns to give every image the same
    logits, and stays there.

    then: a defense with an `attack`.
    epochs: the first epoch (from 1) with the whole radius.
    """

    then: Defense
    epochs: int

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)

    @property
    def penalties(self) -> Sequence[Penalty]:  # type: ignore[override]
        """Those of the defense."""
        return self.then.penalties

    def at_epoch(self, epoch: int) -> Defense:
        """The defense to use in this epoch."""
        then: Any = self.then.at_epoch(epoch)
        share = epoch / self.epochs
        if share >= 1:
            return then
        attack = then.attack
        scaled = {
            name: value * share
            for name in ("epsilon", "step_size", "start_std")
            if (value := getattr(attack, name, None)) is not None
        }
        return replace(then, attack=replace(attack, **scaled))

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Raises RuntimeError: how large the attack is depends on the epoch."""
        raise RuntimeError("Rising was called itself; expected a call of what at_epoch(epoch) returns")

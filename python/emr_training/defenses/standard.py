"""Standard training: no defense but its penalties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emr_kernels import robust_loss
from emr_training.defenses.base import Defense, Losses, with_penalties
from emr_training.errors import check_smoothing
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class Standard(Defense):
    """Cross-entropy at the clean images, and the penalties there. With `EMR`: standard training + EMR.

    smoothing: of the labels, in [0, 1): 1 - smoothing + smoothing / C on the label, smoothing / C elsewhere.
    """

    penalties: Sequence[Penalty] = ()
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Loss terms for images x [N, ...] and labels y [N] (int64)."""
        logits = model(x)
        terms = {"cross_entropy": robust_loss(logits, y=y, kind="ce", smoothing=self.smoothing).mean()}
        return Losses(with_penalties(terms, self.penalties, x, y), logits)

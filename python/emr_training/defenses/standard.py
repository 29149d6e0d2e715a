"""Standard training: no defense but its penalties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_training.defenses.base import Losses, with_penalties
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class Standard:
    """Cross-entropy at the clean images, and the penalties there. With `EMR`: standard training + EMR."""

    penalties: Sequence[Penalty] = ()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Loss terms for images x [N, ...] and labels y [N] (int64)."""
        logits = model(x)
        terms = {"cross_entropy": F.cross_entropy(logits, y)}
        return Losses(with_penalties(terms, self.penalties, x, y), logits)

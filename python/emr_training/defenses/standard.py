"""Standard training: no defense but its penalties."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emr_training.defenses.base import Defense, Losses, cross_entropy, with_penalties
from emr_training.errors import check_number, check_smoothing
from emr_training.guard import logits_of
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class Standard(Defense):
    """Cross-entropy at the clean images, and the penalties there. With `EMR`: standard training + EMR.

    smoothing: of the labels, in [0, 1): 1 - smoothing + smoothing / C on the label, smoothing / C elsewhere.
    logit_margin: subtracted from the label's logit (Hypersphere Embedding's scale * m).
    """

    penalties: Sequence[Penalty] = ()
    smoothing: float = 0.0
    logit_margin: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)
        check_number("logit_margin", self.logit_margin, low=0.0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Loss terms for images x [N, ...] and labels y [N] (int64) or [N, C]."""
        logits = logits_of(model, x)
        loss = cross_entropy(logits, y, logit_margin=self.logit_margin, smoothing=self.smoothing)
        terms = {"cross_entropy": loss.mean()}
        return Losses(with_penalties(terms, self.penalties, x, y), logits)

"""PGD adversarial training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_training.attacks import Attack
from emr_training.defenses.base import Losses, with_penalties
from emr_training.guard import bare
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class PGDAT:
    """Cross-entropy at adversarial examples x' = attack(x) (Madry et al. 2018), and the penalties at x'.

    With `EMR` this is AT-EMR (Liu & Chan 2022), whose penalty is taken at the adversarial example.
    """

    attack: Attack
    penalties: Sequence[Penalty] = ()

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Loss terms for images x [N, ...] in [0, 1] and labels y [N] (int64)."""
        x_adv = self.attack(bare(model), x, y, generator=generator)
        logits = model(x_adv)
        terms = {"cross_entropy": F.cross_entropy(logits, y)}
        return Losses(with_penalties(terms, self.penalties, x_adv, y), logits)

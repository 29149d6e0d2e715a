"""MART: misclassification-aware adversarial training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emr_kernels import robust_loss
from emr_training.attacks import Attack
from emr_training.defenses.base import Defense, Losses, with_penalties
from emr_training.defenses.mail import MAIL, weighting
from emr_training.errors import check_number
from emr_training.guard import bare, logits_of
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class MART(Defense):
    """mean BCE(p', y) + beta * mean KL(p || p') (1 - p_y), p at x and p' at x' = attack(x) (Wang et al. 2020).

    BCE = -log p'_y - log(1.0001 - max over j != y of p'_j + 1e-12). Nothing is held constant: the gradient flows
    through p, 1 - p_y included. The penalties are taken at x'.

    mail: sample weights of BCE (MAIL-MART); None: all 1.
    """

    attack: Attack
    beta: float = 6.0
    penalties: Sequence[Penalty] = ()
    mail: MAIL | None = None

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Loss terms for images x [N, ...] in [0, 1] and labels y [N] (int64); the logits are the adversarial ones."""
        x_adv = self.attack(bare(model), x, y, generator=generator)
        clean = logits_of(model, x)
        logits = logits_of(model, x_adv)
        options = weighting(self.mail, logits, y)
        loss = robust_loss(logits, clean, y, kind="mart", beta=self.beta, **options)
        return Losses(with_penalties({"mart": loss.mean()}, self.penalties, x_adv, y), logits)

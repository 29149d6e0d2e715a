"""Adversarial training on cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emr_training.attacks import Attack
from emr_training.defenses.base import Defense, Losses, cross_entropy, likeliest, with_penalties
from emr_training.defenses.mail import MAIL, weighting
from emr_training.errors import check_number, check_smoothing
from emr_training.guard import bare, logits_of
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class PGDAT(Defense):
    """Cross-entropy at adversarial examples x' = attack(x) (Madry et al. 2018), and the penalties at x'.

    With `EMR` this is AT-EMR (Liu & Chan 2022), whose penalty is taken at the adversarial example; with an attack of
    one random step (`RFGSM`) fast adversarial training (Wong et al. 2020); with `mail` MAIL-AT.

    smoothing: of the labels, in [0, 1).
    mail: sample weights; None: all 1.
    clean_forward: the clean images also pass through the model, for BatchNorm's running statistics alone, as in the
        released MAIL code.
    logit_margin: subtracted from the label's logit (Hypersphere Embedding's scale * m).
    """

    attack: Attack
    penalties: Sequence[Penalty] = ()
    smoothing: float = 0.0
    mail: MAIL | None = None
    clean_forward: bool = False
    logit_margin: float = 0.0

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)
        check_number("logit_margin", self.logit_margin, low=0.0)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Loss terms for images x [N, ...] in [0, 1] and labels y [N] (int64) or [N, C]."""
        x_adv = self.attack(bare(model), x, likeliest(y), generator=generator)
        if self.clean_forward:
            with torch.no_grad():
                logits_of(bare(model), x)
        logits = logits_of(model, x_adv)
        options = {"logit_margin": self.logit_margin, "smoothing": self.smoothing}
        loss = cross_entropy(logits, y, **options, **weighting(self.mail, logits, y))
        return Losses(with_penalties({"cross_entropy": loss.mean()}, self.penalties, x_adv, y), logits)

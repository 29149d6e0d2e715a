"""TRADES: clean cross-entropy, and the divergence of the prediction on the adversarial example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emr_kernels import robust_loss
from emr_training.attacks import Attack
from emr_training.defenses.base import Defense, Losses, cross_entropy, likeliest, with_penalties
from emr_training.defenses.mail import MAIL, weighting
from emr_training.errors import check_count, check_number, check_smoothing
from emr_training.guard import bare, logits_of
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class TRADES(Defense):
    """mean CE(f(x), y) + beta * mean KL(p(x) || p(x')) with x' = attack(x) (Zhang et al. 2019), the penalties at x'.

    The gradient flows through both predictions. The attack of the paper is `PGD(..., loss="kl", start_std=0.001,
    keep="last")`.

    smoothing: of the labels, in [0, 1).
    mail: sample weights of the divergence (MAIL-TRADES); None: all 1.
    clean_forwards: 1, or 2 as in the released code, which runs x again for the divergence, after x': the same loss, but
        BatchNorm's running statistics see x twice.
    batch_size: the nominal one that the sum of divergences is divided by; None: the batch's own.
    logit_margin: subtracted from the label's logit in the cross-entropy (Hypersphere Embedding's scale * m).
    """

    attack: Attack
    beta: float = 6.0
    penalties: Sequence[Penalty] = ()
    smoothing: float = 0.0
    mail: MAIL | None = None
    clean_forwards: int = 1
    batch_size: int | None = None
    logit_margin: float = 0.0

    def __post_init__(self) -> None:
        check_number("beta", self.beta, low=0.0)
        check_smoothing(self.smoothing)
        check_number("logit_margin", self.logit_margin, low=0.0)
        if self.clean_forwards not in (1, 2):
            raise ValueError(f"clean_forwards is {self.clean_forwards}; expected 1 or 2")
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Losses:
        """Loss terms for images x [N, ...] in [0, 1] and labels y [N] (int64) or [N, C]; the logits are the clean."""
        label = likeliest(y)
        x_adv = self.attack(bare(model), x, label, generator=generator)
        logits = logits_of(model, x)
        adversarial = logits_of(model, x_adv)
        clean = logits_of(model, x) if self.clean_forwards == 2 else logits
        divergence = robust_loss(adversarial, clean, label, kind="kl", **weighting(self.mail, adversarial, y))
        loss = cross_entropy(logits, y, logit_margin=self.logit_margin, smoothing=self.smoothing)
        terms = {
            "cross_entropy": loss.mean(),
            "divergence": self.beta * divergence.sum() / (self.batch_size or len(x)),
        }
        return Losses(with_penalties(terms, self.penalties, x_adv, y), logits)

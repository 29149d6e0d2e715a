"""Weights of samples by their probabilistic margins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from emr_kernels.ops import logit_seeds
from emr_training.errors import check_number


@dataclass(frozen=True)
class MAIL:
    """MAIL's sample weights (Wang et al. 2021), to be given to PGDAT, TRADES or MART.

    With PM = p'_y - max over j != y of p'_j at the adversarial example, held constant:

        w = 3 sigmoid(slope * (bias - PM))              as the released code has it, and by default
        w = sigmoid(slope * (bias - PM)) / its mean     as the paper has it, with `normalize`
    """

    slope: float
    bias: float
    normalize: bool = False

    def __post_init__(self) -> None:
        check_number("slope", self.slope)
        check_number("bias", self.bias)

    def options(self, logits: Tensor, y: Tensor) -> dict[str, Any]:
        """The arguments that make `emr_kernels.robust_loss` weigh by these, for adversarial logits [N, C]."""
        if not self.normalize:
            return {"mail": (self.slope, self.bias)}
        margin = logit_seeds(logits.detach(), y, kind="margin").probability_margin
        weights = torch.sigmoid(self.slope * (self.bias - margin))
        return {"weights": weights / weights.mean()}


def weighting(mail: MAIL | None, logits: Tensor, y: Tensor) -> dict[str, Any]:
    """The arguments of `robust_loss` for these weights; none without. Raises ValueError for class probabilities y."""
    if mail is None:
        return {}
    if y.dim() != 1:
        raise ValueError("y holds class probabilities with MAIL's weights; expected one label an image")
    return mail.options(logits, y)

"""What a defense is, and the named loss terms that it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_kernels import robust_loss
from emr_training.penalties import Penalty


@dataclass(frozen=True)
class Losses:
    """The terms of a batch's loss, scalars that carry their weights, and the logits [N, C] behind them."""

    terms: dict[str, Tensor]
    logits: Tensor

    @property
    def total(self) -> Tensor:
        """The sum of the terms: what to call `backward()` on."""
        return torch.stack(list(self.terms.values())).sum()


class Defense(ABC):
    """Computes the training loss of a model on a batch: images x [N, ...] in [0, 1], labels y [N] (int64).

    Standard training, adversarial training and TRADES also take labels as class probabilities [N, C], as CutMix makes
    them: cross-entropy is against these; attacks and penalties get the likeliest class of each image.

    The model is called in the mode the caller left it in; `generator` is the source of an attack's random start.
    """

    #: What is added to the defense's own terms.
    penalties: Sequence[Penalty]

    @abstractmethod
    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Losses: ...

    def at_epoch(self, epoch: int) -> Defense:
        """The defense to use in this epoch (the first is 1)."""
        return self


def likeliest(y: Tensor) -> Tensor:
    """Labels [N] as they are, of class probabilities [N, C] the greatest one's class (the first among equals)."""
    return y if y.dim() == 1 else y.argmax(1)


def cross_entropy(
    logits: Tensor, y: Tensor, *, logit_margin: float = 0.0, smoothing: float = 0.0, **options: Any
) -> Tensor:
    """Cross-entropy of each row, [N], in float32 (float64 for float64), against labels y [N] or probabilities [N, C].

    logit_margin: subtracted from the label's logit, as Hypersphere Embedding does (scale * m).
    smoothing: with t of it the labels are (1 - t) y + t / C.
    options: further ones of `emr_kernels.robust_loss`.

    Raises ValueError for class probabilities with a margin.
    """
    if y.dim() == 1:
        if logit_margin:
            logits = logits - logit_margin * F.one_hot(y, logits.shape[1]).to(logits.dtype)
        return robust_loss(logits, y=y, kind="ce", smoothing=smoothing, **options)
    if logit_margin:
        raise ValueError(f"logit_margin is {logit_margin} with class probabilities as y; expected one label an image")
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, y.to(wide.dtype), reduction="none", label_smoothing=smoothing)


def with_penalties(terms: dict[str, Tensor], penalties: Sequence[Penalty], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """`terms` and one term for each penalty, evaluated at x after the defense's own forward passes.

    A penalty at strength 0 is not evaluated. Raises ValueError when two terms share a name.
    """
    result = dict(terms)
    for penalty in penalties:
        if penalty.name in result:
            raise ValueError(f"penalty name {penalty.name!r} is taken; expected a name other than {sorted(result)}")
        if penalty.strength:
            result[penalty.name] = penalty.strength * penalty(x, likeliest(y))
    return result

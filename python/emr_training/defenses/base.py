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


def cross_entropy(logits: Tensor, y: Tensor, *, logit_margin: float = 0.0, **options: Any) -> Tensor:
    """Cross-entropy of each row, [N], in float32; `options` are those of `emr_kernels.robust_loss`.

    logit_margin: subtracted from the label's logit, as Hypersphere Embedding does (scale * m).
    """
    if logit_margin:
        logits = logits - logit_margin * F.one_hot(y, logits.shape[1]).to(logits.dtype)
    return robust_loss(logits, y=y, kind="ce", **options)


def with_penalties(terms: dict[str, Tensor], penalties: Sequence[Penalty], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """`terms` and one term for each penalty, evaluated at x after the defense's own forward passes.

    A penalty at strength 0 is not evaluated. Raises ValueError when two terms share a name.
    """
    result = dict(terms)
    for penalty in penalties:
        if penalty.name in result:
            raise ValueError(f"penalty name {penalty.name!r} is taken; expected a name other than {sorted(result)}")
        if penalty.strength:
            result[penalty.name] = penalty.strength * penalty(x, y)
    return result

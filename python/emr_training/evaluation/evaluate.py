"""Everything the report says about one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from emr_kernels import effective_margins, effective_weight_norms
from emr_training.attacks import PGD
from emr_training.data import Data
from emr_training.evaluation.accuracy import Accuracy, clean_accuracy, robust_accuracy

NORM_TEMPERATURE = 1.0


@dataclass(frozen=True)
class Evaluation:
    """Accuracies of one model, and per-sample effective margins [N] (L2) and effective weight norms [N] (L2).

    Margins are signed: negative where the model is wrong. The weight norm is that of the class mix
    softmax(z), at temperature 1 whatever the model was trained with, so that models can be compared.
    """

    clean: Accuracy
    robust: dict[float, Accuracy]
    margins: Tensor
    weight_norms: Tensor

    @property
    def median_margin(self) -> float:
        """Median effective margin, in units of the [0, 1] pixels (L2)."""
        return float(self.margins.median())

    @property
    def median_weight_norm(self) -> float:
        """Median effective weight norm, in logits per unit of the [0, 1] pixels (L2)."""
        return float(self.weight_norms.median())

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "clean_accuracy": self.clean.as_dict(),
            "robust_accuracy": [{"epsilon": e, **a.as_dict()} for e, a in self.robust.items()],
            "median_effective_margin_l2": self.median_margin,
            "median_effective_weight_norm_l2": self.median_weight_norm,
            "effective_margins_l2": [round(float(m), 6) for m in self.margins],
        }


def evaluate(model: nn.Module, data: Data, epsilons: Sequence[float], attack: PGD) -> Evaluation:
    """Evaluate `model` on `data`: clean, under `attack`, and its margins.

    The attack runs once at each of `epsilons`; its own epsilon is ignored.
    """
    return Evaluation(
        clean=clean_accuracy(model, data),
        robust={e: robust_accuracy(model, data, replace(attack, epsilon=e)) for e in epsilons},
        margins=effective_margins(model, data.images(), data.y, ord=2).detach().cpu(),
        weight_norms=effective_weight_norms(model, data.images(), temperature=NORM_TEMPERATURE).detach().cpu(),
    )

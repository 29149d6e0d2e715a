"""Clean and robust accuracy with their sampling error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import nn

from emr_training.attacks import PGD, Attack
from emr_training.data import Data
from emr_training.errors import check_logits
from emr_training.guard import left_as_found, logits_of


@dataclass(frozen=True)
class Accuracy:
    """`correct` of `total` samples classified right."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        """The fraction correct, in [0, 1]."""
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        """The binomial standard error sqrt(p (1 - p) / n) of that fraction."""
        return sqrt(self.value * (1 - self.value) / self.total)

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval for the fraction, right near 0 and 1 too; z = 1.96 covers 95%."""
        n, p = self.total, self.value
        center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
        half = z / (1 + z**2 / n) * sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return max(0.0, center - half), min(1.0, center + half)

    def as_dict(self) -> dict[str, float]:
        """The numbers, for JSON."""
        low, high = self.interval()
        return {
            "value": self.value,
            "correct": self.correct,
            "total": self.total,
            "standard_error": self.standard_error,
            "low95": low,
            "high95": high,
        }


def clean_accuracy(model: nn.Module, data: Data, batch_size: int = 1024) -> Accuracy:
    """Accuracy of the model in evaluation mode on `data`; the model is left as it was found."""
    return Accuracy(sum(_correct(model, part) for part in parts(data, batch_size)), len(data))


def robust_accuracy(model: nn.Module, data: Data, attack: Attack, batch_size: int = 1024) -> Accuracy:
    """Accuracy of the model in evaluation mode on the attack's images; the model is left as it was found."""
    found = (Data(attack(model, part.x, part.y), part.y) for part in parts(data, batch_size))
    return Accuracy(sum(_correct(model, attacked) for attacked in found), len(data))


def robust_curve(
    model: nn.Module, data: Data, attack: PGD, spacing: float, known: Mapping[float, Accuracy] | None = None
) -> list[tuple[float, Accuracy]]:
    """Robust accuracy at epsilon = 0, spacing, 2 * spacing, ... until none is right, or to 1.

    The attack's step size must be None, so that it grows with epsilon. `known` holds accuracies under the
    same attack that need no second run. An accuracy that stays above zero at epsilon = 1, where every image
    can become any other, means that the attack fails, not that the model is robust.
    """
    if attack.step_size is not None:
        raise ValueError(f"attack.step_size is {attack.step_size}; expected None, which scales it with epsilon")
    known = known or {}
    curve = [(0.0, clean_accuracy(model, data))]
    while curve[-1][1].correct and curve[-1][0] < 1:
        epsilon = min(1.0, round(len(curve) * spacing, 10))
        accuracy = known.get(epsilon) or robust_accuracy(model, data, replace(attack, epsilon=epsilon))
        curve.append((epsilon, accuracy))
    return curve


def parts(data: Data, batch_size: int) -> Iterator[Data]:
    """The data in batches, images as floating point in [0, 1]."""
    for start in range(0, len(data), batch_size):
        part = slice(start, start + batch_size)
        yield Data(data.images(part), data.y[part])


def _correct(model: nn.Module, data: Data) -> int:
    with left_as_found(model, data.x.device), torch.no_grad():
        logits = logits_of(model, data.x)
    check_logits(logits, data.y)
    return int((logits.argmax(1) == data.y).sum())

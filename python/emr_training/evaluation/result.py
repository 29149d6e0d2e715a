"""What an evaluation finds, image by image, and its form in JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from emr_training.attacks.balls import Norm
from emr_training.costs import Costs
from emr_training.evaluation.accuracy import Accuracy
from emr_training.evaluation.names import epsilon_text

#: The name of what is left of all attacks at one radius.
WORST = "worst case"
_QUANTITIES = ("margins", "weight_norms", "probabilistic")


@dataclass(frozen=True)
class AttackResult:
    """One attack at one radius.

    settings: of the attack. robust: [N], which images are classified right, both as they are and attacked.
    costs: of its run; none where the run for another radius served.
    details: distances of an attack that looks for the nearest success; each attack of an ensemble.
    """

    name: str
    epsilon: float
    settings: dict[str, Any]
    robust: Tensor
    costs: Costs = field(default_factory=Costs)
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def accuracy(self) -> Accuracy:
        """The robust accuracy."""
        return accuracy_of(self.robust)

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON; the images as a string of 1 (robust) and 0."""
        return {
            "name": self.name,
            "epsilon": self.epsilon,
            "epsilon_text": epsilon_text(self.epsilon),
            "accuracy": self.accuracy.as_dict(),
            "settings": self.settings,
            "costs": vars(self.costs),
            **({"details": self.details} if self.details else {}),
            "robust": _bits(self.robust),
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> AttackResult:
        """The result of `as_dict`."""
        return AttackResult(
            values["name"],
            values["epsilon"],
            values["settings"],
            _tensor(values["robust"]),
            Costs(**values["costs"]),
            values.get("details", {}),
        )


@dataclass(frozen=True)
class Margins:
    """Per-image quantities [N] at clean images (epsilon 0) or at those that PGD found within epsilon.

    margins: effective margins, signed: negative where the model is wrong. weight_norms: of the class mix softmax(z), at
    temperature 1 whatever the model was trained with, so that models can be compared. probabilistic: p_y minus the
    largest other probability, in [-1, 1]. norm: in which the margins are distances, in units of the [0, 1] pixels; the
    weight norms are those of its dual.
    """

    epsilon: float
    norm: Norm
    margins: Tensor
    weight_norms: Tensor
    probabilistic: Tensor

    @property
    def median_margin(self) -> float:
        """Median effective margin."""
        return float(self.margins.median())

    @property
    def median_weight_norm(self) -> float:
        """Median effective weight norm, in logits per unit of the [0, 1] pixels."""
        return float(self.weight_norms.median())

    def quartiles(self) -> dict[str, dict[str, float | None]]:
        """The quartiles of each quantity."""
        return {name: quartiles(getattr(self, name)) for name in _QUANTITIES}

    def as_dict(self) -> dict[str, Any]:
        """Quartiles and the images' own numbers, for JSON; null for what is not finite."""
        values = {name: getattr(self, name).tolist() for name in _QUANTITIES}
        rounded = {name: [_rounded(v) for v in given] for name, given in values.items()}
        return {"epsilon": self.epsilon, "norm": self.norm, "quartiles": self.quartiles(), "images": rounded}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Margins:
        """The quantities of `as_dict`; what was null is infinite."""
        tensors = {
            name: torch.tensor([math.inf if v is None else v for v in numbers])
            for name, numbers in values["images"].items()
        }
        return Margins(values["epsilon"], values["norm"], **tensors)


@dataclass(frozen=True)
class Evaluation:
    """What is known of a model on N images.

    correct: [N], which images are classified right as they are. attacks: in the order in which they ran.
    margins: at the clean images and at attacked ones; empty where they were not asked for. norm: of every epsilon.
    costs: of classifying the clean images and of the margins.
    """

    norm: Norm
    correct: Tensor
    attacks: tuple[AttackResult, ...] = ()
    margins: tuple[Margins, ...] = ()
    costs: Costs = field(default_factory=Costs)

    @property
    def clean(self) -> Accuracy:
        """Accuracy on the images as they are."""
        return accuracy_of(self.correct)

    @property
    def epsilons(self) -> tuple[float, ...]:
        """The radii of the attacks, the smallest first."""
        return tuple(sorted({a.epsilon for a in self.attacks}))

    def find(self, name: str, epsilon: float) -> AttackResult | None:
        """This attack's result at this radius, if there is one."""
        return next((a for a in self.attacks if a.name == name and a.epsilon == epsilon), None)

    def robust(self, name: str) -> dict[float, Accuracy]:
        """Robust accuracy under this attack, by radius."""
        return {a.epsilon: a.accuracy for a in self.attacks if a.name == name}

    def worst(self, epsilon: float) -> Accuracy:
        """The part of the images that is right as they are and under every attack within epsilon."""
        robust = self.correct
        for attack in self.attacks:
            if attack.epsilon == epsilon:
                robust = robust & attack.robust
        return accuracy_of(robust)

    def margins_at(self, epsilon: float) -> Margins | None:
        """The margins at this radius (0: at clean images), if they were asked for."""
        return next((m for m in self.margins if m.epsilon == epsilon), None)

    @property
    def total_costs(self) -> Costs:
        """Of everything."""
        return reduce(Costs.plus, (attack.costs for attack in self.attacks), self.costs)

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "norm": self.norm,
            "images": len(self.correct),
            "clean": {"accuracy": self.clean.as_dict(), "correct": _bits(self.correct)},
            "attacks": [attack.as_dict() for attack in self.attacks],
            "worst_case": [
                {
                    "epsilon": epsilon,
                    "epsilon_text": epsilon_text(epsilon),
                    "attacks": [a.name for a in self.attacks if a.epsilon == epsilon],
                    "accuracy": self.worst(epsilon).as_dict(),
                }
                for epsilon in self.epsilons
            ],
            "margins": [margins.as_dict() for margins in self.margins],
            "costs": {"other": vars(self.costs), "total": vars(self.total_costs)},
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Evaluation:
        """The evaluation of `as_dict`."""
        return Evaluation(
            values["norm"],
            _tensor(values["clean"]["correct"]),
            tuple(AttackResult.from_dict(attack) for attack in values["attacks"]),
            tuple(Margins.from_dict(margins) for margins in values["margins"]),
            Costs(**values["costs"]["other"]),
        )


def attack_rows(evaluations: Sequence[Evaluation]) -> list[tuple[str, float, list[Accuracy | None]]]:
    """Each attack at each radius with the accuracies of all evaluations (None where it did not run), by radius.

    Where a radius has several attacks, the last one is their worst case, of whichever ran.
    """
    runs = dict.fromkeys((a.name, a.epsilon) for evaluation in evaluations for a in evaluation.attacks)
    rows: list[tuple[str, float, list[Accuracy | None]]] = []
    for epsilon in sorted({epsilon for _, epsilon in runs}):
        names = [name for name, radius in runs if radius == epsilon]
        for name in names:
            found = [evaluation.find(name, epsilon) for evaluation in evaluations]
            rows.append((name, epsilon, [None if a is None else a.accuracy for a in found]))
        if len(names) > 1:
            rows.append((WORST, epsilon, [e.worst(epsilon) if epsilon in e.epsilons else None for e in evaluations]))
    return rows


def accuracy_of(right: Tensor) -> Accuracy:
    """The accuracy of a boolean tensor [N]."""
    return Accuracy(int(right.sum()), len(right))


def quartiles(values: Tensor) -> dict[str, float | None]:
    """The quartiles of values [N], each one of them (the lower, between two); None for one that is not finite."""
    found = torch.quantile(values.double(), torch.tensor([0.25, 0.5, 0.75]).double(), interpolation="lower")
    return {name: _rounded(float(v)) for name, v in zip(("q25", "median", "q75"), found, strict=True)}


def _rounded(value: float) -> float | None:
    """Six digits of it, which float32 has; None for what is not finite."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _bits(right: Tensor) -> str:
    return "".join("01"[bit] for bit in right.int().tolist())


def _tensor(bits: str) -> Tensor:
    return torch.tensor([bit == "1" for bit in bits])

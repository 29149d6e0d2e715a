"""What an evaluation by AutoAttack says."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from emr_training.attacks.state import ROBUST, WRONG, Record, State


@dataclass(frozen=True)
class AttackOutcome:
    """One attack of the ensemble.

    robust_accuracy: after it, a fraction of all images.
    attacked, broken: images it was given (those that survived what ran before) and images it broke.
    forwards, backwards: images run through the model forward and backward.
    """

    name: str
    robust_accuracy: float
    attacked: int
    broken: int
    forwards: int
    backwards: int
    seconds: float


@dataclass(frozen=True)
class AutoAttackResult:
    """Robust accuracy under the whole ensemble, and what each attack had in it.

    attacks: in the order in which they ran; what an attack breaks depends on what ran before it.
    broken_by: for each image the name of the attack that broke it, "clean" if it was misclassified from the beginning,
        None if it is robust.
    predicted: [N], the class at the adversarial example (at the image itself where it is robust).
    settings: norm, epsilon, version, order, seed.
    warnings: signs that the robust accuracy may be overestimated.
    """

    clean_accuracy: float
    robust_accuracy: float
    attacks: tuple[AttackOutcome, ...]
    broken_by: tuple[str | None, ...]
    predicted: Tensor
    settings: dict[str, Any]
    warnings: tuple[str, ...]

    @property
    def robust(self) -> Tensor:
        """Which images are robust, [N]."""
        return torch.tensor([name is None for name in self.broken_by])

    @property
    def seconds(self) -> float:
        """Of all attacks."""
        return sum(attack.seconds for attack in self.attacks)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain numbers, strings and lists, for JSON."""
        return {
            **self.settings,
            "images": len(self.broken_by),
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "attacks": [asdict(attack) for attack in self.attacks],
            "broken_by": list(self.broken_by),
            "predicted": self.predicted.tolist(),
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }

    def __str__(self) -> str:
        rows = [f"{'attack':<12}{'robust':>9}{'broken':>8}{'forward':>11}{'backward':>11}{'seconds':>10}"]
        rows.append(f"{'clean':<12}{self.clean_accuracy:>9.2%}")
        for a in self.attacks:
            rows.append(
                f"{a.name:<12}{a.robust_accuracy:>9.2%}{a.broken:>8}{a.forwards:>11}{a.backwards:>11}{a.seconds:>10.1f}"
            )
        return "\n".join(rows)


def summarize(state: State, settings: dict[str, Any]) -> AutoAttackResult:
    """The result of an evaluation that has reached this state."""
    total = max(len(state.broken_by), 1)
    names: dict[int, str | None] = {WRONG: "clean", ROBUST: None}
    names.update(enumerate(record.name for record in state.records))
    remaining = clean = int((state.broken_by != WRONG).sum())
    attacks = []
    for record in state.records:
        remaining -= record.broken
        attacks.append(_outcome(record, remaining / total))
    return AutoAttackResult(
        clean_accuracy=clean / total,
        robust_accuracy=remaining / total,
        attacks=tuple(attacks),
        broken_by=tuple(names[number] for number in state.broken_by.tolist()),
        predicted=state.predicted,
        settings=settings,
        warnings=tuple(state.warnings),
    )


def _outcome(record: Record, accuracy: float) -> AttackOutcome:
    return AttackOutcome(
        record.name,
        accuracy,
        record.attacked,
        record.broken,
        record.forwards,
        record.backwards,
        round(record.seconds, 3),
    )

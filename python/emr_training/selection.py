"""Choosing EMR's strength and temperature on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from emr_training.attacks import PGD
from emr_training.config import RunConfig, make_config, merge
from emr_training.data import Data
from emr_training.evaluation import clean_accuracy, robust_accuracy
from emr_training.training import TrainingDiverged, train

ATTACK_STEPS = 20
CLEAN_TOLERANCE = 0.01
CRITERION = (
    f"highest mean PGD-{ATTACK_STEPS} accuracy over the same ε, among settings that lose at most "
    f"{100 * CLEAN_TOLERANCE:g} point of clean accuracy against λ=0"
)


@dataclass(frozen=True)
class Candidate:
    """One setting and its validation accuracies (fractions); clean is None where training diverged."""

    strength: float
    temperature: float
    clean: float | None
    robust: dict[float, float]

    @property
    def mean_robust(self) -> float:
        """The mean of the robust accuracies; -1 where training diverged."""
        return -1.0 if self.clean is None else sum(self.robust.values()) / len(self.robust)

    def as_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "strength": self.strength,
            "temperature": self.temperature,
            "clean_accuracy": self.clean,
            "robust_accuracy": [{"epsilon": e, "value": a} for e, a in self.robust.items()],
            "mean_robust_accuracy": self.mean_robust,
        }


@dataclass(frozen=True)
class Selection:
    """The config with the chosen pair, that pair, all candidates, and the same training without the penalty."""

    config: RunConfig
    chosen: Candidate
    candidates: list[Candidate]
    reference: Candidate


def select(
    config: RunConfig,
    data: Data,
    validation: Data,
    classes: int,
    *,
    strengths: Sequence[float],
    temperatures: Sequence[float],
    epsilons: Sequence[float],
    on_candidate: Callable[[Candidate], None] | None = None,
) -> Selection:
    """Train `config` with every strength and temperature; keep the pair that is best on `validation`.

    The best has the highest mean PGD-20 accuracy over `epsilons` among those whose clean accuracy is at
    most CLEAN_TOLERANCE below that of the same training at strength 0; when none is, the one of highest
    clean accuracy. A tie goes to the earlier candidate. Test data has no way in.
    """
    reference = _measure(_with(config, 0.0, 1.0), data, validation, classes, epsilons)
    candidates = []
    for temperature in temperatures:
        for strength in strengths:
            candidate = _measure(_with(config, strength, temperature), data, validation, classes, epsilons)
            candidates.append(candidate)
            if on_candidate is not None:
                on_candidate(candidate)
    best = choose(candidates, reference)
    return Selection(_with(config, best.strength, best.temperature), best, candidates, reference)


def choose(candidates: Sequence[Candidate], reference: Candidate) -> Candidate:
    """The best candidate by `select`'s criterion. Raises TrainingDiverged when there is none."""
    trained = [(candidate, candidate.clean) for candidate in candidates if candidate.clean is not None]
    if not trained:
        raise TrainingDiverged("training diverged with every strength and temperature; expected smaller ones")
    floor = (reference.clean or 0.0) - CLEAN_TOLERANCE
    # A tolerance of rounding, so that a loss of exactly the allowed size is within it.
    eligible = [candidate for candidate, clean in trained if clean >= floor - 1e-9]
    if eligible:
        return max(eligible, key=lambda candidate: candidate.mean_robust)
    return max(trained, key=lambda pair: pair[1])[0]


def _with(config: RunConfig, strength: float, temperature: float) -> RunConfig:
    emr = {"penalties.emr.strength": strength, "penalties.emr.temperature": temperature}
    return make_config(merge(config.model_dump(), emr))


def _measure(config: RunConfig, data: Data, validation: Data, classes: int, epsilons: Sequence[float]) -> Candidate:
    emr = config.penalties.emr
    assert emr is not None
    strength, temperature = emr.strength, emr.temperature
    try:
        model = train(config, data, None, classes).model
    except TrainingDiverged:
        return Candidate(strength, temperature, None, {})
    validation = validation.to(next(model.parameters()).device)
    robust = {
        epsilon: robust_accuracy(model, validation, PGD(epsilon, ATTACK_STEPS, seed=config.trainer.seed)).value
        for epsilon in epsilons
    }
    return Candidate(strength, temperature, clean_accuracy(model, validation).value, robust)

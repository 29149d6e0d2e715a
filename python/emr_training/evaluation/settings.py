"""What an evaluation measures."""

from __future__ import annotations

from dataclasses import dataclass

from emr_training.attacks import PGD, Attack
from emr_training.attacks.balls import Norm, check_norm
from emr_training.attacks.base import check_choice
from emr_training.attacks.classifier import PRECISIONS, Precision
from emr_training.errors import check_count
from emr_training.evaluation.names import check_epsilons, check_names, named_attack


@dataclass(frozen=True)
class Settings:
    """What an evaluation measures.

    attacks: names, see `named_attack`. epsilons: radii in `norm`, in units of the [0, 1] pixels; may be empty for
    "clean" alone. precision: of the attacks' search; a success counts once the model agrees in its own precision.
    margins: measure effective margins, effective weight norms and probabilistic margins, at clean images and at the
    end points of PGD-20 within each epsilon. margin_norm: in which effective margins are distances.

    Raises ValueError for an unknown name, a radius that is not positive, or an attack that has not this norm.
    """

    attacks: tuple[str, ...]
    epsilons: tuple[float, ...] = ()
    norm: Norm = "Linf"
    seed: int = 0
    batch_size: int = 500
    precision: Precision = "float32"
    margins: bool = True
    margin_norm: Norm = "L2"

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_norm(self.margin_norm)
        check_count("seed", self.seed, low=0)
        check_count("batch_size", self.batch_size)
        check_choice("precision", self.precision, PRECISIONS)
        check_names(self.attacks)
        if self.epsilons or self.attacks != ("clean",):
            object.__setattr__(self, "epsilons", check_epsilons(self.epsilons))
        for name, epsilon in self.runs():
            self.attack(name, epsilon)

    def runs(self) -> list[tuple[str, float]]:
        """The attacks, each at every radius."""
        return [(name, epsilon) for name in self.attacks if name != "clean" for epsilon in self.epsilons]

    def attack(self, name: str, epsilon: float) -> Attack:
        """The attack of this name."""
        return named_attack(name, self.norm, epsilon, seed=self.seed, precision=self.precision)

    def margin_attack(self, epsilon: float) -> PGD:
        """What finds the attacked images whose margins are measured: PGD-20's end points, success or not."""
        return PGD(epsilon, norm=self.norm, steps=20, keep="last", seed=self.seed, precision=self.precision)

    def belongs_to(self) -> dict[str, object]:
        """What evaluations have to share for their attacks to be put together."""
        return {name: getattr(self, name) for name in ("norm", "seed", "precision", "margin_norm")}

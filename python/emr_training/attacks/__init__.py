"""Adversarial attacks: a frozen dataclass each, called `attack(model, x, y) -> x_adv`."""

from emr_training.attacks.base import Attack
from emr_training.attacks.pgd import PGD

__all__ = ["PGD", "Attack"]

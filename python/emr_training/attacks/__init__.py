"""Adversarial attacks: a frozen dataclass each, called `attack(model, x, y) -> x_adv`."""

from emr_training.attacks.apgd import APGD, APGDT
from emr_training.attacks.autoattack import AutoAttack
from emr_training.attacks.base import Attack, BoundedAttack
from emr_training.attacks.cw import CarliniWagner
from emr_training.attacks.deepfool import DeepFool
from emr_training.attacks.fab import FAB, FABT
from emr_training.attacks.fgsm import FGSM, RFGSM
from emr_training.attacks.flags import EvaluationWarning
from emr_training.attacks.pgd import BIM, MIFGSM, PGD
from emr_training.attacks.result import AttackOutcome, AutoAttackResult
from emr_training.attacks.square import Square

__all__ = [
    "APGD",
    "APGDT",
    "BIM",
    "FAB",
    "FABT",
    "FGSM",
    "MIFGSM",
    "PGD",
    "RFGSM",
    "Attack",
    "AttackOutcome",
    "AutoAttack",
    "AutoAttackResult",
    "BoundedAttack",
    "CarliniWagner",
    "DeepFool",
    "EvaluationWarning",
    "Square",
]

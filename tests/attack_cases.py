"""Every attack of the package with settings small enough for tests."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from emr_training import attacks
from emr_training.attacks import (
    APGD,
    APGDT,
    BIM,
    FAB,
    FABT,
    FGSM,
    MIFGSM,
    PGD,
    RFGSM,
    Attack,
    AutoAttack,
    CarliniWagner,
    DeepFool,
    Square,
)

EPSILON = 0.1

ATTACKS: dict[str, Attack] = {
    "APGD": APGD(EPSILON, steps=4),
    "APGDT": APGDT(EPSILON, steps=4, n_targets=2),
    "AutoAttack": AutoAttack(
        eps=EPSILON,
        version="custom",
        attacks_to_run={"apgd": APGD(EPSILON, steps=3), "square": Square(EPSILON, queries=5)},
        verbose=False,
    ),
    "BIM": BIM(EPSILON, 4),
    "CarliniWagner": CarliniWagner(5, runs=3, c=0.1, learning_rate=0.1),
    "DeepFool": DeepFool(3),
    "FAB": FAB(steps=3),
    "FABT": FABT(EPSILON, steps=3, n_targets=2),
    "FGSM": FGSM(EPSILON),
    "MIFGSM": MIFGSM(EPSILON, 4),
    "PGD": PGD(EPSILON, 4),
    "PGD, last": PGD(EPSILON, 4, keep="last"),
    "RFGSM": RFGSM(EPSILON),
    "Square": Square(EPSILON, queries=6),
}
TARGETED = {name: attack for name, attack in ATTACKS.items() if attack.targetable}
BY_GRADIENT = {name: attack for name, attack in ATTACKS.items() if name not in ("AutoAttack", "Square")}


def exported() -> set[str]:
    """The names of all attacks that users can import."""
    found = {name: getattr(attacks, name) for name in attacks.__all__}
    return {
        name
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, Attack) and not inspect.isabstract(kind)
    }


#: A short ensemble by name, for `short`.
SHORT: dict[str, Attack] = {
    "apgd-ce": APGD(EPSILON, steps=5),
    "apgd-t": APGDT(EPSILON, steps=5, n_targets=3),
    "fab-t": FABT(EPSILON, steps=5, n_targets=2),
    "square": Square(EPSILON, queries=30),
}


def short(**options: Any) -> AutoAttack:
    """An ensemble of seconds rather than minutes."""
    return AutoAttack(eps=EPSILON, version="custom", attacks_to_run=SHORT, **{"verbose": False, **options})


def correct(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Which images are classified correctly, [N]."""
    with torch.no_grad():
        return model(x).argmax(1) == y

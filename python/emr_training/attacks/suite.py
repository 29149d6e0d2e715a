"""Which attacks AutoAttack runs, with which settings, in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from emr_training.attacks.apgd import APGD, APGDT
from emr_training.attacks.balls import Norm
from emr_training.attacks.base import Attack, BoundedAttack
from emr_training.attacks.fab import FAB, FABT
from emr_training.attacks.square import Square
from emr_training.errors import nearest

Version = Literal["standard", "plus", "rand", "custom"]
Order = Literal["standard", "yield"]
VERSIONS = ("standard", "plus", "rand", "custom")
ORDERS = ("standard", "yield")

#: The attacks of each version, in the original order.
ATTACKS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
#: What breaks most for its time first, as published evaluations of adversarially trained networks show: APGD-T breaks
#: nearly all that can be broken, Square and FAB next to nothing in most of the time.
YIELD = ("apgd-ce-10", "apgd-t", "apgd-ce", "apgd-dlr", "square", "fab-t", "fab")
NAMES = YIELD


def suite(
    norm: Norm,
    epsilon: float,
    version: Version,
    order: Order = "standard",
    attacks: Sequence[str] | Mapping[str, Attack] = (),
    **shared: Any,
) -> dict[str, Attack]:
    """The attacks by name, in the order in which they run.

    Args:
        attacks: for the version "custom": names of attacks, which then have the settings of "plus", or attacks by name.
        shared: settings that all attacks take: seed, bn_mode, precision, engine.

    Raises:
        TypeError: for attacks that are neither a list of names nor a mapping.
        ValueError: for unknown names, attacks beside another version than "custom", none beside that, or an attack
            that is not within epsilon.
    """
    several = isinstance(attacks, (Sequence, Mapping)) and not isinstance(attacks, str)
    if not several or not all(isinstance(name, str) for name in attacks):
        raise TypeError(f"attacks_to_run is {attacks!r}; expected a list of names, or a mapping of names to attacks")
    if (version == "custom") != bool(attacks):
        given = f"{list(attacks)!r} with version {version!r}"
        raise ValueError(f"attacks_to_run is {given}; expected names or attacks with version 'custom', none otherwise")
    if isinstance(attacks, Mapping):
        for name, attack in attacks.items():
            _check_within(name, attack, norm, epsilon)
        return dict(attacks)
    names = tuple(attacks) if attacks else ATTACKS[version]
    for name in names:
        if name not in NAMES:
            raise ValueError(f"attacks_to_run has {name!r}; {nearest(name, list(NAMES))}")
    if order == "yield":
        quick = ("apgd-ce-10",) if version in ("standard", "plus") else ()
        names = tuple(name for name in YIELD if name in names + quick)
    return {name: _attack(name, norm, epsilon, version, shared) for name in names}


def _attack(name: str, norm: Norm, epsilon: float, version: Version, shared: dict[str, Any]) -> Attack:
    """One attack in the settings of its version."""
    sparse, brief = norm == "L1", version in ("standard", "rand")
    if name.startswith("apgd"):
        settings = {**shared, "norm": norm, "shrinking": sparse and name != "apgd-ce-10"}
        if name == "apgd-ce-10":
            return APGD(epsilon, steps=10, **settings)
        if name == "apgd-t":
            return APGDT(epsilon, n_targets=5 if sparse and version == "standard" else 9, **settings)
        few = version == "rand" or (version == "standard" and not sparse)
        loss: Literal["ce", "dlr"] = "ce" if name == "apgd-ce" else "dlr"
        return APGD(epsilon, loss=loss, restarts=1 if few else 5, eot=20 if version == "rand" else 1, **settings)
    if name == "square":
        return Square(epsilon, norm=norm, queries=5000, **shared)
    if name == "fab-t":
        return FABT(epsilon, norm=norm, n_targets=9, **shared)
    return FAB(epsilon, norm=norm, restarts=1 if brief else 5, **shared)


def for_classes(attack: Attack, classes: int) -> tuple[Attack, str | None]:
    """The attack as it can run on a model of so many classes, and what had to change."""
    if isinstance(attack, (APGDT, FABT)) and attack.n_targets >= classes:
        targets = f"{classes - 1} targets instead of {attack.n_targets}"
        loss = ", and the margin instead of DLR" if isinstance(attack, APGDT) and classes < 4 else ""
        return attack, f"{targets}{loss}: the model has {classes} classes"
    if isinstance(attack, APGD) and not isinstance(attack, APGDT) and attack.loss == "dlr" and classes < 3:
        return replace(attack, loss="cw"), f"the margin instead of DLR: the model has {classes} classes"
    return attack, None


def _check_within(name: str, attack: Attack, norm: str, epsilon: float) -> None:
    if not isinstance(attack, (BoundedAttack, FAB)):
        kind = type(attack).__name__
        raise ValueError(f"attacks_to_run[{name!r}] is a {kind}; expected an attack with an epsilon and a norm")
    if attack.norm != norm or attack.epsilon is None or attack.epsilon > epsilon:
        found = f"{attack.norm} with epsilon {attack.epsilon}"
        raise ValueError(f"attacks_to_run[{name!r}] is in {found}; expected {norm} with epsilon at most {epsilon:g}")

"""Attacks by the names that `emr evaluate --attacks` takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from emr_training.attacks import FGSM, PGD, Attack, AutoAttack, CarliniWagner, DeepFool
from emr_training.attacks.balls import Norm
from emr_training.attacks.suite import suite
from emr_training.config.section import Number
from emr_training.errors import nearest

#: Names without a number in them. "clean" is no attack: the images as they are.
NAMES = (
    "clean",
    "fgsm",
    "pgd20",
    "cw",
    "apgd-ce",
    "apgd-dlr",
    "apgd-t",
    "fab",
    "fab-t",
    "square",
    "autoattack",
    "autoattack-plus",
    "autoattack-rand",
    "deepfool",
    "cw-l2",
)
#: Those that look for the nearest success, however far; one within epsilon counts.
UNBOUNDED = ("deepfool", "cw-l2")
_STEPS_OF_CW = 100
#: pgdN and cwN have N steps, pgdNxR and cwNxR also R restarts.
_DESCENT = re.compile(r"(pgd|cw)(\d+)(?:x(\d+))?")
_LABELS = {
    "clean": "clean",
    "worst case": "worst case",
    "fgsm": "FGSM",
    "cw": f"CW-{_STEPS_OF_CW}",
    "autoattack": "AutoAttack",
    "autoattack-plus": "AutoAttack+",
    "autoattack-rand": "AutoAttack rand",
    "square": "Square",
    "deepfool": "DeepFool",
}


def parse_attacks(text: str) -> tuple[str, ...]:
    """The names in "clean,pgd20,autoattack", each once. Raises ValueError as `check_names`."""
    names = tuple(dict.fromkeys(name.strip().lower() for name in text.split(",") if name.strip()))
    check_names(names)
    return names


def check_names(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown attack, naming the nearest, or for none."""
    if not names:
        raise ValueError("attacks has no name; expected some, such as clean,pgd20,autoattack")
    for name in names:
        descent = _DESCENT.fullmatch(name)
        if name not in NAMES and not (descent and int(descent[2]) and int(descent[3] or 1)):
            raise ValueError(f"attacks has {name!r}; {nearest(name, list(NAMES))} (pgdN and cwN take N steps)")


def named_attack(name: str, norm: Norm, epsilon: float, **shared: Any) -> Attack:
    """The attack of this name, not "clean", within epsilon, in units of the [0, 1] pixels.

    pgdN: PGD on cross-entropy, N steps of 2.5 epsilon / N from a uniform start; any success on the path counts.
    pgdNxR: of R starts. cw: PGD on the margin of Carlini and Wagner, 100 steps, in any norm, which is what tables of
    robust accuracy mean by CW; cwN, cwNxR: other numbers. apgd-ce, apgd-t, fab-t, square: as in AutoAttack's standard
    version; apgd-dlr, fab: as in "plus". deepfool (Linf, L2) and cw-l2 (L2, Carlini and Wagner's own attack) look for
    the nearest success. shared: seed, precision, engine.

    Raises ValueError for a norm that the attack has not.
    """
    descent = _DESCENT.fullmatch(f"cw{_STEPS_OF_CW}" if name == "cw" else name)
    if descent:
        loss: Any = "ce" if descent[1] == "pgd" else "cw"
        return PGD(epsilon, norm=norm, steps=int(descent[2]), restarts=int(descent[3] or 1), loss=loss, **shared)
    if name == "fgsm":
        return FGSM(epsilon, norm=norm, **shared)
    if name.startswith("autoattack"):
        version: Any = name.partition("-")[2] or "standard"
        return AutoAttack(norm=norm, eps=epsilon, version=version, **shared)
    if name == "deepfool":
        if norm == "L1":
            raise ValueError("attacks has 'deepfool' with the norm L1; expected Linf or L2, or another attack")
        return DeepFool(norm=norm, **shared)
    if name == "cw-l2":
        if norm != "L2":
            raise ValueError(f"attacks has 'cw-l2' with the norm {norm}; expected L2, or 'cw', which has any norm")
        return CarliniWagner(**shared)
    return {**suite(norm, epsilon, "plus", **shared), **suite(norm, epsilon, "standard", **shared)}[name]


def label(name: str) -> str:
    """The name as tables print it: "PGD-20" for "pgd20"."""
    descent = _DESCENT.fullmatch(name)
    if descent:
        return f"{descent[1].upper()}-{descent[2]}" + (f"×{descent[3]}" if descent[3] else "")
    return _LABELS.get(name, name.upper())


def settings_of(attack: Attack) -> dict[str, Any]:
    """The attack's class and those of its settings that decide what it finds, for JSON."""
    left_out = ("model", "attacks_to_run", "batch_size", "verbose", "log_path", "device", "engine", "graph")
    given = {f.name: getattr(attack, f.name) for f in fields(attack) if f.name not in left_out}
    return {"attack": type(attack).__name__, **given}


def epsilon_text(epsilon: float) -> str:
    """ "0.1", or "8/255" where the decimals would be long."""
    levels = epsilon * 255
    short = f"{epsilon:.4g}"
    if float(short) != epsilon and abs(levels - round(levels)) < 1e-9 * 255:
        return f"{round(levels)}/255"
    return short


def parse_epsilon(text: str) -> float:
    """The number or fraction, such as 8/255. Raises ValueError for anything else."""
    try:
        return TypeAdapter(Number).validate_python(text)
    except ValidationError:
        raise ValueError(f"eps is {text!r}; expected a number or a fraction, such as 8/255") from None


def check_epsilons(epsilons: Sequence[float]) -> tuple[float, ...]:
    """Each radius once, the smallest first. Raises ValueError unless all are positive and finite."""
    if not epsilons:
        raise ValueError("eps is not given; expected one or more radii, such as 8/255")
    for epsilon in epsilons:
        if not 0 < epsilon < float("inf"):
            raise ValueError(f"eps is {epsilon}; expected a positive number, such as 8/255")
    return tuple(sorted(set(epsilons)))

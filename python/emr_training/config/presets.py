"""Configurations by name: the released code's, and a family of clean ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from emr_training.config.reading import ConfigError, merge
from emr_training.errors import nearest

Options = dict[str, Any]


@dataclass(frozen=True)
class Preset:
    """A configuration's name, what it is in one line, and its options."""

    name: str
    summary: str
    options: Options


def presets() -> dict[str, Preset]:
    """All presets, by name."""
    return {preset.name: preset for preset in (*_paper(), *_clean())}


def preset(name: str) -> Options:
    """The options of a preset. Raises ConfigError that names the nearest for an unknown one."""
    known = presets()
    if name not in known:
        hint = nearest(name, list(known))
        hint = hint if hint.startswith("did") else "expected one of those that `emr presets` lists"
        raise ConfigError(f"unknown preset {name!r}; {hint}")
    return known[name].options


# The four released scripts of Liu & Chan (BMVC 2022), setting for setting, with what is unusual in them: the attack
# moves BatchNorm's statistics in training mode, also in validation; epsilon is 0.0314; the strength falls an epoch
# before the learning rate; TRADES's example comes from cross-entropy; MAIL's model is chosen on the test set.

_RELEASED_ATTACK: Options = {
    "epsilon": 0.0314,
    "steps": 10,
    "step_size": 0.00784,
    "loss": "ce",
    "bn_mode": "train",
}
_RELEASED: Options = {
    "data": {"name": "cifar10", "validation": 2000, "augmentation": {"crop_padding": 4, "flip": True}},
    "model": {"name": "wrn-34-10-pad"},
    "attack": _RELEASED_ATTACK,
    "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "nesterov": False},
    "schedule": {"name": "piecewise", "gamma": 0.1},
    "trainer": {"batch_size": 128, "drop_last": False},
    "evaluation": {
        "epsilon": 0.0314,
        "steps": 10,
        "step_size": 0.00784,
        "random_start": False,
        "keep": "last",
        "bn_mode": "train",
        "batch_size": 128,
    },
}


def _emr(strength: float, temperature: float, milestones: list[int]) -> Options:
    return {"emr": {"strength": strength, "temperature": temperature, "milestones": milestones, "gamma": 0.1}}


def _released_mail(name: str, slope: float, bias: float) -> Options:
    """Adversarial training up to epoch 74, then MAIL with an attack of its own, on all 50 000 images."""
    attack = {
        "epsilon": 0.031,
        "steps": 10,
        "step_size": 0.007,
        "start_std": 0.001,
        "loss": "kl" if name == "trades" else "ce",
        "bn_mode": "eval",
    }
    return {
        "data": {"validation": 0},
        "defense": {
            "name": name,
            "beta": 5.0,
            "mail": {"slope": slope, "bias": bias, "normalize": False},
            "clean_forward": name == "at",
            "burn_in": {"epoch": 75, "name": "at", "attack": _RELEASED_ATTACK},
        },
        "attack": attack,
        "penalties": _emr(1.0, 0.1, [75, 90]),
        "optimizer": {"weight_decay": 2e-4},
        "schedule": {"milestones": [75, 90]},
        "trainer": {"epochs": 100},
        "evaluation": {"split": "test"},
    }


def _paper() -> list[Preset]:
    scripts: dict[str, tuple[str, Options]] = {
        "at-emr": (
            "AT-EMR, λ = 3, T = 40",
            {
                "defense": {"name": "at"},
                "penalties": _emr(3.0, 40.0, [60, 90]),
                "optimizer": {"weight_decay": 5e-4},
                "schedule": {"milestones": [60, 90]},
                "trainer": {"epochs": 100},
            },
        ),
        "trades-emr": (
            "TRADES-EMR, β = 12, λ = 1, T = 1",
            {
                "defense": {"name": "trades", "beta": 12.0, "clean_forwards": 2, "nominal_batch": True},
                "penalties": _emr(1.0, 1.0, [60, 120]),
                "optimizer": {"weight_decay": 1e-3},
                "schedule": {"milestones": [60, 120]},
                "trainer": {"epochs": 130},
            },
        ),
        "mail-at-emr": ("MAIL-AT-EMR, λ = 1, T = 0.1", _released_mail("at", 30.0, -0.07)),
        "mail-trades-emr": ("MAIL-TRADES-EMR, β = 5, λ = 1, T = 0.1", _released_mail("trades", 5.0, 0.05)),
    }
    return [
        Preset(
            f"paper/{name}", f"{title}: the released script on CIFAR-10, WRN-34-10", _named(name, _RELEASED, options)
        )
        for name, (title, options) in scripts.items()
    ]


# Today's practice: the attack sees the evaluation-mode network and 8/255, TRADES's example comes from its divergence,
# and the model is chosen on images held out of the training set.

_CIFAR: Options = {
    "data": {"validation": 1000, "augmentation": {"crop_padding": 4, "flip": True}},
    "attack": {"epsilon": "8/255", "steps": 10, "step_size": "2/255"},
    "schedule": {"name": "piecewise", "milestones": [100, 105]},
    "trainer": {"epochs": 110, "batch_size": 128},
    "evaluation": {"epsilon": "8/255", "steps": 10, "step_size": "2/255"},
}


def _grey(epsilon: float, step_size: float, warmup: int) -> Options:
    """28x28 images of one channel."""
    return {
        "data": {"validation": 5000},
        "attack": {"epsilon": epsilon, "steps": 10, "step_size": step_size, "warmup": warmup},
        "optimizer": {"learning_rate": 0.05},
        "schedule": {"name": "cosine", "warmup": 1},
        "trainer": {"epochs": 20, "batch_size": 128},
        "evaluation": {"epsilon": epsilon, "steps": 20, "step_size": step_size},
    }


#: Data set, its title, its models, and what it needs.
_SETS: dict[str, tuple[str, tuple[str, ...], Options]] = {
    "digits": ("scikit-learn's digits", ("mlp", "cnn"), {}),
    "mnist": ("MNIST", ("mlp", "cnn"), _grey(0.3, 0.06, 5)),
    "fashion-mnist": ("Fashion-MNIST", ("mlp", "cnn"), _grey(0.1, 0.02, 0)),
    "cifar10": ("CIFAR-10", ("preactresnet-18", "wrn-28-10", "wrn-34-10", "wrn-34-10-pad"), _CIFAR),
    "cifar100": ("CIFAR-100", ("preactresnet-18", "wrn-28-10", "wrn-34-10", "wrn-34-10-pad"), _CIFAR),
}
_LONG: Options = {"schedule": {"name": "piecewise", "milestones": [75, 90, 100]}, "trainer": {"epochs": 120}}
_WARM: Options = {"start_std": 0.001}

#: Defense, its title, its options, and those of CIFAR's convolutional networks beside them.
_DEFENSES: dict[str, tuple[str, Options, Options]] = {
    "standard": ("standard training", {"defense": "standard"}, {"schedule": {"name": "cosine"}}),
    "fgsm-rs": (
        "fast adversarial training (one step)",
        {"defense": "at", "attack": {"name": "rfgsm", "step_size": None}},
        {
            "optimizer": {"learning_rate": 0.2},
            "schedule": {"name": "cyclic", "milestones": []},
            "trainer": {"epochs": 30},
        },
    ),
    "at": ("PGD adversarial training", {"defense": "at"}, {}),
    "trades": ("TRADES, β = 6", {"defense": {"name": "trades", "beta": 6.0}, "attack": _WARM}, {}),
    "mart": (
        "MART, β = 5",
        {"defense": {"name": "mart", "beta": 5.0}, "attack": _WARM, "optimizer": {"learning_rate": 0.01}},
        {"optimizer": {"weight_decay": 3.5e-3}, **_LONG},
    ),
    "mail-at": (
        "MAIL-AT",
        {"defense": {"name": "at", "mail": {"slope": 10.0, "bias": -0.5}, "burn_in": {"name": "at"}}, "attack": _WARM},
        {"optimizer": {"learning_rate": 0.01, "weight_decay": 3.5e-3}, **_LONG},
    ),
    "mail-trades": (
        "MAIL-TRADES, β = 5",
        {
            "defense": {
                "name": "trades",
                "beta": 5.0,
                "mail": {"slope": 2.0, "bias": 0.0},
                "burn_in": {"name": "trades"},
            },
            "attack": _WARM,
        },
        {"optimizer": {"learning_rate": 0.01, "weight_decay": 3.5e-3}, **_LONG},
    ),
    "mail-mart": (
        "MAIL-MART, β = 5",
        {
            "defense": {
                "name": "mart",
                "beta": 5.0,
                "mail": {"slope": 10.0, "bias": -0.5},
                "burn_in": {"name": "mart"},
            },
            "attack": _WARM,
            "optimizer": {"learning_rate": 0.01},
        },
        {"optimizer": {"weight_decay": 3.5e-3}, **_LONG},
    ),
}

# The paper's strengths where it has them; otherwise, a beginning for a search on the validation split.
_STRENGTHS: dict[str, tuple[float, float]] = {
    "standard": (10.0, 0.1),
    "trades": (1.0, 1.0),
    "mail-at": (1.0, 0.1),
    "mail-trades": (1.0, 0.1),
    "mail-mart": (1.0, 0.1),
}


def _clean() -> list[Preset]:
    result = []
    for data, (data_title, models, for_data) in _SETS.items():
        for model in models:
            for defense, (title, options, on_cifar) in _DEFENSES.items():
                made = merge(for_data, options)
                if data.startswith("cifar"):
                    made = merge(made, on_cifar)
                if "burn_in" in (made["defense"] if isinstance(made["defense"], Mapping) else {}):
                    # MAIL's weights start after the burn-in: epoch 76 of 120, and as late in shorter runs.
                    epochs = made.get("trainer", {}).get("epochs", 40)
                    made = merge(made, {"defense.burn_in.epoch": round(epochs * 75 / 120) + 1})
                strength, temperature = _STRENGTHS.get(defense, (1.0, 1.0))
                for suffix, penalties in (("", {}), ("-emr", _emr(strength, temperature, []))):
                    name = f"{data}-{model}-{defense}{suffix}"
                    extra = f" + EMR, λ = {strength:g}, T = {temperature:g}" if suffix else ""
                    full = merge(made, {"data.name": data, "model": {"name": model}, "penalties": penalties})
                    result.append(
                        Preset(f"clean/{name}", f"{title}{extra}: {data_title}, {model}", _named(name, full, {}))
                    )
    return result


def _named(name: str, base: Options, options: Options) -> Options:
    return merge({"name": name}, merge(base, options))

"""What is trained: a network, a method, a seed; and the names and configurations of these."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import cache
from math import ceil
from typing import Any

from emr_training.config import RunConfig, make_config
from emr_training.data import Data, Splits, load_data
from emr_training.training.costs import penalty_passes
from experiments.mnist.settings import Settings

#: The images that are held out of the training set; the same for every seed, so that no model trains on them.
HELD_OUT = 10_000


@dataclass(frozen=True)
class EMR:
    """The penalty's strength (lambda), temperature, and whether the mean logit is left out of the mix."""

    strength: float
    temperature: float
    center: bool

    def __str__(self) -> str:
        return f"λ={self.strength:g}, T={self.temperature:g}{', centred' if self.center else ''}"

    @property
    def slug(self) -> str:
        """The same for the name of a file."""
        return f"l{self.strength:g}-T{self.temperature:g}{'-c' if self.center else ''}"


@dataclass(frozen=True)
class Spec:
    """One model. defense: standard, at or trades; epsilon: of its attack (0: standard). seed: of weights and order.

    images: the first so many training images; None: all that the settings take.
    """

    net: str
    defense: str
    epsilon: float
    emr: EMR | None
    seed: int
    epochs: int
    images: int | None = None

    @property
    def group(self) -> str:
        """The configuration without its seed."""
        parts = [self.net, self.defense if self.defense == "standard" else f"{self.defense}{self.epsilon:g}"]
        parts += [] if self.images is None else [f"n{self.images}"]
        parts += [] if self.emr is None else [self.emr.slug]
        return "_".join([*parts, f"e{self.epochs}"])

    @property
    def name(self) -> str:
        """A name for files."""
        return f"{self.group}_s{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        emr = None if self.emr is None else vars(self.emr)
        return {**vars(self), "emr": emr, "name": self.name, "group": self.group}


def at_equal_cost(spec: Spec, settings: Settings) -> Spec:
    """The same without EMR, with as many more epochs as the penalty's passes would have cost, rounded up.

    Counted in passes of the network: those of the attack's steps and of the loss, and the penalty's.
    """
    base = {"standard": 1, "at": settings.attack_steps + 1, "trades": settings.attack_steps + 2}[spec.defense]
    config = configuration(replace(spec, emr=EMR(1.0, 1.0, False)), settings).penalties.emr
    assert config is not None
    extra = penalty_passes(config)[0]
    return replace(spec, emr=None, epochs=ceil(spec.epochs * (base + extra) / base - 1e-9))


def configuration(spec: Spec, settings: Settings) -> RunConfig:
    """The run of `emr train` that makes this model."""
    penalties: dict[str, Any] = {}
    if spec.emr is not None:
        penalties["emr"] = vars(spec.emr)
    defense: dict[str, Any] = {"name": spec.defense, "beta": settings.trades_beta}
    if spec.epsilon > settings.burn_in_epsilon:
        gentle = {"epsilon": settings.burn_in_epsilon, "steps": settings.attack_steps}
        proper = 1 + ceil(settings.burn_in_share * spec.epochs)
        defense["burn_in"] = {"name": spec.defense, "epoch": proper, "attack": gentle}
    return make_config(
        {
            "name": spec.name,
            "data.name": settings.data,
            "model": _model(spec.net, settings),
            "defense": defense,
            "attack": {"epsilon": spec.epsilon, "steps": settings.attack_steps},
            "penalties": penalties,
            "optimizer": {
                "name": "adamw",
                "learning_rate": settings.learning_rate,
                "weight_decay": settings.weight_decay,
            },
            "schedule": {"name": "cyclic", "peak": 0.3},
            "trainer": {
                "epochs": spec.epochs,
                "batch_size": settings.batch_size,
                "seed": spec.seed,
                "device": "cpu",
            },
        }
    )


def _model(net: str, settings: Settings) -> dict[str, Any]:
    family, _, rest = net.partition("-")
    shape = list(splits(settings).input_shape)
    options: dict[str, Any] = {"input_shape": shape, "classes": splits(settings).classes, "batch_norm": rest == "bn"}
    if family == "mlp":
        return {"name": "experiments.nets:mlp", "options": {**options, "widths": list(settings.widths)}}
    return {"name": "experiments.nets:cnn", "options": {**options, "width": settings.cnn_width}}


@cache
def splits(settings: Settings) -> Splits:
    """The images, as many as the settings take; the first ones of each split.

    Raises ValueError where the data set's files are not given.
    """
    root = os.environ.get("EMR_DATA")
    if settings.data != "digits" and not root:
        raise ValueError(
            f"EMR_DATA is not set; expected the folder that holds the original files of {settings.data}, "
            "or --quick, which needs none"
        )
    found = load_data(settings.data, root, seed=0, validation=HELD_OUT)
    train, held = first(found.train, settings.train_images), first(found.held, settings.validation_images)
    return Splits(found.name, found.classes, train, held, found.test)


def first(data: Data, count: int) -> Data:
    """The first `count` images."""
    return Data(data.x[:count], data.y[:count])

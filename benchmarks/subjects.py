"""Small convolutional networks, trained here, for attacks to be compared on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emr_training.attacks.balls import Norm
from emr_training.config import make_config
from emr_training.data import Data, load_digits
from emr_training.data.idx import load_idx
from emr_training.data.splits import as_floats
from emr_training.training import train

_DIGITS: dict[str, dict[str, Any]] = {
    "standard": {"trainer.epochs": 10},
    "AT": {"defense": "at", "trainer.epochs": 15},
    "AT-EMR": {"defense": "at", "trainer.epochs": 15, "penalties.emr.strength": 1.0},
}


@dataclass(frozen=True)
class Subject:
    """A network, the images that it is attacked on, and the radii of the balls."""

    model: nn.Module
    data: Data
    radii: dict[Norm, float]


#: By name; each is trained when it is called for.
Subjects = dict[str, Callable[[], Subject]]


def mnist(folder: Path, training: int, test: int) -> tuple[Data, Data]:
    """The first so many of MNIST's training and test images, in [0, 1], from its four files in `folder`."""
    train_data, test_data = load_idx("mnist", folder)
    return _first(train_data, training), _first(test_data, test)


def _first(data: Data, count: int) -> Data:
    return Data(as_floats(data.x[:count]), data.y[:count])


def digits_subjects() -> Subjects:
    """With standard, adversarial and adversarial EMR training, on scikit-learn's digits."""

    def make(name: str) -> Subject:
        splits = load_digits(0)
        model = train(make_config({"model": "cnn", **_DIGITS[name]}), splits.train, None, splits.classes).model
        standard = name == "standard"
        return Subject(model.eval(), splits.test, {"Linf": 0.05 if standard else 0.15, "L2": 0.3 if standard else 0.5})

    return {f"digits, {name}": (lambda name=name: make(name)) for name in _DIGITS}


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The part of x that the model classifies as y."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())

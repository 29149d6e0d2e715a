"""Small convolutional networks, trained here, for attacks to be compared on."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from emr_training.attacks.balls import Norm
from emr_training.config import make_config
from emr_training.data import Data, load_digits
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


def read_mnist(folder: Path, part: str, count: int) -> Data:
    """The first `count` images of MNIST's "train" or "t10k"."""
    with gzip.open(folder / f"{part}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(16 + count * 784), np.uint8, offset=16)
    with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(8 + count), np.uint8, offset=8)
    x = torch.from_numpy(pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255)
    return Data(x, torch.from_numpy(labels.astype(np.int64)))


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

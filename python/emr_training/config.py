"""The settings of a training run, checked before any work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from emr_training.errors import nearest

Method = Literal["standard", "emr", "at", "at-emr"]


class ConfigError(ValueError):
    """An unknown option or a value out of range; the message names each and what was expected."""


class TrainConfig(BaseModel):
    """What `emr train` trains, and how: everything that decides the weights, the seed included."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    method: Method = Field(
        "standard", description="Training method: plain or adversarial (at), each with or without EMR."
    )
    data: Literal["digits"] = Field("digits", description="Data set: scikit-learn's bundled digits, 8x8 pixels.")
    model: Literal["mlp", "cnn"] = Field("mlp", description="Classifier.")
    epochs: int = Field(40, ge=1, description="Passes over the training split.")
    batch_size: int = Field(64, ge=1, description="Samples a step; also the N of EMR's paper reduction.")
    learning_rate: float = Field(0.1, gt=0, description="Initial SGD learning rate, annealed to 0 by a half cosine.")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum.")
    weight_decay: float = Field(5e-4, ge=0, description="SGD weight decay.")
    strength: float = Field(3.0, ge=0, description="EMR: weight of the penalty.")
    temperature: float = Field(1.0, gt=0, description="EMR: temperature of the softmax that mixes effective weights.")
    center: bool = Field(False, description="EMR: leave the mean logit's part out of the mix.")
    epsilon: float = Field(0.15, ge=0, le=1, description="AT: radius of the Linf ball, in units of the [0, 1] pixels.")
    attack_steps: int = Field(7, ge=1, description="AT: PGD steps.")
    attack_step_size: float | None = Field(
        None, gt=0, description="AT: PGD step size in the same units; 2.5 * epsilon / steps by default."
    )
    seed: int = Field(0, ge=0, description="Seed of the split, initial weights, order of batches and random starts.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where to train.")
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = Field("32-true", description="Fabric precision.")

    @property
    def adversarial(self) -> bool:
        """Whether training is on adversarial examples."""
        return self.method in ("at", "at-emr")

    @property
    def regularized(self) -> bool:
        """Whether EMR is added."""
        return self.method in ("emr", "at-emr")


def make_config(options: Mapping[str, Any]) -> TrainConfig:
    """A TrainConfig from option names and values.

    Raises ConfigError with one line for each fault: an unknown name with the nearest valid one, a value
    with what was expected in its place.
    """
    try:
        return TrainConfig.model_validate(dict(options))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def read_config(path: Path) -> dict[str, Any]:
    """The options in a JSON file. Raises ConfigError unless it holds one JSON object."""
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise ConfigError(f"{path} holds a {type(options).__name__}; expected an object of option names and values")
    return options


def _explain(fault: Any) -> str:
    name = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown option {name!r}; {nearest(name, list(TrainConfig.model_fields))}"
    expected = fault["msg"].replace("Input should be", "expected").replace("Field required", "expected a value")
    return f"{name} is {fault['input']!r}; {expected}"

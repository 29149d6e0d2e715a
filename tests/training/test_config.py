"""Settings: faults name themselves and what was expected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emr_training.config import ConfigError, make_config, read_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1.0}, "unknown option 'temprature'; did you mean 'temperature'?"),
        ({"lr": 1.0}, "unknown option 'lr'; expected one of 'method'"),
        ({"strength": -1.0}, "strength is -1.0; expected greater than or equal to 0"),
        ({"strength": float("nan")}, "strength is nan; expected a finite number"),
        ({"temperature": 0}, "temperature is 0; expected greater than 0"),
        ({"epsilon": 1.5}, "epsilon is 1.5; expected less than or equal to 1"),
        ({"epochs": 0}, "epochs is 0; expected greater than or equal to 1"),
        ({"epochs": "many"}, "epochs is 'many'; expected a valid integer"),
        ({"method": "trades"}, "method is 'trades'; expected 'standard', 'emr', 'at' or 'at-emr'"),
        ({"model": "resnet"}, "model is 'resnet'; expected 'mlp' or 'cnn'"),
        ({"momentum": 1.0}, "momentum is 1.0; expected less than 1"),
        ({"seed": -1}, "seed is -1; expected greater than or equal to 0"),
    ],
)
def test_a_fault_names_itself_and_the_expectation(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(options)
    assert str(caught.value).startswith(message)


def test_every_fault_gets_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"epoch": 3, "epsilon": -1})
    assert sorted(str(caught.value).splitlines()) == [
        "epsilon is -1; expected greater than or equal to 0",
        "unknown option 'epoch'; did you mean 'epochs'?",
    ]


@pytest.mark.parametrize(
    ("method", "adversarial", "regularized"),
    [("standard", False, False), ("emr", False, True), ("at", True, False), ("at-emr", True, True)],
)
def test_methods(method: str, adversarial: bool, regularized: bool) -> None:
    config = make_config({"method": method})
    assert (config.adversarial, config.regularized) == (adversarial, regularized)


def test_read_config(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"epochs": 3}))
    assert make_config(read_config(path)).epochs == 3
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list; expected an object"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_config(path)
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_config(tmp_path / "none.json")

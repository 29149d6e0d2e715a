"""The list of options: complete, with defaults that mean what is said."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from emr_training.cli import app
from emr_training.config import RunConfig, make_config
from emr_training.config.listing import options

LISTED = {option.key: option for option in options()}


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    found = {}
    for name, inner in value.items():
        found.update(leaves(inner, f"{prefix}{name}.") if isinstance(inner, dict) and inner else {prefix + name: inner})
    return found


def test_every_option_is_there_with_its_default() -> None:
    defaults = leaves(RunConfig().model_dump(mode="json"))
    assert len(defaults) > 60 and set(defaults) <= set(LISTED)
    for key, default in defaults.items():
        given = make_config({key: yaml.safe_load(LISTED[key].default)}).model_dump(mode="json")
        assert leaves(given)[key] == default
    assert all(option.description.endswith((".", ")")) for option in LISTED.values())


def test_sections_that_are_off_are_opened_once() -> None:
    assert LISTED["penalties.emr"].default == "null" and LISTED["penalties.emr.strength"].default == "3"
    assert LISTED["defense.burn_in.attack"].description.endswith("Its options are those of attack.")
    assert "defense.burn_in.attack.epsilon" not in LISTED


@pytest.mark.parametrize("key", sorted(LISTED))
def test_a_default_may_be_given(key: str) -> None:
    given = yaml.safe_load(LISTED[key].default)
    section = key.rpartition(".")[0]
    # What goes with an option, where one alone is refused.
    beside = {"defense.mail": {"defense.name": "at"}, "defense.burn_in": {"defense.name": "at"}}.get(section, {})
    make_config({**beside, key: given})


def test_command() -> None:
    result = CliRunner().invoke(app, ["options", "attack", "warmup"])
    assert result.exit_code == 0 and result.output.startswith("attack.warmup=0\n    Epochs in which")
    assert len(CliRunner().invoke(app, ["options"]).output.splitlines()) == 2 * len(LISTED)
    refused = CliRunner().invoke(app, ["options", "atack"])
    assert refused.exit_code != 0 and "no option has atack in its key" in str(refused.exception)

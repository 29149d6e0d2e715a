"""A training attack that grows over the first epochs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from emr_training.attacks import PGD, RFGSM
from emr_training.config import make_config
from emr_training.data import Data
from emr_training.defenses import PGDAT, TRADES, Rising, Standard
from emr_training.training.build import make_defense


def test_radius_and_steps_rise_in_equal_parts() -> None:
    rising: Any = Rising(TRADES(PGD(0.3, 10, 0.06, loss="kl", start_std=0.001)), 4)
    attacks = [rising.at_epoch(epoch).attack for epoch in (1, 2, 4, 9)]
    assert [a.epsilon for a in attacks] == pytest.approx([0.075, 0.15, 0.3, 0.3])
    assert [a.step_size for a in attacks] == pytest.approx([0.015, 0.03, 0.06, 0.06])
    assert [a.start_std for a in attacks] == pytest.approx([0.00025, 0.0005, 0.001, 0.001])
    assert all((a.steps, a.loss) == (10, "kl") for a in attacks)
    assert rising.at_epoch(4) is rising.then
    free: Any = Rising(PGDAT(RFGSM(0.3)), 2)
    assert free.at_epoch(1).attack == RFGSM(0.15)


@pytest.mark.parametrize("name", ["at", "trades", "mart"])
def test_the_configuration_has_it(name: str, net: nn.Module, batch: Data) -> None:
    given = {"defense": name, "attack": {"epsilon": 0.2, "step_size": 0.05, "warmup": 2}, "penalties.emr": {}}
    early, late = (make_defense(make_config(given), ()).at_epoch(epoch) for epoch in (1, 2))
    plain = make_defense(make_config({**given, "attack": {"epsilon": 0.1, "step_size": 0.025}}), ())
    found = [
        float(defense(net, batch.x, batch.y, generator=torch.Generator().manual_seed(0)).total.detach())
        for defense in (early, late, plain)
    ]
    assert found[0] == found[2] != found[1]


def test_a_burn_in_rises_by_itself() -> None:
    burn_in = {"epoch": 3, "name": "at", "attack": {"epsilon": 0.1, "warmup": 2}}
    config = make_config({"defense": {"name": "trades", "mail": {}, "burn_in": burn_in}, "attack": {"epsilon": 0.3}})
    defense: Any = make_defense(config, ())
    assert [defense.at_epoch(epoch).attack.epsilon for epoch in (1, 2, 3)] == [0.05, 0.1, 0.3]


def test_standard_training_has_nothing_that_rises() -> None:
    assert isinstance(make_defense(make_config({"defense": "standard", "attack": {"warmup": 3}}), ()), Standard)


def test_misuse(net: nn.Module, batch: Data) -> None:
    with pytest.raises(ValueError, match="epochs is 0"):
        Rising(Standard(), 0)
    with pytest.raises(RuntimeError, match="expected a call of what at_epoch"):
        Rising(PGDAT(PGD(0.1, 2)), 2)(net, batch.x, batch.y)
    with pytest.raises(ValueError, match=r"attack\.warmup"):
        make_config({"attack": {"warmup": -1}})

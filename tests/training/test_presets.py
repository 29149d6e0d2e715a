"""Every preset builds what it names, and every family of them trains."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn

from emr_training.config import make_config, merge
from emr_training.config.presets import preset, presets
from emr_training.data import Data
from emr_training.defenses import MAIL, MART, PGDAT, TRADES, Standard
from emr_training.models import build_model
from emr_training.training import make_defense, make_penalties, train
from emr_training.training.build import make_optimizer
from emr_training.training.validation import make_validation_attack

SHAPES = {
    "digits": ((1, 8, 8), 10),
    "mnist": ((1, 28, 28), 10),
    "fashion-mnist": ((1, 28, 28), 10),
    "cifar10": ((3, 32, 32), 10),
    "cifar100": ((3, 32, 32), 100),
}
DEFENSES = {"standard": Standard, "at": PGDAT, "trades": TRADES, "mart": MART}


@cache
def built(model: str, data: str) -> nn.Module:
    shape, classes = SHAPES[data]
    with torch.device("meta"):
        return build_model(model, shape, classes)


@pytest.mark.parametrize("name", presets())
def test_builds_what_it_names(name: str) -> None:
    config = make_config(preset(name))
    shape, classes = SHAPES[config.data.name]
    model = built(config.model.name, config.data.name)
    assert model(torch.zeros(2, *shape, device="meta")).shape == (2, classes)
    penalties = make_penalties(config, model)
    assert list(penalties) == (["emr"] if name.endswith("-emr") else [])
    defense = make_defense(config, tuple(penalties.values()))
    first, last = (defense.at_epoch(epoch) for epoch in (1, config.trainer.epochs))
    burn_in = config.defense.burn_in
    assert isinstance(first, DEFENSES[(config.defense if burn_in is None else burn_in).name])
    word = name.removesuffix("-emr").replace("fgsm-rs", "at").replace("/", "-").split("-")[-1]
    assert isinstance(last, DEFENSES[word])
    assert first.penalties == last.penalties == tuple(penalties.values())
    mails = [isinstance(getattr(one, "mail", None), MAIL) for one in (first, last)]
    assert mails == [False, config.defense.mail is not None] == [False, "mail" in name]
    assert make_validation_attack(config).epsilon > 0
    groups = make_optimizer(config.optimizer, model).param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())


def families() -> list[str]:
    """One model of each data set, but CIFAR-100, which differs from CIFAR-10 in its classes alone."""
    models = ("digits-mlp", "mnist-cnn", "fashion-mnist-mlp", "cifar10-preactresnet-18")
    return [name for name in presets() if name.startswith(tuple(f"clean/{model}-" for model in models))]


@pytest.mark.parametrize("name", families())
def test_trains(name: str) -> None:
    """Two epochs of two batches, the second one after MAIL's burn-in; small networks on small images."""
    config = make_config(preset(name))
    shape, classes = SHAPES[config.data.name]
    shape = (shape[0], 8, 8)
    model = {"cnn": "cnn", "mlp": "mlp"}.get(config.model.name, "wrn-10-1")
    changes = {"model": {"name": model}, "attack.steps": 2, "evaluation.steps": 2, "trainer.device": "cpu"}
    changes |= {"trainer.epochs": 2, "trainer.batch_size": 8}
    if config.defense.burn_in is not None:
        changes["defense.burn_in.epoch"] = 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(256, (24, *shape), dtype=torch.uint8, generator=generator)
    y = torch.arange(24) % classes
    result = train(make_config(merge(preset(name), changes)), Data(x[:16], y[:16]), Data(x[16:], y[16:]), classes)
    assert [metrics.step for metrics in result.history] == [2, 4]
    assert result.engine == ("linearized" if name.endswith("-emr") else None)
    for metrics in result.history:
        assert all(0 <= value < 100 for value in metrics.losses.values())
        assert ("emr" in metrics.losses) == name.endswith("-emr")

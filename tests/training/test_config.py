"""Settings: faults name themselves and what was expected; files and overrides are read as they are meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from emr_training.config import ConfigError, dump_config, make_config, merge, parse_override, read_config
from emr_training.config.presets import preset, presets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"penalties.emr.temprature": 1.0}, "unknown option 'penalties.emr.temprature'; did you mean 'penalties.emr.t"),
        ({"trainr.epochs": 1.0}, "unknown option 'trainr'; did you mean 'trainer'?"),
        ({"epochs": 3}, "unknown option 'epochs'; did you mean 'trainer.epochs'?"),
        ({"strength": 3}, "unknown option 'strength'; did you mean 'penalties.emr.strength'?"),
        ({"optimizer.lr": 1.0}, "unknown option 'optimizer.lr'; expected one of 'optimizer.name', 'optimizer.learning"),
        ({"penalties.emr.strength": -1.0}, "penalties.emr.strength is -1.0; expected greater than or equal to 0"),
        ({"penalties.emr.strength": float("nan")}, "penalties.emr.strength is nan; expected a finite number"),
        ({"penalties.emr.temperature": 0}, "penalties.emr.temperature is 0; expected greater than 0"),
        ({"trainer.epochs": 0}, "trainer.epochs is 0; expected greater than or equal to 1"),
        ({"trainer.epochs": "many"}, "trainer.epochs is 'many'; expected a valid integer"),
        ({"attack.epsilon": "8/x"}, "attack.epsilon is '8/x'; expected a valid number"),
        ({"defense": "tradse"}, "defense.name is 'tradse'; expected 'standard', 'at', 'trades' or 'mart'"),
        ({"optimizer.momentum": 1.0}, "optimizer.momentum is 1.0; expected less than 1"),
        ({"trainer.seed": -1}, "trainer.seed is -1; expected greater than or equal to 0"),
        ({"defense.mail": {}}, "defense: expected at, trades or mart beside mail"),
        ({"trainer.accumulate": 5}, "trainer.batch_size is 64; expected a multiple of trainer.accumulate, 5"),
        ({"trainer.patience": 2, "data.validation": 0}, "trainer.patience is given, data.validation is 0; expected"),
        ({"defense": "mart", "data.augmentation.cutmix": True}, "defense.name is mart with data.augmentation.cutmix; "),
        (
            {"defense": {"name": "at", "burn_in": {"name": "mart"}}, "data.augmentation.cutmix": True},
            "defense.burn_in.name is mart with data.augmentation.cutmix; expected none, as CutMix mixes two labels",
        ),
        (
            {"defense": {"name": "at", "mail": {}}, "data.augmentation.cutmix": True},
            "defense.mail is given with data.au",
        ),
        (
            {"defense.logit_margin": 3.0, "data.augmentation.cutmix": True},
            "defense.logit_margin is given with data.augm",
        ),
        ({"data.extra_fraction": 0.5}, "data.extra_fraction is given without data.extra; expected a file"),
        ({"data.extra": "more.npz"}, "data.extra is given, data.extra_fraction is 0; expected the share"),
        ({"defense": {"name": "mart", "smoothing": 0.1}}, "defense: smoothing is 0.1 with mart; expected 0"),
        ({"defense": {"name": "mart", "logit_margin": 2.0}}, "defense: logit_margin is 2.0 with mart; expected 0"),
        ({"epsilon": 0.3}, "unknown option 'epsilon'; did you mean 'attack.epsilon'?"),
        ({"penalties.emr": True}, "penalties.emr is True; expected its options, as in penalties.emr.strength=..."),
        ({"penalties": "emr"}, "penalties is 'emr'; expected its options, as in penalties.emr.strength=..."),
    ],
)
def test_a_fault_names_itself_and_the_expectation(options: dict, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config(options)
    assert str(caught.value).startswith(message)


def test_every_fault_gets_a_line() -> None:
    with pytest.raises(ConfigError) as caught:
        make_config({"trainer.epoch": 3, "attack.epsilon": -1})
    assert sorted(str(caught.value).splitlines()) == [
        "attack.epsilon is -1; expected greater than or equal to 0",
        "unknown option 'trainer.epoch'; did you mean 'trainer.epochs'?",
    ]


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "standard"),
        ({"penalties.emr": {}}, "emr"),
        ({"defense": "at"}, "at"),
        ({"defense": "trades", "penalties.emr": {}}, "trades-emr"),
        ({"defense": "mart", "defense.mail": {}}, "mail-mart"),
    ],
)
def test_methods(options: dict, method: str) -> None:
    assert make_config(options).method == method


def test_values_as_people_write_them() -> None:
    changes = ["attack.epsilon=8/255", "optimizer.weight_decay=5e-4", "trainer.precision=32", "model=cnn"]
    changes += ["schedule.milestones=[60, 90]", "attack.step_size=null", "penalties.emr.strength=1"]
    options: dict = {}
    for change in changes:
        options = merge(options, dict([parse_override(change)]))
    config = make_config(options)
    assert (config.attack.epsilon, config.optimizer.weight_decay) == (8 / 255, 5e-4)
    assert (config.trainer.precision, config.model.name, config.schedule.milestones) == ("32", "cnn", (60.0, 90.0))
    assert config.attack.step_size is None and config.penalties.emr is not None


@pytest.mark.parametrize("text", ["epochs", "=3", "a.b=[1"])
def test_an_override_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected"):
        parse_override(text)


def test_merge_keeps_what_is_not_changed() -> None:
    base = {"defense": {"name": "at", "beta": 2.0}, "model": "mlp"}
    assert merge(base, {"defense.mail.slope": 1.0})["defense"] == {"name": "at", "beta": 2.0, "mail": {"slope": 1.0}}
    assert merge(base, {"defense": "mart"})["defense"] == {"name": "mart", "beta": 2.0}
    assert merge(base, {"model.hypersphere_scale": 15})["model"] == {"name": "mlp", "hypersphere_scale": 15}
    assert base == {"defense": {"name": "at", "beta": 2.0}, "model": "mlp"}


def test_read_config(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("trainer:\n  epochs: 3\n")
    assert make_config(read_config(path)).trainer.epochs == 3
    path.write_text("")
    assert read_config(path) == {}
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="holds a list; expected option names and values"):
        read_config(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_config(path)
    path.write_text("!!python/object/apply:os.getcwd []")
    with pytest.raises(ConfigError, match="is not YAML"):
        read_config(path)
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        read_config(tmp_path / "none.yaml")


def test_every_preset_is_valid_and_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    known = presets()
    assert len(known) == 228
    for name, chosen in known.items():
        config = make_config(chosen.options)
        assert chosen.summary and name.endswith(config.name)
        assert name.endswith("-emr") == (config.penalties.emr is not None)
        if name.startswith("clean/"):
            assert config.attack.bn_mode == config.evaluation.bn_mode == "eval"
            assert config.evaluation.split == "validation" and config.data.validation > 0
        path.write_text(dump_config(config))
        assert make_config(read_config(path)) == config


def test_unknown_preset() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'paper/at-erm'; did you mean 'paper/at-emr'"):
        preset("paper/at-erm")


def test_the_papers_strength_falls_an_epoch_before_its_learning_rate() -> None:
    from emr_training.training.schedule import learning_rate_factor

    config = make_config(preset("paper/at-emr"))
    assert config.penalties.emr is not None
    strengths = [config.penalties.emr.at_epoch(epoch) for epoch in range(1, 101)]
    assert strengths == pytest.approx([3.0] * 59 + [0.3] * 30 + [0.03] * 11)
    rates = [learning_rate_factor(config.schedule, 375 * e, 375, 375 * 100) for e in range(100)]
    assert rates == pytest.approx([1.0] * 60 + [0.1] * 30 + [0.01] * 10)
    assert learning_rate_factor(config.schedule, 375 * 60 - 1, 375, 37500) == 1.0

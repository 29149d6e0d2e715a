"""Training: deterministic from a seed, equal footing between methods, it learns, and it leaves a record."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from emr_training.checkpoint import load_checkpoint
from emr_training.config import ConfigError, make_config, read_config
from emr_training.data import Data, Splits
from emr_training.evaluation import clean_accuracy
from emr_training.training import EpochMetrics, TrainingDiverged, loop, train
from emr_training.training.batches import make_order

EMR = {"penalties.emr": {}}
METHODS: dict[str, dict[str, Any]] = {
    "standard": {},
    "emr": EMR,
    "at": {"defense": "at"},
    "at-emr": {"defense": "at", **EMR},
    "trades": {"defense": "trades", "attack.start_std": 0.001},
    "mart": {"defense": "mart"},
    "fgsm-rs": {"defense": "at", "attack.name": "rfgsm"},
    "mail-at": {"defense": "at", "defense.mail": {}, "defense.burn_in.epoch": 2},
}


def config_of(method: str, **trainer: Any):
    return make_config({**METHODS[method], "trainer": trainer})


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_weights(splits: Splits, method: str) -> None:
    config = config_of(method, epochs=2)
    torch.manual_seed(1)
    first = train(config, splits.train, splits.validation, 10)
    torch.manual_seed(2)
    again = train(config, splits.train, splits.validation, 10)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [m.losses for m in first.history] == [m.losses for m in again.history]
    assert first.history[-1].validation_robust_accuracy == again.history[-1].validation_robust_accuracy


def test_another_seed_other_weights(splits: Splits) -> None:
    models = [train(config_of("standard", epochs=1, seed=seed), splits.train, None, 10).model for seed in (0, 1)]
    assert not torch.equal(next(models[0].parameters()), next(models[1].parameters()))


def test_methods_start_alike_and_see_the_same_batches(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, orders = [], []
    make_defense = loop.make_defense

    def recording(config, penalties, parts):
        starts.append([])
        orders.append([])
        defense = make_defense(config, penalties, parts)

        class Recording:
            def at_epoch(self, epoch: int):
                return self

            def __call__(self, model, x, y, *, generator=None):
                if not starts[-1]:
                    starts[-1] = [p.detach().clone() for p in model.parameters()]
                orders[-1].append(x)
                return defense(model, x, y, generator=generator)

        return Recording()

    monkeypatch.setattr(loop, "make_defense", recording)
    for method in ("standard", "emr", "at", "at-emr"):
        train(config_of(method, epochs=2), splits.train, None, 10)
    for start, order in zip(starts[1:], orders[1:], strict=True):
        assert all(map(torch.equal, start, starts[0]))
        assert len(order) == 30 and all(map(torch.equal, order, orders[0]))


def test_validation_does_not_change_training(splits: Splits) -> None:
    config = config_of("at", epochs=2)
    with_it, without = (train(config, splits.train, v, 10).model for v in (splits.validation, None))
    for one, other in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_leaves_the_global_random_state_and_the_signals(splits: Splits) -> None:
    before = torch.get_rng_state()
    handlers = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
    train(config_of("standard", epochs=1), splits.train, None, 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert handlers == [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]


def test_learns_and_reports_each_epoch(splits: Splits) -> None:
    seen: list[EpochMetrics] = []
    result = train(config_of("emr", epochs=8), splits.train, splits.validation, 10, on_epoch=seen.append)
    assert seen == result.history and [m.epoch for m in seen] == list(range(1, 9))
    assert set(seen[0].losses) == {"cross_entropy", "emr"}
    assert seen[-1].losses["cross_entropy"] < seen[0].losses["cross_entropy"] / 3
    assert seen[-1].validation_accuracy == clean_accuracy(result.model, splits.validation).value
    assert seen[-1].validation_accuracy > 0.85
    assert not any(module.training for module in result.model.modules())
    assert result.engine == "linearized"


def test_adversarial_training_helps(net: nn.Module, robust_net: nn.Module, splits: Splits) -> None:
    from emr_training.attacks import PGD
    from emr_training.evaluation import robust_accuracy

    attack = PGD(0.15, 20)
    plain, robust = (robust_accuracy(model, splits.validation, attack) for model in (net, robust_net))
    assert robust.value > plain.value + 0.2


def test_what_a_run_leaves(splits: Splits, tmp_path: Path) -> None:
    config = config_of("at-emr", epochs=3, tensorboard=True, log_steps=5)
    result = train(config, splits.train, splits.validation, 10, output=tmp_path)
    assert make_config(read_config(tmp_path / "config.yaml")) == config
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [EpochMetrics.from_dict(line) for line in lines] == result.history
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [float(row["losses.emr"]) for row in rows] == [m.losses["emr"] for m in result.history]
    assert list((tmp_path / "tensorboard").iterdir())
    best, last = (load_checkpoint(tmp_path / f"{name}.pt") for name in ("best", "last"))
    assert result.best == max(result.history, key=lambda m: m.validation_robust_accuracy)
    assert best.metrics == result.best.as_dict() and last.metrics == result.history[-1].as_dict()
    for one, other in zip(last.model.parameters(), result.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_costs_count_every_pass(splits: Splits) -> None:
    data = Data(splits.train.x[:64], splits.train.y[:64])
    at, emr = (train(config_of(m, epochs=1), data, None, 10).costs for m in ("at", "emr"))
    assert (at.images, at.forwards, at.backwards) == (64, 8 * 64, 8 * 64)
    assert (emr.forwards, emr.backwards) == (3 * 64, 3 * 64)
    assert at.device_seconds == at.seconds > 0 and at.peak_memory_bytes > 1e7


@pytest.mark.parametrize(
    "method",
    [METHODS["at-emr"], {"defense": {"name": "trades", "nominal_batch": True}, "attack.loss": "ce"}],
    ids=["at-emr", "trades"],
)
def test_accumulated_parts_are_one_batch(splits: Splits, method: dict[str, Any]) -> None:
    """In float64, with short batches, for the paper's reduction; rounding is all that may differ."""
    results = []
    for accumulate in (1, 4):
        options = {**method, "attack.random_start": False, "trainer.precision": "64"}
        options |= {"trainer.epochs": 2, "trainer.drop_last": False, "trainer.accumulate": accumulate}
        data = Data(splits.train.x[:300], splits.train.y[:300])
        results.append(train(make_config(options), data, None, 10))
    for one, other in zip(results[0].model.parameters(), results[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for key, value in results[0].history[-1].losses.items():
        assert value > 0
        assert results[1].history[-1].losses[key] == pytest.approx(value, rel=1e-9)


def test_early_stopping_keeps_the_best(splits: Splits, tmp_path: Path) -> None:
    options = {"trainer.epochs": 30, "trainer.patience": 2, "optimizer.learning_rate": 1e-12, "defense": "at"}
    result = train(make_config(options), splits.train, splits.validation, 10, output=tmp_path)
    assert result.stopped == "patience" and len(result.history) == 3 and result.best == result.history[0]
    assert load_checkpoint(tmp_path / "last.pt").metrics["epoch"] == 3


def test_divergence_names_step_images_and_the_last_good_checkpoint(splits: Splits, tmp_path: Path) -> None:
    options = {"optimizer.learning_rate": 1e30, "trainer.epochs": 2}
    with pytest.raises(TrainingDiverged, match=r"in epoch 1 at step \d+: losses .*; no checkpoint.*; try a smaller"):
        train(make_config(options), splits.train, None, 10)
    poisoned = Data(splits.train.x.clone(), splits.train.y)
    object.__setattr__(poisoned, "x", poisoned.x.clone())
    config = make_config({"trainer.epochs": 2})

    def poison(metrics: EpochMetrics) -> None:
        poisoned.x[123] = torch.nan

    with pytest.raises(TrainingDiverged) as caught:
        train(config, poisoned, None, 10, output=tmp_path, on_epoch=poison)
    message = str(caught.value)
    assert "in epoch 2 at step" in message and " 123," in message and "after step 15;" in message
    assert str(tmp_path / "state.pt") in message
    assert all(p.isfinite().all() for p in torch.load(tmp_path / "state.pt")["model"].values())


def test_divergence_under_attack(splits: Splits) -> None:
    options = {"defense": "at", "optimizer.learning_rate": 1e30, "trainer.epochs": 1}
    with pytest.raises(TrainingDiverged, match="training diverged in epoch 1"):
        train(make_config(options), splits.train, None, 10)


def test_sigterm_saves_and_ends(splits: Splits, tmp_path: Path) -> None:
    config = config_of("standard", epochs=3)

    def at_step(step: int, steps: int, images: int) -> None:
        if step == 20:
            os.kill(os.getpid(), signal.SIGTERM)

    result = train(config, splits.train, None, 10, output=tmp_path, on_step=at_step)
    assert result.stopped == "SIGTERM" and len(result.history) == 1
    assert torch.load(tmp_path / "state.pt")["step"] == 20
    resumed = train(config, splits.train, None, 10, output=tmp_path, resume=True)
    whole = train(config, splits.train, None, 10)
    assert [m.losses for m in resumed.history] == [m.losses for m in whole.history]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"defense": {"name": "at", "mail": {"normalize": True}}, "trainer.accumulate": 2},
            "defense.mail.normalize is true with 1 devices, 2 parts each; expected one device and trainer.accumulate 1",
        ),
        (
            {"defense": {"name": "trades", "nominal_batch": True}, "trainer": {"accumulate": 4, "drop_last": False}},
            "defense.nominal_batch is true with 1 devices, 4 parts each, into which an epoch's last batch does not",
        ),
        ({"trainer.precision": "16-mixed"}, "trainer.precision is 16-mixed on the CPU; expected 32 or bf16-mixed"),
        (
            {"trainer.sync_batchnorm": True, "trainer.devices": 2},
            "trainer.sync_batchnorm is true on CPUs; expected false there, as it needs GPUs",
        ),
    ],
)
def test_what_data_and_devices_rule_out(splits: Splits, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        train(make_config({**options, "trainer.device": "cpu"}), splits.train, None, 10)
    assert str(caught.value).startswith(message)


def test_a_device_that_is_not_there(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"trainer.device is cuda, which this PyTorch does not find here"):
        train(make_config({"trainer.device": "cuda"}), splits.train, None, 10)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=r"trainer.devices is 4; expected at most 2, the GPUs of this machine"):
        train(make_config({"trainer.devices": 4}), splits.train, None, 10)


def test_labels_that_are_no_class(splits: Splits, tmp_path: Path) -> None:
    """Found before anything of an earlier run is touched."""
    (tmp_path / "best.pt").write_text("earlier")
    config = make_config({"data.extra": "more.npz", "data.extra_fraction": 0.5})
    more = Data(splits.train.x, splits.train.y + 2)
    with pytest.raises(ConfigError, match=r"data.extra has labels from 2 to 11; expected 0 to 9, the 10 classes"):
        train(config, splits.train, None, 10, extra=more, output=tmp_path)
    with pytest.raises(ConfigError, match=r"^data has labels from 0 to 9; expected 0 to 4"):
        train(make_config({}), splits.train, None, 5, output=tmp_path)
    assert (tmp_path / "best.pt").read_text() == "earlier"


def test_batch_larger_than_the_data(splits: Splits) -> None:
    with pytest.raises(ConfigError, match=r"trainer.batch_size is 5000; expected at most 989"):
        train(config_of("standard", batch_size=5000), splits.train, None, 10)


def test_bytes_and_augmentation_reach_the_model_as_images() -> None:
    seen: list[torch.Tensor] = []
    x = torch.randint(0, 256, (40, 1, 6, 6), dtype=torch.uint8)
    data = Data(x, torch.arange(40) % 4)
    options = {"model": "cnn", "defense": "standard", "trainer.epochs": 1, "trainer.batch_size": 20}
    original = nn.Conv2d.forward

    def recorded(self: nn.Conv2d, given: torch.Tensor) -> torch.Tensor:
        if given.shape[1] == 1 and self.training:
            seen.append(given.detach().clone())
        return original(self, given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Conv2d, "forward", recorded)
        train(make_config(options), data, None, 4)
        plain, seen = torch.cat(seen), []
        train(make_config({**options, "data.augmentation.flip": True}), data, None, 4)
    flipped, images = torch.cat(seen), x.float() / 255

    def count(batch: torch.Tensor, among: torch.Tensor) -> int:
        return sum(bool((among == image).flatten(1).all(1).any()) for image in batch)

    assert count(plain, images) == 40
    assert 5 < count(flipped, images) < 35
    assert count(flipped, torch.cat([images, images.flip(3)])) == 40


def test_further_images_fill_their_share_of_each_batch() -> None:
    config = make_config({"trainer.batch_size": 10, "data.extra": "x.npz", "data.extra_fraction": 0.3})
    order = make_order(config, 50, 7)
    epochs = [list(order) for _ in range(2)]
    for batches in epochs:
        assert len(batches) == order.batches == 50 // 7
        assert all((index < 50).sum() == 7 and (index >= 50).sum() == 3 for index in batches)
        first = torch.cat([index[index < 50] for index in batches])
        assert len(first.unique()) == len(first)
    second = torch.cat([index[index >= 50] for batches in epochs for index in batches]) - 50
    assert set(second.tolist()) == set(range(7))
    with pytest.raises(ConfigError, match=r"data.extra_fraction is 0.3: 3 of 10 images of a batch, with 2 further"):
        make_order(config, 50, 2)


def test_a_mixture_goes_on_where_it_was() -> None:
    config = make_config({"trainer.batch_size": 10, "data.extra": "x.npz", "data.extra_fraction": 0.3})
    whole = make_order(config, 50, 7)
    expected = [index for _ in range(2) for index in whole]
    part = make_order(config, 50, 7)
    begin = list(itertools.islice(part, 4))
    state = part.state_dict()
    rest = make_order(config, 50, 7)
    rest.load_state_dict(state)
    found = [*begin, *rest, *rest]
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)

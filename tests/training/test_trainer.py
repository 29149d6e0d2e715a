"""Training: deterministic from a seed, equal footing between methods, and it does learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emr_training import trainer
from emr_training.config import ConfigError, make_config
from emr_training.data import Splits
from emr_training.evaluation import clean_accuracy
from emr_training.trainer import EpochMetrics, TrainingDiverged, train

METHODS = ["standard", "emr", "at", "at-emr"]


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_weights(splits: Splits, method: str, model: str) -> None:
    options = {"method": method, "model": model, "epochs": 2 if model == "mlp" else 1}
    torch.manual_seed(1)
    first = train(make_config(options), splits.train, splits.validation, 10)
    torch.manual_seed(2)
    again = train(make_config(options), splits.train, splits.validation, 10)
    for one, other in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert [m.losses for m in first.history] == [m.losses for m in again.history]
    assert first.history[-1].validation_robust_accuracy == again.history[-1].validation_robust_accuracy


def test_another_seed_other_weights(splits: Splits) -> None:
    models = [train(make_config({"epochs": 1, "seed": seed}), splits.train, None, 10).model for seed in (0, 1)]
    assert not torch.equal(next(models[0].parameters()), next(models[1].parameters()))


def test_methods_start_alike_and_see_the_same_batches(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    starts, orders = [], []
    make_defense = trainer.make_defense

    def recording(config, model):
        starts.append([p.detach().clone() for p in model.parameters()])
        orders.append([])
        defense = make_defense(config, model)

        def call(model, x, y, *, generator=None):
            orders[-1].append(x)
            return defense(model, x, y, generator=generator)

        call.penalties = defense.penalties
        return call

    monkeypatch.setattr(trainer, "make_defense", recording)
    for method in METHODS:
        train(make_config({"method": method, "epochs": 2}), splits.train, None, 10)
    for start, order in zip(starts[1:], orders[1:], strict=True):
        assert all(map(torch.equal, start, starts[0]))
        assert len(order) == 30 and all(map(torch.equal, order, orders[0]))


def test_validation_does_not_change_training(splits: Splits) -> None:
    config = make_config({"method": "at", "epochs": 2})
    with_it, without = (train(config, splits.train, v, 10).model for v in (splits.validation, None))
    for one, other in zip(with_it.parameters(), without.parameters(), strict=True):
        assert torch.equal(one, other)


def test_leaves_the_global_random_state(splits: Splits) -> None:
    before = torch.get_rng_state()
    train(make_config({"epochs": 1}), splits.train, None, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_learns_and_reports_each_epoch(splits: Splits) -> None:
    seen: list[EpochMetrics] = []
    config = make_config({"method": "emr", "epochs": 8, "strength": 1.0})
    result = train(config, splits.train, splits.validation, 10, on_epoch=seen.append)
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


def test_divergence_is_named(splits: Splits) -> None:
    with pytest.raises(TrainingDiverged, match=r"training diverged in epoch 1: losses .*nan.*; try a smaller"):
        train(make_config({"learning_rate": 1e30, "epochs": 2}), splits.train, None, 10)


def test_batch_larger_than_the_data(splits: Splits) -> None:
    with pytest.raises(ConfigError, match="batch_size is 5000; expected at most 989"):
        train(make_config({"batch_size": 5000}), splits.train, None, 10)

"""Accuracies, their sampling error, and margins against exact distances."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from emr_training.attacks import PGD
from emr_training.data import Data, Splits
from emr_training.evaluation import Accuracy, clean_accuracy, robust_accuracy, robust_curve


@pytest.mark.parametrize(("correct", "total"), [(0, 50), (1, 50), (270, 539), (50, 50)])
def test_intervals(correct: int, total: int) -> None:
    accuracy = Accuracy(correct, total)
    expected = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
    assert accuracy.interval() == pytest.approx((expected.low, expected.high), abs=1e-5)
    assert accuracy.standard_error == pytest.approx(stats.binom(total, correct / total).std() / total)


def test_clean_accuracy(net: nn.Module, splits: Splits) -> None:
    expected = int((net(splits.test.x).argmax(1) == splits.test.y).sum())
    for batch_size in (64, 1000):
        assert clean_accuracy(net, splits.test, batch_size) == Accuracy(expected, len(splits.test))


def test_evaluation_uses_evaluation_mode_and_restores_it(batch: Data) -> None:
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Dropout(0.9), nn.Linear(64, 10)).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert clean_accuracy(model, batch) == clean_accuracy(model, batch)
    robust_accuracy(model, batch, PGD(0.1, 2))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_robust_accuracy_counts_the_attacks_images(net: nn.Module, batch: Data) -> None:
    attack = PGD(0.1, 5)
    wrong = net(attack(net, batch.x, batch.y)).argmax(1) != batch.y
    assert robust_accuracy(net, batch, attack) == Accuracy(64 - int(wrong.sum()), 64)


def test_robust_curve_goes_from_clean_to_zero(net: nn.Module, batch: Data) -> None:
    curve = robust_curve(net, batch, PGD(0.0, 10), spacing=0.05)
    epsilons = [epsilon for epsilon, _ in curve]
    assert epsilons == pytest.approx([0.05 * i for i in range(len(curve))])
    assert curve[0][1] == clean_accuracy(net, batch)
    assert [a.correct > 0 for _, a in curve] == [True] * (len(curve) - 1) + [False]
    assert curve[2][1] == robust_accuracy(net, batch, PGD(0.1, 10))
    known = robust_curve(net, batch, PGD(0.0, 10), spacing=0.05, known={0.1: Accuracy(63, 64)})
    assert known[2] == (0.1, Accuracy(63, 64)) and known[3] == curve[3]


def test_robust_curve_ends_at_one_where_the_attack_fails(batch: Data) -> None:
    class Masked(nn.Module):
        """Right everywhere without a gradient to follow."""

        def forward(self, x):
            logits = nn.functional.one_hot(batch.y, 10).to(x)
            return logits[: len(x)] + 0 * x.sum()

    curve = robust_curve(Masked(), batch, PGD(0.0, 2), spacing=0.4)
    assert [epsilon for epsilon, _ in curve] == [0.0, 0.4, 0.8, 1.0]
    assert curve[-1][1].correct == 64


def test_robust_curve_needs_a_step_that_scales(net: nn.Module, batch: Data) -> None:
    with pytest.raises(ValueError, match=r"attack.step_size is 0.1; expected None"):
        robust_curve(net, batch, PGD(0.0, 2, step_size=0.1), spacing=0.1)

"""PGD: bounds, strength, exactness on linear models, bad input, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_training.attacks import PGD
from emr_training.attacks.balls import Ball
from emr_training.attacks.losses import cross_entropy
from emr_training.data import Data
from emr_training.evaluation import clean_accuracy, robust_accuracy
from side_effects import Awkward, trace


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("random_start", [True, False])
@pytest.mark.parametrize("epsilon", [0.0, 0.03, 0.3, 2.0])
def test_stays_in_ball_and_box(net: nn.Module, batch: Data, epsilon: float, random_start: bool, keep: str) -> None:
    x_adv = PGD(epsilon, 5, random_start=random_start, keep=keep)(net, batch.x, batch.y)
    assert x_adv.shape == batch.x.shape and x_adv.dtype == batch.x.dtype
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert (x_adv - batch.x).abs().max() <= epsilon + 2 * (1 + epsilon) * torch.finfo(torch.float32).eps


def test_uses_the_ball(net: nn.Module, batch: Data) -> None:
    x_adv = PGD(0.05, 5, keep="last")(net, batch.x, batch.y)
    assert (x_adv - batch.x).abs().max() > 0.0499


def test_objective_orders_as_cross_entropy() -> None:
    logits = 5 * torch.randn(32, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randint(7, (32,))
    losses = F.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(F.softplus(cross_entropy(logits, y)[0]), losses)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    wrong = 1 - logits.detach().softmax(1).gather(1, y[:, None])
    torch.testing.assert_close(cross_entropy(logits.detach(), y)[1] * wrong, gradient)


def test_objective_seed_survives_confident_logits() -> None:
    logits = torch.tensor([[300.0, 0.0, -1.0]])
    y = torch.tensor([0])
    leaf = logits.clone().requires_grad_()
    (plain,) = torch.autograd.grad(F.cross_entropy(leaf, y), leaf)
    assert not plain.any()
    torch.testing.assert_close(cross_entropy(logits, y)[1][0, 0], torch.tensor(-1.0))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_exact_on_a_linear_model(scale: float) -> None:
    # The scale saturates cross-entropy in float32; the worst case stays the same.
    weight = scale * torch.randn(2, 12)
    model = nn.Linear(12, 2, bias=False)
    model.weight.data.copy_(weight)
    x, y = torch.rand(50, 12), torch.zeros(50, dtype=torch.int64)
    x_adv = PGD(0.1, 20, keep="last")(model, x, y)
    worst = (x + 0.1 * (weight[1] - weight[0]).sign()).clamp(0, 1)
    torch.testing.assert_close(x_adv, worst)


def test_epsilon_zero_is_clean(net: nn.Module, splits) -> None:
    assert robust_accuracy(net, splits.test, PGD(0.0)) == clean_accuracy(net, splits.test)


def test_large_epsilon_leaves_nothing(net: nn.Module, robust_net: nn.Module, batch: Data) -> None:
    attack = PGD(1.0, 40, restarts=2)
    assert robust_accuracy(net, batch, attack).correct == 0
    assert robust_accuracy(robust_net, batch, attack).correct == 0


@pytest.mark.parametrize("epsilon", [0.06, 0.15])
def test_more_work_is_never_weaker(net: nn.Module, robust_net: nn.Module, splits, epsilon: float) -> None:
    for model in (net, robust_net):
        base = PGD(epsilon, 3, step_size=epsilon / 4)
        ladder = [base, replace(base, steps=10), replace(base, steps=10, restarts=4)]
        counts = [robust_accuracy(model, splits.validation, attack).correct for attack in ladder]
        counts.insert(0, clean_accuracy(model, splits.validation).correct)
        assert counts == sorted(counts, reverse=True)
        assert counts[0] > counts[-1] > 0


def test_best_returns_the_first_success_and_never_a_weaker_point(net: nn.Module, batch: Data) -> None:
    x_adv = PGD(0.05, 10, restarts=2)(net, batch.x, batch.y)
    with torch.no_grad():
        before, after = (cross_entropy(net(x), batch.y)[0] for x in (batch.x, x_adv))
    assert (after >= before - 1e-5).all()
    wrong = net(batch.x).argmax(1) != batch.y
    assert torch.equal(x_adv[wrong], batch.x[wrong])


def test_a_success_of_lower_loss_replaces_a_failure_of_higher_loss() -> None:
    class Switch(nn.Module):
        """Right below 0.6 with nine close rivals, wrong above with one rival, where cross-entropy is lower."""

        def forward(self, x: Tensor) -> Tensor:
            below = torch.tensor([0.0] + 9 * [-0.1])
            above = torch.tensor([0.0, 0.5] + 8 * [-10.0])
            return torch.where(x > 0.6, above, below) + 0 * x

    x, y = torch.full((8, 1), 0.5), torch.zeros(8, dtype=torch.int64)
    x_adv = PGD(0.5, 1, restarts=20)(Switch(), x, y)
    assert (x_adv > 0.6).all()


def test_last_with_restarts_keeps_the_greatest_loss(robust_net: nn.Module, batch: Data) -> None:
    def loss(restarts: int) -> Tensor:
        x_adv = PGD(0.3, 3, restarts=restarts, keep="last")(robust_net, batch.x, batch.y)
        return cross_entropy(robust_net(x_adv), batch.y)[0].detach()

    assert (loss(4) >= loss(1) - 1e-5).all()
    assert (loss(4) > loss(1) + 1e-3).any()


def test_random_starts_come_from_seed_or_generator(net: nn.Module, batch: Data) -> None:
    def attack(seed: int = 0, generator: torch.Generator | None = None) -> Tensor:
        return PGD(0.1, 1, step_size=0.01, keep="last", seed=seed)(net, batch.x, batch.y, generator=generator)

    assert torch.equal(attack(), attack())
    assert not torch.equal(attack(), attack(seed=1))
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(attack(), attack(generator=generator))
    assert not torch.equal(attack(), attack(generator=generator))


@pytest.mark.parametrize("keep", ["best", "last"])
@pytest.mark.parametrize("mode", [nn.Module.train, nn.Module.eval])
def test_leaves_no_trace(batch: Data, keep: str, mode: Callable) -> None:
    # In the middle of training and with failures: test_side_effects.py.
    model = Awkward()
    mode(model)
    before = trace(model)
    PGD(0.1, 5, keep=keep)(model, batch.x, batch.y)
    assert trace(model) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_where_gradients_are_off(net: nn.Module, batch: Data, context: Callable) -> None:
    attack = PGD(0.1, 3)
    expected = attack(net, batch.x, batch.y)
    with context():
        x = batch.x.clone()
        assert torch.equal(attack(net, x, batch.y), expected)


def test_empty_batch(net: nn.Module) -> None:
    assert PGD(0.1)(net, torch.zeros(0, 1, 8, 8), torch.zeros(0, dtype=torch.int64)).shape == (0, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": -0.1}, ValueError, "epsilon is -0.1; expected a finite number >= 0"),
        ({"epsilon": float("nan")}, ValueError, "epsilon is nan"),
        ({"epsilon": 0.1, "steps": 0}, ValueError, "steps is 0; expected an integer >= 1"),
        ({"epsilon": 0.1, "steps": 2.5}, TypeError, "steps is 2.5 of type float"),
        ({"epsilon": 0.1, "restarts": True}, TypeError, "restarts is True"),
        ({"epsilon": 0.1, "step_size": -1.0}, ValueError, "step_size is -1.0"),
        ({"epsilon": 0.1, "keep": "lst"}, ValueError, "keep is 'lst'; did you mean 'last'"),
        (
            {"epsilon": 0.1, "restarts": 2, "random_start": False},
            ValueError,
            "restarts is 2 without random_start",
        ),
    ],
)
def test_bad_settings(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(**options)


X, Y = torch.rand(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (X + 1, Y, ValueError, r"x has values in .*; expected \[0, 1\]"),
        (-X, Y, ValueError, r"x has values in .*; expected \[0, 1\]"),
        (X * float("nan"), Y, ValueError, "x has values in"),
        (X.mul(255).to(torch.uint8), Y, TypeError, "x is of type torch.uint8; expected a floating-point"),
        (X.numpy(), Y, TypeError, "x is of type ndarray"),
        (X.flatten(), Y, ValueError, r"x has shape \[256\]"),
        (X, Y[:3], ValueError, r"y has shape \[3\]; expected \[4\]"),
        (X, Y.float(), TypeError, "y is of type torch.float32; expected class indices"),
        (X, Y - 1, ValueError, "y has the label -1"),
        (X, Y + 9, ValueError, "y has the label 12; expected labels below the model's 10 classes"),
    ],
)
@pytest.mark.parametrize("keep", ["best", "last"])
def test_bad_input(net: nn.Module, keep: str, x: Tensor, y: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PGD(0.1, keep=keep)(net, x, y)


def test_bad_models() -> None:
    with pytest.raises(ValueError, match=r"the model's output is \[4, 8, 8, 1\]; expected logits \[4, C\]"):
        PGD(0.1)(nn.Unflatten(2, (8, 1)), X[:, 0], Y)
    with pytest.raises(ValueError, match=r"expected logits \[4, C\] with C >= 2"):
        PGD(0.1)(nn.Sequential(nn.Flatten(), nn.Linear(64, 1)), X, Y)


@pytest.mark.parametrize("keep", ["best", "last"])
def test_nan_model_is_not_robust(keep: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="the model's output has NaN"):
        PGD(0.1, keep=keep)(model, X, Y)


def test_bounds_check_catches_a_faulty_attack() -> None:
    with pytest.raises(RuntimeError, match="left its ball: Linf distance"):
        Ball("Linf", 0.1).check((X + 0.2).clamp(0, 1), X)
    with pytest.raises(RuntimeError, match="left the box"):
        Ball("Linf", 1.0).check(X + 1, X)

"""Carlini and Wagner's attack: exact where the model is linear, its runs, kappa, and each image on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import emr_kernels
from emr_training.attacks import CarliniWagner, cw
from emr_training.attacks.balls import distance
from emr_training.attacks.classifier import Classifier
from emr_training.attacks.problem import Problem
from emr_training.data import Data
from linear_models import images, linear, one_region


def margins(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """z_y less the largest other logit, [N]."""
    with torch.no_grad():
        logits = model(x)
    rival = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return logits.gather(1, y[:, None]).squeeze(1) - rival


@pytest.mark.parametrize("kind", [linear, one_region])
def test_exact_where_the_model_is_linear(kind: Callable) -> None:
    model = kind(2)
    x, y = images(model, least=0.02)
    exact = emr_kernels.effective_margins(model, x, y)
    x_adv = CarliniWagner(200)(model, x, y)
    assert (margins(model, x_adv, y) < 0).all()
    torch.testing.assert_close(distance("L2", x_adv, x).float(), exact, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", [linear, one_region])
def test_the_nearest_target_is_as_far_as_the_boundary(kind: Callable) -> None:
    # Towards one target the problem is convex. Untargeted the attack may settle for another class than the nearest.
    model = kind(4)
    x, y = (part[:8] for part in images(model, least=0.02))
    exact = emr_kernels.effective_margins(model, x, y)
    found, attack = [], CarliniWagner(400, c=0.1, runs=6)
    for shift in (1, 2, 3):
        target = (y + shift) % 4
        x_adv = attack(model, x, y, target=target)
        assert (margins(model, x_adv, target) > 0).all()
        found.append(distance("L2", x_adv, x).float())
    torch.testing.assert_close(torch.stack(found).amin(0), exact, rtol=0.01, atol=0)
    untargeted = distance("L2", attack(model, x, y), x).float()
    assert (untargeted > 0.99 * exact).all() and (untargeted < 1.01 * torch.stack(found).amax(0)).all()


def test_kappa_is_the_margin_of_a_success() -> None:
    model = linear(3)
    x, y = images(model, least=0.02)
    with torch.no_grad():
        scale = float(margins(model, x, y).median())
    attack = CarliniWagner(100, c=0.1, runs=6)
    plain, wide = (replace(attack, kappa=kappa)(model, x, y) for kappa in (0.0, scale))
    assert (margins(model, wide, y) <= -scale).all()
    assert (distance("L2", wide, x) > distance("L2", plain, x)).all()
    # What has the margin already is done; what has not is moved on.
    again = replace(attack, kappa=scale)(model, wide, y)
    assert torch.equal(again, wide)
    further = replace(attack, kappa=scale)(model, plain, y)
    assert (margins(model, further, y) <= -scale).all()


def test_failures_are_returned_unchanged() -> None:
    model = linear(2)
    model.weight.data *= 1e-3
    model.bias.data = torch.tensor([1.0, 0.0])
    x, y = torch.rand(5, 12), torch.tensor([0, 0, 1, 0, 0])
    assert torch.equal(CarliniWagner(10, runs=3)(model, x, y), x)


def test_values_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    tried, hits = [], []
    begin, restart = cw._Runs.__init__, cw._Runs.restart

    def watched_begin(self: cw._Runs, rows: Tensor, problem: Problem, c: float) -> None:
        begin(self, rows, problem, c)
        tried.append(float(self.c))

    def watched_restart(self: cw._Runs, ended: Tensor, last: int | None) -> None:
        hits.append(bool(self.hit))
        restart(self, ended, last)
        tried.append(float(self.c))

    monkeypatch.setattr(cw._Runs, "__init__", watched_begin)
    monkeypatch.setattr(cw._Runs, "restart", watched_restart)
    model = linear(2)
    x, y = images(model, least=0.02)
    CarliniWagner(50, runs=10, abort_early=False)(model, x[:1], y[:1])
    lower, upper, expected = 0.0, float("inf"), [1e-3]
    for run, hit in enumerate(hits[:-1], 1):
        upper, lower = (min(upper, expected[-1]), lower) if hit else (upper, max(lower, expected[-1]))
        following = 10 * expected[-1] if upper == float("inf") else (lower + upper) / 2
        expected.append(upper if run == 9 else following)
    assert tried[:-1] == pytest.approx(expected)
    assert len(hits) == 10 and hits[0] is False and True in hits and False in hits[hits.index(True) :]


def test_one_image_does_not_depend_on_the_others(robust_net: nn.Module, batch: Data) -> None:
    attack = CarliniWagner(40, runs=4, learning_rate=0.05)
    together = attack(robust_net, batch.x[:16], batch.y[:16])
    alone = torch.cat([attack(robust_net, batch.x[i : i + 1], batch.y[i : i + 1]) for i in range(4)])
    # Matrix products of another size round otherwise, which Adam's division can enlarge.
    torch.testing.assert_close(alone, together[:4], rtol=0, atol=1e-3)


def test_aborting_early_saves_work_and_little_distance(robust_net: nn.Module, batch: Data) -> None:
    forwards, medians = [], []
    for abort_early in (False, True):
        classifier = Classifier(robust_net)
        problem = Problem(classifier, batch.x[:32], batch.y[:32], None, torch.Generator())
        attack = CarliniWagner(100, runs=5, learning_rate=0.05, abort_early=abort_early)
        x_adv = attack.search(problem)
        assert (margins(robust_net, x_adv, problem.y) < 0).all()
        forwards.append(classifier.forwards)
        medians.append(float(distance("L2", x_adv, problem.x).median()))
    assert forwards[1] < 0.9 * forwards[0]
    assert medians[1] < 1.05 * medians[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_of_the_images(dtype: torch.dtype) -> None:
    model = linear(2).to(dtype)
    x = torch.rand(8, 12).mul(4).round().div(4).to(dtype)  # with black and white pixels
    with torch.no_grad():
        y = model(x).argmax(1)
    x_adv = CarliniWagner(50, runs=5, learning_rate=0.1)(model, x, y)
    assert x_adv.dtype == dtype
    broken = margins(model, x_adv, y) < 0
    assert broken.sum() >= 7
    assert torch.equal(x_adv[~broken], x[~broken])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0; expected an integer >= 1"),
        ({"runs": 1.5}, TypeError, "runs is 1.5 of type float"),
        ({"kappa": -1.0}, ValueError, "kappa is -1.0; expected a finite number >= 0"),
        ({"learning_rate": float("inf")}, ValueError, "learning_rate is inf"),
        ({"c": 0.0}, ValueError, "c is 0; expected a number > 0"),
    ],
)
def test_bad_settings(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CarliniWagner(**options)

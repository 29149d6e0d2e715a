"""Averaged weights: each average by its formula, and BatchNorm's statistics that go with it."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from emr_training.config.optimization import AverageConfig
from emr_training.training.averaging import Average


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def shaken(model: nn.Module) -> Tensor:
    """New weights, as from a step."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    return weights(model)


def test_exponential_average() -> None:
    model = network()
    average = Average(AverageConfig(name="ema", decay=0.3, start=2), model)
    early = shaken(model)
    average.after_step(epoch=1)
    assert torch.equal(weights(average.model), early)
    expected = early
    for t in range(8):
        now = shaken(model)
        average.after_step(epoch=2)
        tau = min(0.3, (1 + t) / (10 + t))
        expected = tau * expected + (1 - tau) * now
        torch.testing.assert_close(weights(average.model), expected, rtol=1e-12, atol=1e-12)
    assert tau == 0.3 and (1 + 2) / (10 + 2) < 0.3  # both branches were taken
    model[1].running_mean.fill_(7.0)
    assert torch.equal(average.after_epoch(2, [])[1].running_mean, model[1].running_mean)


def test_mean_of_the_epochs_ends() -> None:
    model = network()
    average = Average(AverageConfig(name="swa", start=2), model)
    ends = []
    images = [torch.randn(5, 3).double(), torch.randn(5, 3).double()]
    for epoch in (1, 2, 3, 4):
        shaken(model)
        average.after_step(epoch)
        ends.append(weights(model))
        average.after_epoch(epoch, images)
    torch.testing.assert_close(weights(average.model), torch.stack(ends[1:]).mean(0), rtol=1e-12, atol=1e-12)
    # BatchNorm's statistics are those of the averaged network on the images.
    inputs = [average.model[0](x) for x in images]
    mean = torch.stack([h.mean(0) for h in inputs]).mean(0)
    variance = torch.stack([h.var(0) for h in inputs]).mean(0)
    torch.testing.assert_close(average.model[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(average.model[1].running_var, variance, rtol=1e-12, atol=1e-12)
    assert not average.model.training and average.model[1].momentum == model[1].momentum


def test_a_state_goes_on() -> None:
    model = network()
    first = Average(AverageConfig(name="ema", start=1), model)
    for _ in range(3):
        shaken(model)
        first.after_step(1)
    second = Average(AverageConfig(name="ema", start=1), model)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    shaken(model)
    for average in (first, second):
        average.after_step(1)
    assert torch.equal(weights(first.model), weights(second.model))

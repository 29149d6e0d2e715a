"""trades_loss and mart_loss: the defenses under the field's signatures."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from emr_training.attacks import PGD
from emr_training.data import Data
from emr_training.defenses import MART, TRADES, mart_loss, trades_loss


@pytest.mark.parametrize(("distance", "norm"), [("l_inf", "Linf"), ("l_2", "L2")])
@pytest.mark.parametrize("adapter", [trades_loss, mart_loss])
def test_adapters_are_the_defenses(net: nn.Module, batch: Data, adapter: Callable, distance: str, norm: str) -> None:
    model = copy.deepcopy(net).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.layers[1].weight.grad = torch.ones_like(model.layers[1].weight)
    x, y = batch.x[:16], batch.y[:16]
    torch.manual_seed(3)
    loss = adapter(model, x, y, optimizer, 0.05, 0.2, 3, 5.0, distance)
    assert model.training and model.layers[1].weight.grad is None
    torch.manual_seed(3)
    options = {"seed": int(torch.randint(2**31, ())), "norm": norm, "start_std": 0.001, "keep": "last"}
    if adapter is trades_loss:
        expected = TRADES(PGD(0.2, 3, 0.05, loss="kl", **options), 5.0)(model, x, y).total
    else:
        expected = MART(PGD(0.2, 3, 0.05, **options), 5.0)(model, x, y).total
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, model.layers[1].weight), torch.autograd.grad(expected, model.layers[1].weight)
    )


def test_each_call_starts_elsewhere(net: nn.Module, batch: Data) -> None:
    model = copy.deepcopy(net)
    x, y = batch.x[:16], batch.y[:16]
    torch.manual_seed(0)
    first, second = (trades_loss(model, x, y, epsilon=0.2, step_size=0.05, perturb_steps=1, beta=6.0) for _ in range(2))
    assert not torch.equal(first, second)


def test_bad_distance(net: nn.Module, batch: Data) -> None:
    with pytest.raises(ValueError, match="distance is 'linf'; did you mean 'l_inf'"):
        trades_loss(net, batch.x, batch.y, distance="linf")

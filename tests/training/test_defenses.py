"""Defenses: their loss terms equal the definitions, and penalties are taken where they belong."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_training.attacks import PGD
from emr_training.config import make_config
from emr_training.data import Data
from emr_training.defenses import MART, PGDAT, TRADES, Defense, Standard
from emr_training.penalties import EMR
from emr_training.training import make_defense, make_penalties
from side_effects import Normalising


class Recorder:
    """A penalty that remembers where it was called."""

    def __init__(self, strength: float, name: str = "recorder") -> None:
        self.strength, self.name, self.seen = strength, name, []

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen.append((x, y))
        return x.sum()


def effective_weight_penalty(model: nn.Module, x: Tensor, temperature: float) -> Tensor:
    """The paper's penalty by double backward, sample by sample."""
    norms = []
    for row in x:
        row = row[None].clone().requires_grad_()
        logits = model(row)
        p = (logits.detach() / temperature).softmax(1)
        (weight,) = torch.autograd.grad((p * logits).sum(), row, create_graph=True)
        norms.append(weight.square().sum())
    return torch.stack(norms).sum() / len(x) ** 2


def test_standard_terms(net: nn.Module, batch: Data) -> None:
    recorder = Recorder(0.5)
    losses = Standard([recorder])(net, batch.x, batch.y)
    torch.testing.assert_close(losses.terms["cross_entropy"], F.cross_entropy(net(batch.x), batch.y))
    torch.testing.assert_close(losses.terms["recorder"], 0.5 * batch.x.sum())
    torch.testing.assert_close(losses.total, losses.terms["cross_entropy"] + losses.terms["recorder"])
    assert torch.equal(recorder.seen[0][0], batch.x)


def test_pgd_at_trains_and_penalises_at_the_adversarial_example(net: nn.Module, batch: Data) -> None:
    attack, recorder = PGD(0.1, 3, keep="last"), Recorder(1.0)
    losses = PGDAT(attack, [recorder])(net, batch.x, batch.y)
    x_adv = attack(net, batch.x, batch.y)
    torch.testing.assert_close(losses.terms["cross_entropy"], F.cross_entropy(net(x_adv), batch.y))
    assert torch.equal(recorder.seen[0][0], x_adv) and torch.equal(recorder.seen[0][1], batch.y)


@pytest.mark.parametrize("method", ["standard", "at"])
def test_emr_gradient_is_double_backwards(net: nn.Module, batch: Data, method: str) -> None:
    model = copy.deepcopy(net).double()
    x, y = batch.x[:16].double(), batch.y[:16]
    config = make_config({"defense": method, "penalties.emr": {"strength": 3.0, "temperature": 0.5}})
    penalties = tuple(make_penalties(config, model).values())
    make_defense(config, penalties)(model, x, y).total.backward()
    found = [p.grad for p in model.parameters()]

    point = x
    if config.defense.name == "at":
        point = PGD(config.attack.epsilon, config.attack.steps, keep="last")(model, x, y)
    loss = F.cross_entropy(model(point), y) + 3.0 * effective_weight_penalty(model, point, 0.5)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_strength_zero_costs_nothing_and_may_change_between_steps(net: nn.Module, batch: Data) -> None:
    recorder = Recorder(0.0)
    defense = Standard([recorder])
    assert list(defense(net, batch.x, batch.y).terms) == ["cross_entropy"]
    assert not recorder.seen
    recorder.strength = 1.0
    assert list(defense(net, batch.x, batch.y).terms) == ["cross_entropy", "recorder"]


@pytest.mark.parametrize(
    "defense", [Standard, partial(PGDAT, PGD(0.1, 3)), partial(TRADES, PGD(0.1, 3)), partial(MART, PGD(0.1, 3))]
)
def test_models_that_write_into_their_input(net: nn.Module, batch: Data, defense: Callable[..., Defense]) -> None:
    totals = []
    for in_place in (False, True):
        model, recorder = Normalising(net, in_place), Recorder(1.0)
        x = batch.x.clone()
        totals.append(defense(penalties=[EMR(model, 1.0, 1.0), recorder])(model, x, batch.y).total)
        assert torch.equal(x, batch.x)
    torch.testing.assert_close(totals[0], totals[1])


def test_penalties_need_names_of_their_own(net: nn.Module, batch: Data) -> None:
    with pytest.raises(ValueError, match="penalty name 'cross_entropy' is taken"):
        Standard([Recorder(1.0, name="cross_entropy")])(net, batch.x, batch.y)


def test_emr_refuses_a_negative_strength(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="strength is -1"):
        EMR(net, -1.0, 1.0)

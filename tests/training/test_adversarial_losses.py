"""TRADES, MART and MAIL against their formulas, value and gradient; and what moves BatchNorm's statistics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_training.attacks import PGD, RFGSM
from emr_training.data import Data
from emr_training.defenses import MAIL, MART, PGDAT, TRADES, BurnIn, Defense, Standard

ATTACK = PGD(0.1, 3, keep="last")


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return (p * (p.log() - q.log())).sum(1)


def runner_up(p: Tensor, y: Tensor) -> Tensor:
    """The largest probability but the label's."""
    return p.scatter(1, y[:, None], -1.0).max(1).values


def margin_code(p: Tensor, y: Tensor) -> Tensor:
    """The released code's probabilistic margin: the rival minus the label."""
    p = p.detach()
    return runner_up(p, y) - p.gather(1, y[:, None]).squeeze(1)


def at(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x_adv), y)


def at_smoothed(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x_adv), y, label_smoothing=0.1)


def trades(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    clean, adversarial = model(x), model(x_adv)
    return F.cross_entropy(clean, y) + 6 * divergence(clean.softmax(1), adversarial.softmax(1)).mean()


def mart(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    label = q.gather(1, y[:, None]).squeeze(1)
    boosted = -label.log() - (1.0001 - runner_up(q, y) + 1e-12).log()
    missed = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
    away = (p * (p.log() - (q + 1e-12).log())).sum(1)
    return (weights * boosted).mean() + 5 * (away * missed).mean()


def mail_at(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    logits = model(x_adv)
    weights = 3 * torch.sigmoid(30 * (margin_code(logits.softmax(1), y) - 0.07))
    return (weights * F.cross_entropy(logits, y, reduction="none")).mean()


def mail_at_normalized(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    logits = model(x_adv)
    weights = torch.sigmoid(10 * (margin_code(logits.softmax(1), y) + 0.5))
    return (weights * F.cross_entropy(logits, y, reduction="none")).sum() / weights.sum()


def mail_trades(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    clean, adversarial = model(x), model(x_adv)
    q = adversarial.softmax(1)
    weights = 3 * torch.sigmoid(5 * (margin_code(q, y) + 0.05))
    return F.cross_entropy(clean, y) + 5 * (weights * divergence(clean.softmax(1), q)).mean()


def mail_mart(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
    weights = 3 * torch.sigmoid(10 * (margin_code(model(x_adv).softmax(1), y) - 0.5))
    return mart(model, x, x_adv, y, weights)


Formula = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
CASES: dict[str, tuple[Defense, Formula]] = {
    "at": (PGDAT(ATTACK), at),
    "at, smoothed": (PGDAT(ATTACK, smoothing=0.1), at_smoothed),
    "trades": (TRADES(ATTACK, 6.0), trades),
    "trades, two clean forwards": (TRADES(ATTACK, 6.0, clean_forwards=2), trades),
    "mart": (MART(ATTACK, 5.0), mart),
    "mail-at": (PGDAT(ATTACK, mail=MAIL(30, -0.07)), mail_at),
    "mail-at, normalized": (PGDAT(ATTACK, mail=MAIL(10, 0.5, normalize=True)), mail_at_normalized),
    "mail-trades": (TRADES(ATTACK, 5.0, mail=MAIL(5, 0.05)), mail_trades),
    "mail-mart": (MART(ATTACK, 5.0, mail=MAIL(10, -0.5)), mail_mart),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_their_formulas(robust_net: nn.Module, batch: Data, name: str) -> None:
    defense, formula = CASES[name]
    model = copy.deepcopy(robust_net).double()
    x, y = batch.x.double(), batch.y
    losses = defense(model, x, y)
    x_adv = ATTACK(model, x, y)
    assert not torch.equal(x_adv, x)
    expected = formula(model, x, x_adv, y)
    torch.testing.assert_close(losses.total, expected, rtol=1e-9, atol=1e-12)
    parameters = list(model.parameters())
    found = torch.autograd.grad(losses.total, parameters)
    for one, other in zip(found, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize(
    ("slope", "bias", "weights"),
    [
        (30, -0.07, [0, 0, 0.0009, 0.0182, 0.3273, 2.1328, 3, 3]),
        (5, 0.05, [0.0422, 0.286, 0.9625, 1.3135, 1.6865, 2.0375, 2.8197, 2.9743]),
        (10, -0.5, [0, 0.0001, 0.0027, 0.0074, 0.0201, 0.054, 1.5, 2.946]),
        (2, 0, [0.4256, 0.8068, 1.2039, 1.3505, 1.5, 1.6495, 2.1932, 2.5744]),
    ],
)
def test_mail_weights(slope: float, bias: float, weights: list[float]) -> None:
    code = torch.tensor([-0.9, -0.5, -0.2, -0.1, 0, 0.1, 0.5, 0.9], dtype=torch.float64)
    rest = 1e-6  # of a third class
    label = (1 - rest - code) / 2
    p = torch.stack([label, label + code, torch.full_like(code, rest)], 1)
    y = torch.zeros(8, dtype=torch.int64)

    unit = PGDAT(PGD(0.0, 1, random_start=False, keep="last"), mail=MAIL(slope, bias))
    per_sample = []
    for row in range(8):
        table = p[row : row + 1].log()
        loss = unit(nn.Sequential(nn.Flatten(), _Constant(table)), torch.zeros(1, 1, 2, 2), y[:1])
        per_sample.append(float(loss.total) / -float(table[0, 0]))
    assert per_sample == pytest.approx(weights, abs=1e-4)


class _Constant(nn.Module):
    """The same logits whatever x is, and differentiable in it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * x.sum()


def test_mart_is_finite_on_certain_predictions() -> None:
    logits = torch.tensor([[400.0, 0.0, -400.0]])
    losses = MART(PGD(0.1, 1, keep="last"))(_Constant(logits), torch.rand(1, 1, 2, 2), torch.tensor([0]))
    assert torch.isfinite(losses.total)


def statistics(defense: Defense, model: nn.Module, x: Tensor, y: Tensor) -> tuple[int, Tensor]:
    """Forwards that BatchNorm counted, and its running mean after the step."""
    model = copy.deepcopy(model)
    defense(model, x, y).total.backward()
    return int(model[1].num_batches_tracked), model[1].running_mean.clone()


def test_what_moves_running_statistics(batch: Data) -> None:
    x, y = batch.x[:16], batch.y[:16]
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    quiet = PGD(0.1, 3, keep="last")
    loud = replace(quiet, bn_mode="train")
    assert statistics(Standard(), model, x, y)[0] == 1
    assert statistics(PGDAT(quiet), model, x, y)[0] == 1
    assert statistics(PGDAT(loud), model, x, y)[0] == 1 + 3
    assert statistics(PGDAT(quiet, clean_forward=True), model, x, y)[0] == 2
    assert statistics(MART(quiet), model, x, y)[0] == 2
    once, twice = (statistics(TRADES(quiet, clean_forwards=n), model, x, y) for n in (1, 2))
    assert (once[0], twice[0]) == (2, 3)
    assert not torch.allclose(once[1], twice[1])


def test_fast_adversarial_training_takes_one_step(net: nn.Module, batch: Data) -> None:
    attack = RFGSM(0.1)
    losses = PGDAT(attack)(net, batch.x, batch.y, generator=torch.Generator().manual_seed(3))
    x_adv = attack(net, batch.x, batch.y, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(losses.total, F.cross_entropy(net(x_adv), batch.y))


def test_trades_nominal_batch(net: nn.Module, batch: Data) -> None:
    own, nominal = TRADES(ATTACK), TRADES(ATTACK, batch_size=128)
    terms = [defense(net, batch.x, batch.y).terms for defense in (own, nominal)]
    torch.testing.assert_close(terms[1]["divergence"], terms[0]["divergence"] * len(batch) / 128)


def test_burn_in(net: nn.Module, batch: Data) -> None:
    first, then = Standard(), PGDAT(ATTACK)
    defense = BurnIn(first, then, 75)
    assert defense.at_epoch(74) is first and defense.at_epoch(75) is then
    assert first.at_epoch(80) is first
    with pytest.raises(RuntimeError, match="at_epoch"):
        defense(net, batch.x, batch.y)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TRADES(ATTACK, -1.0), "beta is -1.0"),
        (lambda: TRADES(ATTACK, clean_forwards=3), "clean_forwards is 3; expected 1 or 2"),
        (lambda: TRADES(ATTACK, batch_size=0), "batch_size is 0"),
        (lambda: MART(ATTACK, float("nan")), "beta is nan"),
        (lambda: PGDAT(ATTACK, smoothing=1.0), "smoothing is 1.0"),
        (lambda: MAIL(float("inf"), 0), "slope is inf"),
        (lambda: BurnIn(Standard(), Standard(), 0), "epoch is 0"),
    ],
)
def test_bad_settings(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()

"""At least as strong as independent implementations, where those are installed (`make test-independent`)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import PGD, CarliniWagner, DeepFool
from emr_training.attacks.balls import distance
from emr_training.config import make_config
from emr_training.data import Data, Splits
from emr_training.training import train

REASON = "not installed; `make test-independent` does so"
with warnings.catch_warnings():
    # Of their age, which is not for these tests to mend.
    warnings.simplefilter("ignore")
    torchattacks = pytest.importorskip("torchattacks", reason=REASON)
    foolbox = pytest.importorskip("foolbox", reason=REASON)

METHODS = {
    "standard": {"trainer.epochs": 10},
    "at": {"defense": "at", "trainer.epochs": 8},
    "at-emr": {"defense": "at", "trainer.epochs": 8, "penalties.emr.strength": 1.0},
}
EPSILON = {"Linf": {"standard": 0.05, "at": 0.12, "at-emr": 0.12}, "L2": {"standard": 0.3, "at": 0.5, "at-emr": 0.5}}
STARTS = 4


@pytest.fixture(scope="module", params=list(METHODS))
def trained(request: pytest.FixtureRequest, splits: Splits) -> tuple[str, nn.Module]:
    """A convolutional network for digits."""
    config = make_config({"model": "cnn", **METHODS[request.param]})
    return request.param, train(config, splits.train, None, splits.classes).model.eval()


@pytest.fixture(scope="module")
def digits(splits: Splits) -> Data:
    return Data(splits.test.x[:200], splits.test.y[:200])


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())


def foolbox_model(model: nn.Module) -> object:
    return foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")


def pgd_of_torchattacks(model: nn.Module, data: Data, norm: str, epsilon: float) -> Tensor:
    if norm == "Linf":
        attack = torchattacks.PGD(model, eps=epsilon, alpha=epsilon / 4, steps=20)
    else:
        attack = torchattacks.PGDL2(model, eps=epsilon, alpha=epsilon / 4, steps=20)
    return attack(data.x, data.y)


def pgd_of_foolbox(model: nn.Module, data: Data, norm: str, epsilon: float) -> Tensor:
    attacks = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}
    attack = attacks[norm](steps=20, abs_stepsize=epsilon / 4)
    return attack(foolbox_model(model), data.x, data.y, epsilons=epsilon)[1]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("theirs", [pgd_of_torchattacks, pgd_of_foolbox])
def test_pgd(trained: tuple[str, nn.Module], digits: Data, theirs: Callable[..., Tensor], norm: str) -> None:
    method, model = trained
    epsilon = EPSILON[norm][method]
    ours, reference = [], []
    for seed in range(STARTS):
        x_adv = PGD(epsilon, 20, epsilon / 4, norm=norm, seed=seed)(model, digits.x, digits.y)
        ours.append(accuracy(model, x_adv, digits.y))
        torch.manual_seed(seed)
        x_adv = theirs(model, digits, norm, epsilon)
        reference.append(accuracy(model, x_adv, digits.y))
    assert min(reference) > 0.05 and max(reference) < accuracy(model, digits.x, digits.y) - 0.05
    counts = torch.tensor([ours, reference], dtype=torch.float64)
    # One standard error of the random starts, of whichever of the two varies more with them.
    assert counts[0].mean() <= counts[1].mean() + counts.std(1).max()


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_deepfool(trained: tuple[str, nn.Module], digits: Data, norm: str) -> None:
    _, model = trained
    attacks = {"Linf": foolbox.attacks.LinfDeepFoolAttack, "L2": foolbox.attacks.L2DeepFoolAttack}
    theirs = attacks[norm](steps=50, candidates=10, overshoot=0.02, loss="logits")
    reference = theirs(foolbox_model(model), digits.x, digits.y, epsilons=None)[1]
    x_adv = DeepFool(norm=norm)(model, digits.x, digits.y)
    assert accuracy(model, x_adv, digits.y) <= accuracy(model, reference, digits.y)
    ours, other = (distance(norm, found, digits.x) for found in (x_adv, reference))
    assert ours.median() <= 1.01 * other.median() and ours.mean() <= 1.01 * other.mean()


def test_carlini_wagner(trained: tuple[str, nn.Module], digits: Data) -> None:
    _, model = trained
    x, y = digits.x[:24], digits.y[:24]
    theirs = foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=5, steps=100, stepsize=0.05)
    reference = theirs(foolbox_model(model), x, y, epsilons=None)[1]
    x_adv = CarliniWagner(100, runs=5, learning_rate=0.05)(model, x, y)
    assert accuracy(model, x_adv, y) <= accuracy(model, reference, y)
    ours, other = (distance("L2", found, x) for found in (x_adv, reference))
    assert ours.median() <= 1.03 * other.median()

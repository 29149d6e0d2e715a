"""At least as strong as AutoAttack's authors' code, where that is installed (`make test-independent`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import APGD, APGDT, FAB, AutoAttack, Square
from emr_training.attacks.balls import NORMS, distance
from emr_training.config import make_config
from emr_training.data import Data, Splits
from emr_training.training import train

pyautoattack = pytest.importorskip("pyautoattack", reason="not installed; `make test-independent` does so")
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted  # noqa: E402
from pyautoattack.fab_pt import FABAttack_PT  # noqa: E402
from pyautoattack.square import SquareAttack  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")

METHODS: dict[str, dict[str, Any]] = {
    "standard": {"trainer.epochs": 10},
    "at": {"defense": "at", "trainer.epochs": 8},
    "at-emr": {"defense": "at", "trainer.epochs": 8, "penalties.emr.strength": 1.0},
}
EPSILON = {"Linf": 0.1, "L2": 0.5, "L1": 1.5}
SEEDS = range(3)


@pytest.fixture(scope="module", params=list(METHODS))
def model(request: pytest.FixtureRequest, splits: Splits) -> nn.Module:
    """A convolutional network for digits."""
    config = make_config({"model": "cnn", **METHODS[request.param]})
    return train(config, splits.train, None, splits.classes).model.eval()


@pytest.fixture(scope="module")
def digits(splits: Splits) -> Data:
    return Data(splits.test.x[:100], splits.test.y[:100])


def robust(model: nn.Module, x: Tensor, y: Tensor) -> int:
    with torch.no_grad():
        return int((model(x).argmax(1) == y).sum())


def never_weaker(ours: Callable[[int], Tensor], theirs: Callable[[int], Tensor], model: nn.Module, data: Data) -> None:
    """Of 100 images, on the mean over seeds, ours leaves no more than theirs, but for the chance of the starts."""
    state = torch.get_rng_state()
    counts = torch.tensor(
        [[float(robust(model, way(seed), data.y)) for seed in SEEDS] for way in (ours, theirs)], dtype=torch.float64
    )
    torch.set_rng_state(state)  # theirs seeds the global generator
    assert counts[1].mean() < robust(model, data.x, data.y)
    # Two standard errors of the difference of two means.
    error = (counts.var(1).sum() / len(SEEDS)).sqrt()
    assert counts[0].mean() <= counts[1].mean() + (2 * error).clamp_min(1.5)


@pytest.mark.parametrize("loss", ["ce", "dlr"])
@pytest.mark.parametrize("norm", NORMS)
def test_apgd(model: nn.Module, digits: Data, norm: str, loss: str) -> None:
    sparse = norm == "L1"

    def theirs(seed: int) -> Tensor:
        attack = APGDAttack(
            model, n_iter=50, norm=norm, eps=EPSILON[norm], seed=seed, loss=loss, use_largereps=sparse, device="cpu"
        )
        return attack.perturb(digits.x, digits.y)

    def ours(seed: int) -> Tensor:
        attack = APGD(EPSILON[norm], norm=norm, steps=50, loss=loss, shrinking=sparse, seed=seed)
        return attack(model, digits.x, digits.y)

    never_weaker(ours, theirs, model, digits)


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_targeted(model: nn.Module, digits: Data, norm: str) -> None:
    def theirs(seed: int) -> Tensor:
        attack = APGDAttack_targeted(
            model, n_iter=20, norm=norm, eps=EPSILON[norm], seed=seed, n_target_classes=3, device="cpu"
        )
        return attack.perturb(digits.x, digits.y)

    def ours(seed: int) -> Tensor:
        return APGDT(EPSILON[norm], norm=norm, steps=20, n_targets=3, seed=seed)(model, digits.x, digits.y)

    never_weaker(ours, theirs, model, digits)


@pytest.mark.parametrize("norm", NORMS)
def test_square(model: nn.Module, digits: Data, norm: str) -> None:
    def theirs(seed: int) -> Tensor:
        # As AutoAttack sets it: alone it would stretch its schedule to the number of queries.
        options = {"n_queries": 200, "resc_schedule": False, "device": "cpu"}
        attack = SquareAttack(model, norm=norm, eps=2 * EPSILON[norm], seed=seed, **options)
        return attack.perturb(digits.x, digits.y)

    def ours(seed: int) -> Tensor:
        return Square(2 * EPSILON[norm], norm=norm, queries=200, seed=seed)(model, digits.x, digits.y)

    never_weaker(ours, theirs, model, digits)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_same_distances(model: nn.Module, digits: Data, norm: str) -> None:
    theirs = FABAttack_PT(model, norm=norm, n_iter=20, n_restarts=1, eps=1e9, seed=0, device="cpu")
    state = torch.get_rng_state()
    reference = theirs.perturb(digits.x, digits.y)
    torch.set_rng_state(state)
    x_adv = FAB(norm=norm, steps=20)(model, digits.x, digits.y)
    assert robust(model, x_adv, digits.y) <= robust(model, reference, digits.y)
    ours, other = (distance(norm, found, digits.x) for found in (x_adv, reference))
    assert ours.median() <= 1.01 * other.median() and ours.mean() <= 1.01 * other.mean()


def test_autoattack(model: nn.Module, digits: Data) -> None:
    x, y = digits.x[:40], digits.y[:40]
    state = torch.get_rng_state()
    theirs, _ = pyautoattack.AutoAttack(model, eps=0.12, seed=0, device="cpu").run_standard_evaluation(x, y)
    torch.set_rng_state(state)
    _, result = AutoAttack(eps=0.12, verbose=False).run(model, x, y)
    assert 40 * result.robust_accuracy <= robust(model, theirs, y)

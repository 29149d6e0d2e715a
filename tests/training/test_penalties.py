"""Penalties against their formulas in plain PyTorch with double backward, in float64: value and gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_training.attacks import PGD
from emr_training.data import Data
from emr_training.defenses import PGDAT, TRADES, Standard
from emr_training.models import build_model
from emr_training.models.hypersphere import HypersphereHead, with_hypersphere_head
from emr_training.penalties import LLR, WEISSI, FiniteDifference, InputGradient, Jacobian


@pytest.fixture
def curved() -> nn.Module:
    """A net whose input gradient bends: SiLU and BatchNorm, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 10)).double()
    net[2].running_mean.uniform_(-0.5, 0.5)
    net[2].running_var.uniform_(0.5, 1.5)
    return net


@pytest.fixture
def images(batch: Data) -> tuple[Tensor, Tensor]:
    return batch.x[:8].double(), batch.y[:8]


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def slopes(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy in x, with its graph."""
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(losses(model, leaf, y).sum(), leaf, create_graph=True)[0]


def assert_same(model: nn.Module, value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-14)
    parameters = [p for p in model.parameters() if p.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(value, parameters, **options)
    for one, other in zip(found, torch.autograd.grad(expected, parameters, **options), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-13)
    assert any(grad.abs().max() > 1e-8 for grad in found)


@pytest.mark.parametrize("training", [True, False])
def test_input_gradient_is_ross_and_doshi_velez(
    curved: nn.Module, images: tuple[Tensor, Tensor], training: bool
) -> None:
    x, y = images
    curved.train(training)
    penalty = InputGradient(curved, 1.0)
    value = penalty(x, y)
    assert penalty.penalty.engine == "linearized"
    curved.eval()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(curved(leaf), y), leaf, create_graph=True)
    assert_same(curved, value, 0.5 * gradient.square().sum())


def test_input_gradient_without_the_hidden_batch_size(curved: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    curved.eval()
    value = InputGradient(curved, 1.0, {"reduction": "mean"})(x, y)
    assert_same(curved, value, 0.5 * slopes(curved, x, y).square().sum() / len(x))


def jacobian_norms(model: nn.Module, x: Tensor) -> Tensor:
    """|J|_F^2 of each image."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    rows = [torch.autograd.grad(logits[:, c].sum(), leaf, create_graph=True)[0] for c in range(logits.shape[1])]
    return torch.stack(rows).square().sum((0, 2, 3, 4))


def test_exact_jacobian(curved: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    curved.eval()
    value = Jacobian(curved, 1.0, None)(*images)
    assert_same(curved, value, 0.5 * jacobian_norms(curved, images[0]).mean())


def test_projected_jacobian_is_unbiased(curved: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    curved.eval()
    torch.manual_seed(0)
    penalty = Jacobian(curved, 1.0, 2)
    with torch.no_grad():
        draws = torch.stack([penalty(*images) for _ in range(300)])
    expected = 0.5 * jacobian_norms(curved, images[0]).mean().detach()
    error = draws.std() / 300**0.5
    assert error < 0.05 * expected
    assert abs(draws.mean() - expected) < 4 * error


@pytest.mark.parametrize("central", [False, True])
@pytest.mark.parametrize("norm", ["L2", "L1", "Linf"])
def test_finite_difference(curved: nn.Module, images: tuple[Tensor, Tensor], norm: str, central: bool) -> None:
    x, y = images
    value = FiniteDifference(curved, 1.0, norm, 0.05, central)(x, y)
    g = slopes(curved, x, y).detach()
    directions = []
    for row in g:
        if norm == "L2":
            directions.append(row / row.norm())
        elif norm == "L1":
            directions.append(row.sign() / 64**0.5)
        else:
            largest = row.abs() == row.abs().max()
            directions.append(torch.where(largest, row.sign(), 0.0))
    move = 0.05 * torch.stack(directions)
    back = losses(curved, x - move, y) if central else losses(curved, x, y)
    slope = (losses(curved, x + move, y) - back) / (0.1 if central else 0.05)
    assert_same(curved, value, 0.5 * slope.square().mean())


def test_finite_difference_tends_to_the_gradients_norm(curved: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    curved.eval()
    value = FiniteDifference(curved, 1.0, h=1e-5, central=True)(*images)
    expected = 0.5 * slopes(curved, *images).flatten(1).square().sum(1).mean()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)


def test_finite_difference_of_a_flat_loss_is_zero(images: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    nn.init.zeros_(model[1].weight)
    value = FiniteDifference(model, 1.0)(*images)
    assert value.item() == 0
    value.backward()
    assert torch.isfinite(model[1].weight.grad).all()


@pytest.mark.parametrize("training", [True, False])
def test_local_linearity(curved: nn.Module, images: tuple[Tensor, Tensor], training: bool) -> None:
    x, y = images
    curved.train(training)
    penalty, twin = LLR(curved, 1.0, 0.2, steps=3), LLR(curved, 1.0, 0.2, steps=3)
    before = curved[2].running_mean.clone()
    value = penalty(x, y)
    assert curved.training is training and torch.equal(curved[2].running_mean, before)
    curved.eval()
    point = twin._worst(x, y)
    rise = ((point - x) * slopes(curved, x, y)).flatten(1).sum(1)
    gap = (losses(curved, point, y) - losses(curved, x, y) - rise).abs()
    assert_same(curved, value, (gap + 0.75 * rise.abs()).mean())
    assert (point - x).abs().max() <= 0.2 + 1e-12 and point.min() >= 0 and point.max() <= 1


def test_local_linearity_climbs(curved: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    curved.eval()

    def gap(steps: int, step_size: float) -> Tensor:
        point = LLR(curved, 1.0, 0.2, steps=steps, step_size=step_size)._worst(x, y)
        rise = ((point - x) * slopes(curved, x, y)).flatten(1).sum(1)
        return (losses(curved, point, y) - losses(curved, x, y) - rise).abs().mean()

    assert gap(10, 0.05) > 1.2 * gap(1, 0.0)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_weissi_is_invariant_under_balanced_rescaling(images: tuple[Tensor, Tensor], norm: str) -> None:
    model = build_model("cnn", (1, 8, 8), 10).double()
    penalty = WEISSI(model, 1.0, sparsity=0.1, norm=norm)
    before, decay = penalty(*images), sum(p.square().sum() for p in model.parameters())
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        weights[0].mul_(4.0)
        weights[-1].div_(4.0)
    torch.testing.assert_close(penalty(*images), before)
    assert sum(p.square().sum() for p in model.parameters()) > 1.5 * decay
    with torch.no_grad():
        weights[1].mul_(4.0)
    assert penalty(*images) > before + 1


def test_weissi_formula() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False)).double()
    expected = 0.0
    for layer in (model[0], model[2]):
        size = layer.weight.square().sum().sqrt()
        expected = expected + size.log() + 0.3 * (layer.weight / size).abs().sum()
    assert_same(model, WEISSI(model, 1.0, sparsity=0.3)(torch.empty(0), torch.empty(0)), expected)


def test_hypersphere_head(images: tuple[Tensor, Tensor]) -> None:
    x, y = images
    model = with_hypersphere_head(build_model("mlp", (1, 8, 8), 10), scale=1.0).double()
    assert isinstance(model.layers[-1], HypersphereHead)
    features = model.layers[:-1](x)
    weight = model.layers[-1].weight
    cosines = (features @ weight.T) / features.norm(dim=1, keepdim=True) / weight.norm(dim=1)
    torch.testing.assert_close(model(x), cosines)
    torch.testing.assert_close(Standard()(model, x, y).total, F.cross_entropy(cosines, y))
    model.layers[-1].scale = 15.0
    margined = 15.0 * (cosines - 0.2 * F.one_hot(y, 10))
    torch.testing.assert_close(Standard(logit_margin=3.0)(model, x, y).total, F.cross_entropy(margined, y))
    still = PGD(0.0, 1, random_start=False, keep="last")
    for defense in (PGDAT(still, logit_margin=3.0), TRADES(still, logit_margin=3.0)):
        torch.testing.assert_close(defense(model, x, y).total, F.cross_entropy(margined, y))


@pytest.mark.parametrize("make", [
    lambda net: InputGradient(net, 0.1),
    lambda net: Jacobian(net, 0.1),
    lambda net: FiniteDifference(net, 0.1),
    lambda net: LLR(net, 0.1, 0.1),
    lambda net: WEISSI(net, 0.1),
])  # fmt: skip
def test_every_penalty_adds_to_a_defense(net: nn.Module, batch: Data, make: Callable) -> None:
    model = copy.deepcopy(net)
    penalty = make(model)
    x, y = batch.x[:16], batch.y[:16]
    found = PGDAT(PGD(0.1, 2, keep="last"), [penalty])(model, x, y)
    assert set(found.terms) == {"cross_entropy", penalty.name}
    found.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: InputGradient(net, -1.0), "strength is -1.0"),
        (lambda net: Jacobian(net, 1.0, 0), "projections is 0"),
        (lambda net: FiniteDifference(net, 1.0, h=0.0), "h is 0"),
        (lambda net: FiniteDifference(net, 1.0, "l2"), "did you mean 'L2'"),
        (lambda net: LLR(net, 1.0, -0.1), "epsilon is -0.1"),
        (lambda net: LLR(net, 1.0, 0.1, steps=0), "steps is 0"),
        (lambda net: WEISSI(nn.ReLU(), 1.0), "no linear or convolutional layer"),
        (lambda net: with_hypersphere_head(nn.ReLU()), "has no linear layer"),
    ],
)
def test_bad_settings(net: nn.Module, make: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(net)

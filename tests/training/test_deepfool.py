"""DeepFool: exact where the model is linear, and what it does at the borders of its method."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import emr_kernels
from emr_training.attacks import DeepFool
from emr_training.attacks.balls import distance
from emr_training.data import Data
from linear_models import images, linear, one_region

NORMS = [("L2", 2), ("Linf", 1)]


@pytest.mark.parametrize(("norm", "dual"), NORMS)
@pytest.mark.parametrize("kind", [linear, one_region])
@pytest.mark.parametrize("classes", [2, 6])
def test_exact_where_the_model_is_linear(kind: Callable, classes: int, norm: str, dual: int) -> None:
    model = kind(classes)
    x, y = images(model, least=0.02)
    exact = emr_kernels.effective_margins(model, x, y, ord=dual)
    for overshoot in (1e-3, 0.02):
        x_adv = DeepFool(norm=norm, overshoot=overshoot)(model, x, y)
        with torch.no_grad():
            assert (model(x_adv).argmax(1) != y).all()
        # The nudge is at most half a percent of these distances.
        reached = distance(norm, x_adv, x) / (1 + overshoot)
        torch.testing.assert_close(reached.float(), exact, rtol=0.01, atol=0)


class Curved(nn.Module):
    """Two classes; class 0 leads by 1 / (x_1 + x_2 + 0.1) - 1 + x_3 / 4, which every tangent underestimates."""

    def forward(self, x: Tensor) -> Tensor:
        z = 1 / (x[:, 0] + x[:, 1] + 0.1) - 1 + x[:, 2] / 4
        return torch.stack([z, torch.zeros_like(z)], 1)


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_steps_add_up_from_overshot_points(norm: str) -> None:
    # The path, written down anew in float64 for one image; all of it lies in the box.
    x = torch.tensor([[0.15, 0.05, 0.5]], dtype=torch.float64)
    point, total, path = x.clone(), torch.zeros_like(x), 0
    while (gap := 1 / float(point[0, 0] + point[0, 1] + 0.1) - 1 + float(point[0, 2]) / 4) >= 0:
        steep = float(point[0, 0] + point[0, 1] + 0.1) ** -2
        slope = torch.tensor([[steep, steep, -0.25]], dtype=torch.float64)
        if norm == "L2":
            total += (gap / slope.norm() + 1e-4) * slope / slope.norm()
        else:
            total += (gap / slope.abs().sum() + 1e-4) * slope.sign()
        point = x + 1.1 * total
        path += 1
    assert path > 2 and point.min() > 0 and point.max() < 1
    y = torch.zeros(1, dtype=torch.int64)
    torch.testing.assert_close(DeepFool(path, overshoot=0.1, norm=norm)(Curved(), x, y), point)
    assert torch.equal(DeepFool(path - 1, overshoot=0.1, norm=norm)(Curved(), x, y), x)


def test_only_the_likeliest_classes_are_looked_at() -> None:
    # Class 2 is nearest (a steep logit) and class 1 likeliest.
    model = nn.Linear(3, 3, bias=False)
    model.weight.data = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 50]])
    x, y = torch.tensor([[0.6, 0.5, 0.0]]), torch.tensor([0])
    with torch.no_grad():
        assert model(DeepFool()(model, x, y)).argmax() == 2
        assert model(DeepFool(num_classes=2)(model, x, y)).argmax() == 1


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_breaks_trained_networks_within_the_box(net: nn.Module, robust_net: nn.Module, batch: Data, norm: str) -> None:
    # More than half of the pixels are at 0 or 1, where a step is cut off.
    for model in (net, robust_net):
        x_adv = DeepFool(norm=norm)(model, batch.x, batch.y)
        with torch.no_grad():
            clean = model(batch.x).argmax(1) == batch.y
            assert (model(x_adv).argmax(1) != batch.y).all()
        assert torch.equal(x_adv[~clean], batch.x[~clean])
        assert x_adv.min() == 0 and x_adv.max() <= 1
        nearby = emr_kernels.effective_margins(model, batch.x, batch.y, ord=1 if norm == "Linf" else 2)
        assert distance(norm, x_adv, batch.x)[clean].median() < 2 * nearby[clean].median()


def test_one_image_does_not_depend_on_the_others(robust_net: nn.Module, batch: Data) -> None:
    together = DeepFool()(robust_net, batch.x, batch.y)
    alone = torch.cat([DeepFool()(robust_net, batch.x[i : i + 1], batch.y[i : i + 1]) for i in range(8)])
    # Matrix products of another size round otherwise.
    torch.testing.assert_close(alone, together[:8], rtol=0, atol=1e-4)


def test_a_flat_model_is_left_alone() -> None:
    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([1 + 0 * x.sum(1), 0 * x.sum(1)], 1)

    x, y = torch.rand(4, 3), torch.tensor([0, 0, 1, 0])
    assert torch.equal(DeepFool(5)(Flat(), x, y), x)


def test_images_that_are_done_cost_nothing_more(robust_net: nn.Module, batch: Data) -> None:
    sizes = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return robust_net(x)

    DeepFool()(watched, batch.x, batch.y)
    assert sizes[0] == len(batch.x) and sizes == sorted(sizes, reverse=True)
    assert sum(sizes) < len(batch.x) * len(sizes) / 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps is 0; expected an integer >= 1"),
        ({"num_classes": 1}, ValueError, "num_classes is 1; expected an integer >= 2"),
        ({"overshoot": -0.1}, ValueError, "overshoot is -0.1; expected a finite number >= 0"),
        ({"norm": "L1"}, ValueError, "norm is 'L1'; did you mean 'L2'"),
    ],
)
def test_bad_settings(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepFool(**options)


def test_has_no_targeted_form(net: nn.Module, batch: Data) -> None:
    with pytest.raises(ValueError, match="target is given; expected None, as DeepFool has no targeted form"):
        DeepFool()(net, batch.x, batch.y, target=(batch.y + 1) % 10)

"""Slopes of cross-entropy along directions, against double backward in float64: value, parameters' and x's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_kernels.slope import loss_slopes


class Branching(nn.Module):
    """Not to be exported: its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x.flatten(1))
        return self.second(h.relu() if h.sum() > 0 else F.leaky_relu(h, 0.1))


def models() -> dict[str, nn.Module]:
    torch.manual_seed(1)
    made: dict[str, nn.Module] = {
        "relu": nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 5)),
        "smooth": nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Linear(16, 5)),
        "conv": nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(6, 5),
        ),
        "branching": Branching(),
    }
    for model in made.values():
        model.double()
        for part in model.modules():
            if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
                part.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr,operator]
                part.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr,operator]
    return made


def double_backward(model: nn.Module, x: Tensor, y: Tensor, directions: Tensor) -> Tensor:
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    return (gradient * directions).flatten(1).sum(1)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["relu", "smooth", "conv", "branching"])
def test_value_and_gradients(name: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()[name].train(training)
    x = torch.rand(7, 3, 2, 2, dtype=torch.float64).requires_grad_()
    y, directions = torch.randint(5, (7,)), torch.randn(7, 3, 2, 2, dtype=torch.float64)
    weights = torch.randn(7, dtype=torch.float64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    grad = torch.autograd.grad
    if name != "branching":
        loss_slopes(model, x, y, directions)  # the export is checked against autograd, once

        def once(*args: object, create_graph: bool = False, **kwargs: object) -> object:
            assert not create_graph
            return grad(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(torch.autograd, "grad", once)
    found = loss_slopes(model, x, y, directions)
    found_grads = grad((found * weights).sum(), [x, *model.parameters()], allow_unused=True, materialize_grads=True)
    monkeypatch.undo()
    assert all(part.training is training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    model.eval()
    expected = double_backward(model, x, y, directions)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    options = {"allow_unused": True, "materialize_grads": True}
    expected_grads = grad((expected * weights).sum(), [x, *model.parameters()], **options)
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-13)
    assert found_grads[0].abs().max() > 1e-3 and found_grads[1].abs().max() > 1e-3


def test_twice_and_without_gradients() -> None:
    model = models()["smooth"]
    x, y = torch.rand(4, 3, 2, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    slopes = loss_slopes(model, x, y, torch.ones_like(x))
    first, second = (torch.autograd.grad(slopes.sum(), list(model.parameters()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    with torch.no_grad():
        again = loss_slopes(model, x, y, torch.ones_like(x))
    assert torch.equal(again, slopes) and not again.requires_grad
    (gradient,) = torch.autograd.grad(slopes.sum(), model[1].weight, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of the slope of the loss was differentiated again"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": 3}, "model is int; expected torch.nn.Module"),
        ({"x": torch.zeros(2, 3, 2, 2, dtype=torch.int64)}, "x has dtype|x is"),
        ({"y": torch.tensor([0, 9])}, "y"),
        ({"directions": torch.zeros(2, 12, dtype=torch.float64)}, r"directions is \[2, 12\], torch.float64; expected"),
        ({"directions": None}, "directions is None; expected a tensor like x"),
    ],
)
def test_bad_input(changed: dict[str, object], message: str) -> None:
    x = torch.zeros(2, 3, 2, 2, dtype=torch.float64)
    given = {"model": models()["relu"], "x": x, "y": torch.tensor([0, 1]), "directions": x, **changed}
    with pytest.raises((TypeError, ValueError), match=message):
        loss_slopes(**given)  # type: ignore[arg-type]

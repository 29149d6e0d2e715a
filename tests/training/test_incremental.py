"""Networks evaluated anew only where their input changed: against the networks themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from emr_training.attacks import Square
from emr_training.attacks.classifier import Classifier
from emr_training.attacks.incremental import Incremental
from emr_training.models.cnn import SmallCNN


class Residual(nn.Module):
    """A convolution, then a block with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        return self.last((h + self.second(h)).mean((2, 3)))


def mixture() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(),
        nn.MaxPool2d(3, 2, 1),
        nn.Conv2d(8, 8, (3, 2), dilation=(2, 1), groups=2),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    generator = torch.Generator().manual_seed(0)
    net[1].running_mean.copy_(torch.randn(8, generator=generator))
    net[1].running_var.copy_(torch.rand(8, generator=generator) + 0.5)
    return net


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "small cnn": (lambda: SmallCNN((1, 14, 14), 10), (1, 14, 14), 3),
    "strides, pools, groups": (mixture, (3, 27, 31), 3),
    "a shortcut": (Residual, (3, 9, 8), 1),
}


def held(name: str, batch: int = 6) -> tuple[nn.Module, Tensor, Incremental, int]:
    make, shape, layers = MODELS[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.rand(batch, *shape, dtype=torch.float64)
    inside = Classifier(model).incremental(x)
    assert inside is not None
    return model, x, inside, layers


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_follows_the_network(name: str) -> None:
    model, x, inside, layers = held(name)
    assert len(inside._layers) == layers
    inside.begin(x)
    generator = torch.Generator().manual_seed(1)
    height, width = x.shape[2:]
    for trial in range(60):
        h, w = (int(torch.randint(1, 8, (1,), generator=generator)) for _ in range(2))
        rows = torch.randperm(6, generator=generator)[:4] if trial % 2 else torch.arange(6)
        top = torch.randint(0, height - h + 1, rows.shape, generator=generator)
        left = torch.randint(0, width - w + 1, rows.shape, generator=generator)
        window = torch.rand(len(rows), x.shape[1], h, w, generator=generator, dtype=torch.float64)
        candidate = x.clone()
        for row, i, j, pixels in zip(rows, top, left, window, strict=True):
            candidate[row, :, i : i + h, j : j + w] = pixels
        # Each value is computed anew, so that rounding does not build up.
        torch.testing.assert_close(
            inside.change(rows, top, left, window), model(candidate)[rows], rtol=1e-12, atol=1e-12
        )
        accepted = torch.rand(len(rows), generator=generator) < (1.0 if trial == 5 else 0.4)
        inside.settle(accepted)
        x[rows[accepted]] = candidate[rows[accepted]]
        if trial == 40:
            stays = torch.tensor([0, 2, 3, 4, 5, 1])
            inside.keep(stays)
            x = x[stays]


def test_what_it_spares() -> None:
    model = SmallCNN((1, 28, 28), 10)
    inside = Classifier(model.eval()).incremental(torch.rand(4, 1, 28, 28))
    assert inside is not None
    # Multiplications: 28^2 * 16 * 9, 14^2 * 32 * 144, 14^2 * 32 * 288, 6272 * 10.
    assert inside._total == 112_896 + 903_168 + 1_806_336 + 62_720
    # Of one pixel 3 x 3 values of the first layer know, then 2 x 2 of 14 x 14, then 4 x 4: 94% are spared.
    assert inside.pays(1, 1) and inside.pays(9, 9) and not inside.pays(25, 25)
    assert not held("a shortcut")[2].pays(1, 1)  # most of the work is behind the shortcut


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), nn.Sequential(nn.Conv2d(3, 3, 3, padding="same"), nn.Flatten())],
)
def test_none_for_other_networks(model: nn.Module) -> None:
    assert Classifier(model.eval()).incremental(torch.rand(4, 3, 4, 4)) is None


def test_none_where_the_search_is_not_in_the_models_own_numbers() -> None:
    model, x = SmallCNN((1, 8, 8), 10).eval(), torch.rand(4, 1, 8, 8)
    for classifier in (
        Classifier(model, "autograd"),
        Classifier(model, precision="bfloat16"),
        Classifier(lambda x: model(x)),
    ):
        assert classifier.incremental(x) is None
    assert Classifier(model).incremental(x[:1]) is None


def test_square_finds_the_same() -> None:
    torch.manual_seed(0)
    model, x = SmallCNN((1, 16, 16), 10), torch.rand(24, 1, 16, 16)
    with torch.no_grad():
        logits = model(x)
    # The likeliest class of each image by far: harder to leave than the others.
    y = logits.argmax(1)
    attack = Square(0.15, queries=400)
    x_adv, queries = attack.with_queries(model, x, y)
    plain, expected = Square(0.15, queries=400, engine="autograd").with_queries(model, x, y)
    same = (x_adv == plain).flatten(1).all(1)
    # Where two losses are equal but for rounding the walks may part.
    assert int(same.sum()) >= 22 and int((queries == expected).sum()) >= 22
    assert 0 < int((queries > 300).sum()) < 24
    with torch.no_grad():
        assert (model(x_adv).argmax(1) != y).sum() >= (model(plain).argmax(1) != y).sum() - 1

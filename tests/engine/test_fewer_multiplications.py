"""Convolutions of 3 by 3 pixels that take few multiplications: where they are used, the passes are what they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_kernels import EffectiveWeightPenalty, ops
from emr_kernels.linearize import LinearizedPoint
from emr_kernels.linearize.cache import find_program
from emr_kernels.linearize.rules import winograd
from emr_kernels.ops._dispatch import operators

pytestmark = pytest.mark.skipif(
    not operators["winograd_convolution"].compiled(), reason="the compiled operators are not here"
)

Uses = dict[str, int]


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> Uses:
    """How often an operator was used since."""
    counts = {"winograd_convolution": 0, "winograd_weight_grad": 0}

    def counting(name: str) -> Callable[..., Any]:
        operator = getattr(ops, name)

        def counted(*args: Any) -> Any:
            counts[name] += 1
            return operator(*args)

        return counted

    for name in counts:
        monkeypatch.setattr(ops, name, counting(name))
    return counts


def convolution(channels: int, outputs: int, padding: int = 1, bias: bool = True) -> nn.Module:
    return nn.Conv2d(channels, outputs, 3, padding=padding, bias=bias)


def plain(channels: int = 3) -> nn.Module:
    """Two convolutions that go this way, after one that does not."""
    return nn.Sequential(
        convolution(channels, 16),
        nn.ReLU(),
        convolution(16, 32),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        convolution(32, 16, padding=0, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 10, 5),
    )


class Residual(nn.Module):
    """Pre-activation blocks, with BatchNorm as it is before training."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.first = convolution(3, 16, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(16) if norm else nn.Identity() for _ in range(4))
        self.layers = nn.ModuleList(convolution(16, 16, bias=False) for _ in range(4))
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + layer(F.relu(norm(h)))
        logits: Tensor = self.last(h.mean((2, 3)))
        return logits


class SharedBias(nn.Module):
    """A bias that is one number, expanded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = convolution(3, 16), nn.Linear(32, 5)
        self.weight, self.bias = nn.Parameter(torch.randn(32, 16, 3, 3) / 12), nn.Parameter(torch.rand(1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(self.first(x).relu(), self.weight, self.bias.expand(32), padding=1)
        logits: Tensor = self.last(h.relu().mean((2, 3)))
        return logits


def pooled(kind: str) -> Callable[[], nn.Module]:
    """Max pooling after convolutions, as a layer or as another operator that compares."""

    class Amax(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.unflatten(3, (-1, 2)).amax(4)

    pool = {"layer": nn.MaxPool2d(2), "operator": Amax()}[kind]
    return lambda: nn.Sequential(
        *(convolution(3, 16), nn.ReLU(), convolution(16, 32), nn.ReLU(), convolution(32, 32)),
        *(copy.deepcopy(pool), nn.ReLU(), convolution(32, 16), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )


def leaky() -> nn.Module:
    layers = (convolution(3, 16, bias=False), nn.LeakyReLU(0.1), convolution(16, 16, bias=False), nn.LeakyReLU(0.1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))


def trained(model: nn.Module) -> nn.Module:
    """BatchNorm as after training, evaluation mode, channels_last."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and not isinstance(model, Residual):
            assert module.running_mean is not None
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.weight)
    return model.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def images(samples: int, channels: int = 3, background: float | None = None) -> Tensor:
    """Random; with a background, in a part of each image."""
    x = torch.rand(samples, channels, 10, 12)
    if background is not None:
        inside = x.new_zeros(10, 12, dtype=torch.bool)
        inside[2:5, 3:9] = True
        x = torch.where(inside, x, background)
    return x.contiguous(memory_format=torch.channels_last)


def expected_penalty(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The penalty and its gradients in float64."""
    exact = copy.deepcopy(model).double()
    leaf = x.double().requires_grad_()
    logits = exact(leaf)
    mix = (logits.softmax(1).detach() * logits).sum() / len(x)
    (weight,) = torch.autograd.grad(mix, leaf, create_graph=True)
    value = weight.square().sum()
    found = torch.autograd.grad(value, list(exact.parameters()), allow_unused=True)
    names = (name for name, _ in exact.named_parameters())
    return value.detach(), {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


def check_penalty(model: nn.Module, x: Tensor) -> None:
    expected, grads = expected_penalty(model, x)
    model.zero_grad()
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    value = penalty(x)
    value.backward()
    assert penalty.engine == "linearized", penalty.engine_reason
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=0)
    parameters = dict(model.named_parameters())
    for name, grad in grads.items():
        found = parameters[name].grad
        off = grad if found is None else found - grad
        assert off.norm() <= 1e-5 * grad.norm(), name


@pytest.mark.parametrize("channels", [3, 1])
def test_penalty_and_its_gradient(channels: int, uses: Uses) -> None:
    check_penalty(trained(plain(channels)), images(12, channels))
    # Forward, vjp and jvp of both; the program's first call is checked with two images, which are too few.
    assert uses == {"winograd_convolution": 6, "winograd_weight_grad": 2}


@pytest.mark.parametrize("background", [0.0, 1.0])
@pytest.mark.parametrize(
    "build", [Residual, lambda: Residual(False), pooled("layer"), pooled("operator"), leaky, plain]
)
def test_constant_regions(build: Callable[[], nn.Module], background: float, uses: Uses) -> None:
    """Pixels with equal neighbourhoods are ties of max pooling, and zeros of ReLU; rounding must not decide them."""
    check_penalty(trained(build()), images(16, background=background))
    assert uses["winograd_convolution"] > 0


def test_a_bias_of_any_strides(uses: Uses) -> None:
    check_penalty(trained(SharedBias()), images(16))
    assert uses["winograd_convolution"] > 0


def passes(model: nn.Module, x: Tensor) -> None:
    """Forward and vjp of a frozen program, against float64."""
    program = find_program(model, x).frozen()
    point = LinearizedPoint.at(program, model, x)
    seed = torch.randn_like(point.logits)
    exact = copy.deepcopy(model).double()
    leaf = x.double().requires_grad_()
    logits = exact(leaf)
    (expected,) = torch.autograd.grad(logits, leaf, seed.double())
    torch.testing.assert_close(point.logits.double(), logits.detach(), rtol=1e-5, atol=1e-5)
    gradient = point.vjp(seed)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)
    # An attack goes by the sign.
    assert torch.equal(gradient == 0, expected == 0)


@pytest.mark.parametrize("channels", [3, 1])
def test_passes_of_an_attack(channels: int, uses: Uses) -> None:
    passes(trained(plain(channels)), images(4, channels))
    assert uses["winograd_convolution"] == 4


def test_where_no_gradient_arrives_there_is_none(uses: Uses) -> None:
    # The last four lines are in no window, and the first of those without a gradient lies inside of a tile.
    layers = (convolution(3, 16), nn.ReLU(), convolution(16, 16), nn.AvgPool2d(6), nn.Flatten(), nn.Linear(16 * 2, 5))
    passes(trained(nn.Sequential(*layers)), images(4))
    assert uses["winograd_convolution"] == 2


@pytest.mark.parametrize("kind", ["layer", "operator"])
def test_an_attack_on_pooled_constant_regions(kind: str, uses: Uses) -> None:
    passes(trained(pooled(kind)()), images(4, background=1.0))
    # One forward: behind the pooling. And before it the vjps of cotangents in channels_last.
    assert uses["winograd_convolution"] == {"layer": 3, "operator": 1}[kind]


def served(
    shape: tuple[int, ...] = (4, 16, 16, 16), weight: tuple[int, ...] = (32, 16, 3, 3), once: bool = True, **change: Any
) -> bool:
    options: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}
    options |= {"transposed": False, "rest": [0, 0], "groups": 1}
    dtype = change.pop("dtype", torch.float32)
    tensor = torch.zeros(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return winograd.serves(tensor, torch.zeros(weight, dtype=dtype), tuple({**options, **change}.values()), once)


def test_what_is_served() -> None:
    assert served()
    assert served(padding=[2, 0])
    # Few tiles pay where the weight is there already, more where it is small.
    assert not served((2, 16, 8, 8))
    assert served((2, 16, 8, 8), once=False)
    assert not served((1, 16, 8, 8), once=False)
    assert not served((16, 512, 8, 8), (512, 512, 3, 3))
    assert served((64, 512, 8, 8), (512, 512, 3, 3))
    for change in (
        {"stride": [2, 1]},
        {"dilation": [1, 2]},
        {"padding": [3, 1]},
        {"transposed": True},
        {"groups": 2},
        {"dtype": torch.float64},
        {"dtype": torch.bfloat16},
        {"weight": (32, 16, 3, 1)},
        {"weight": (24, 16, 3, 3)},
        {"weight": (32, 8, 3, 3)},
    ):
        assert not served(**change), change
    weight = torch.zeros(32, 16, 3, 3)
    rows = torch.zeros(4, 16, 16, 16)
    options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    assert not winograd.serves(rows, weight, options, once=True)

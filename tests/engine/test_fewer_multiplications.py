"""Convolutions of 3 by 3 pixels that take few multiplications: where they are used, the passes are what they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from emr_kernels import EffectiveWeightPenalty, ops
from emr_kernels.linearize import LinearizedPoint
from emr_kernels.linearize.cache import find_program
from emr_kernels.linearize.rules import winograd

pytestmark = pytest.mark.skipif(not winograd.compiled(), reason="the compiled operators are not here")


@pytest.fixture
def uses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that go in, one for each use."""
    shapes: list[tuple[int, ...]] = []
    convolution = winograd.convolution

    def counting(tensor: Tensor, *args: Any) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return convolution(tensor, *args)

    monkeypatch.setattr(winograd, "convolution", counting)
    return shapes


def network() -> nn.Module:
    """Two convolutions that go this way, after one that does not."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 16, 3, padding=0, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 8 * 9, 5),
    )


def problem(samples: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = network().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model[3].running_mean.normal_()
    model[3].weight.data.normal_()
    return model, torch.rand(samples, 3, 10, 11).contiguous(memory_format=torch.channels_last)


def test_penalty_and_its_gradient(uses: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    gradients: list[Tensor] = []
    weight_grad = ops.winograd_weight_grad

    def counting(*args: Any) -> Tensor:
        gradients.append(weight_grad(*args))
        return gradients[-1]

    monkeypatch.setattr(ops, "winograd_weight_grad", counting)
    model, x = problem(12)
    penalty = EffectiveWeightPenalty(model, temperature=1.0)
    value = penalty(x)
    value.backward()
    assert penalty.engine == "linearized"
    # Forward, vjp and jvp of both.
    assert len(uses) == 6 and len(gradients) == 2
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    exact = network().double().eval()
    exact.load_state_dict(model.state_dict())
    leaf = x.double().requires_grad_()
    logits = exact(leaf)
    mix = (logits.softmax(1).detach() * logits).sum() / len(x)
    (weight,) = torch.autograd.grad(mix, leaf, create_graph=True)
    expected = weight.square().sum()
    names = [name for name, p in model.named_parameters() if p.grad is not None]
    wanted = torch.autograd.grad(expected, [dict(exact.named_parameters())[name] for name in names], allow_unused=True)
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=0)
    for name, mine, other in zip(names, found, wanted, strict=True):
        other = torch.zeros_like(mine, dtype=torch.float64) if other is None else other
        assert (mine - other).norm() <= 1e-4 * other.norm() + 1e-9, name


def test_passes_of_an_attack(uses: list[tuple[int, ...]]) -> None:
    model, x = problem(4)
    program = find_program(model, x).frozen()
    uses.clear()
    point = LinearizedPoint.at(program, model, x)
    seed = torch.randn_like(point.logits)
    gradient = point.vjp(seed)
    assert len(uses) == 4
    exact = network().double().eval()
    exact.load_state_dict(model.state_dict())
    leaf = x.double().requires_grad_()
    logits = exact(leaf)
    (expected,) = torch.autograd.grad(logits, leaf, seed.double())
    torch.testing.assert_close(point.logits.double(), logits.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-6)


def served(
    shape: tuple[int, ...] = (4, 16, 16, 16), weight: tuple[int, ...] = (32, 16, 3, 3), once: bool = True, **change: Any
) -> bool:
    options = {
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "transposed": False,
        "rest": [0, 0],
        "groups": 1,
    }
    tensor = torch.zeros(shape).contiguous(memory_format=torch.channels_last)
    dtype = change.pop("dtype", torch.float32)
    return winograd.serves(tensor.to(dtype), torch.zeros(weight).to(dtype), tuple({**options, **change}.values()), once)


def test_what_is_served() -> None:
    assert served()
    assert served(padding=[2, 0])
    # Few tiles pay where the weight is there already.
    assert not served((2, 16, 8, 8))
    assert served((2, 16, 8, 8), once=False)
    assert not served((1, 16, 8, 8), once=False)
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

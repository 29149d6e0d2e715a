"""Every direction, reduction, layer selection and centring on a selection of models, against the oracle."""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoo
from emr_kernels import EffectiveWeightPenalty
from oracle import TOLERANCES, assert_gradients_match, double_backward, relative_error

MODELS = ["mlp_batchnorm", "wrn_10_2", "densenet", "vit", "act_silu"]
DIRECTIONS = ["softmax", "label", "margin", "all", "cross_entropy"]
REDUCTIONS = ["paper", "mean", "sum", "none"]


@cache
def subject(entry_id: str) -> tuple[nn.Module, Tensor, Tensor]:
    """One model an id, so that its program is prepared once for all options."""
    entry = zoo.get(entry_id)
    return entry.make(), *entry.data()


def layer_selections(entry_id: str) -> list[tuple[str, ...]]:
    names = zoo.get(entry_id).layers
    return [("input",), (names[0],), ("input", names[-1]), names]


def check(entry_id: str, reduction: str, **options: Any) -> None:
    model, x, y = subject(entry_id)
    weights = torch.linspace(0.5, 2, len(x), dtype=x.dtype) if reduction == "none" else None
    reference = double_backward(model, x, y, temperature=1.3, reduction=reduction, weights=weights, **options)
    penalty = EffectiveWeightPenalty(model, temperature=1.3, reduction=reduction, **options)
    model.zero_grad()
    x = x.clone().requires_grad_()
    value = penalty(x, y)
    value.backward(weights)
    assert penalty.engine == "linearized", penalty.engine_reason
    torch.testing.assert_close(value.detach(), reference.value, rtol=TOLERANCES[torch.float64], atol=0)
    assert_gradients_match(model, reference.grads)
    assert relative_error(x.grad, reference.grad_x) <= TOLERANCES[torch.float64]


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    ("entry_id", "layers"),
    [(e, layers) for e in MODELS for layers in layer_selections(e)],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_direction_layers_center(entry_id: str, layers: tuple[str, ...], direction: str, center: bool) -> None:
    check(entry_id, "mean", direction=direction, layers=layers, center=center)


@pytest.mark.parametrize(("direction", "reduction"), product(DIRECTIONS, REDUCTIONS))
@pytest.mark.parametrize("entry_id", MODELS)
def test_direction_reduction(entry_id: str, direction: str, reduction: str) -> None:
    check(entry_id, reduction, direction=direction, layers=layer_selections(entry_id)[2])


@pytest.mark.parametrize(
    ("entry_id", "layers"),
    [
        ("wrn_10_2", ("blocks.1", "blocks.1.bn1")),
        ("densenet", ("transition", "transition.0", "input")),
        ("mlp", ("input", "0")),
        ("vit", ("mlp.0", "mlp.0.0", "norms.1")),
    ],
)
def test_layers_that_read_one_tensor(entry_id: str, layers: tuple[str, ...]) -> None:
    """A module and its first child have the same input; each name counts by itself."""
    check(entry_id, "mean", layers=layers)


def test_layer_at_an_in_place_activation() -> None:
    """The input of an in-place module is what went in, as with the activation out of place."""
    entry = zoo.get("act_relu_inplace")
    model, (x, _) = entry.make(), entry.data()
    twin = entry.make()
    twin[2], twin[4] = nn.ReLU(), nn.ReLU()  # type: ignore[index, operator]
    reference = double_backward(twin, x, layers=("2", "input"))
    penalty = EffectiveWeightPenalty(model, layers=("2", "input"))
    value = penalty(x)
    value.backward()
    torch.testing.assert_close(value.detach(), reference.value, rtol=1e-11, atol=0)
    assert_gradients_match(model, reference.grads)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("entry_id", ["custom_function_activation", "through_numpy"])
def test_options_of_the_fallback(entry_id: str, direction: str) -> None:
    """Double backward inside the library obeys the same options."""
    model, x, y = subject(entry_id)
    layers, weights = ("input", "b"), torch.tensor([1.0, -2.0, 0.5]).double()
    for reduction, center in (("none", True), ("paper", False)):
        w = weights if reduction == "none" else None
        options: dict[str, Any] = {"direction": direction, "layers": layers, "center": center}
        reference = double_backward(model, x, y, reduction=reduction, weights=w, **options)
        penalty = EffectiveWeightPenalty(model, reduction=reduction, **options)
        model.zero_grad()
        value = penalty(x, y)
        value.backward(w)
        assert penalty.engine == "autograd"
        torch.testing.assert_close(value.detach(), reference.value, rtol=1e-11, atol=0)
        assert_gradients_match(model, reference.grads)


@pytest.mark.parametrize("temperature", [0.1, 1.0, 40.0, 1e4])
def test_temperatures(temperature: float) -> None:
    model, x, y = subject("act_silu")
    reference = double_backward(model, x, y, temperature=temperature)
    model.zero_grad()
    EffectiveWeightPenalty(model, temperature=temperature)(x).backward()
    assert_gradients_match(model, reference.grads)


def random_penalty(model: nn.Module, x: Tensor, seed: int, **options: Any) -> Tensor:
    penalty = EffectiveWeightPenalty(model, direction="random", **options)
    penalty.prepare(x)
    torch.manual_seed(seed)
    value: Tensor = penalty(x)
    return value


def test_random_direction_is_reproducible_and_varies() -> None:
    model, x, _ = subject("act_silu")
    values = [random_penalty(model, x, seed, reduction="sum").item() for seed in (3, 3, 4)]
    assert values[0] == values[1] != values[2]


def test_random_directions_have_length_root_c() -> None:
    """With orthonormal class weights ||W^T v|| = ||v||, so every sample's penalty is C whatever was drawn."""
    model = nn.Linear(9, 4, bias=False).double()
    nn.init.orthogonal_(model.weight)
    r = random_penalty(model, torch.rand(50, 9, dtype=torch.float64), 0, reduction="none")
    torch.testing.assert_close(r.detach(), torch.full_like(r, 4.0))


def test_random_directions_differ_between_samples() -> None:
    model = nn.Linear(9, 4, bias=False).double()
    r = random_penalty(model, torch.rand(20, 9, dtype=torch.float64), 0, reduction="none").detach()
    assert r.unique().numel() == 20


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
def test_random_direction_estimates_all_classes(center: bool) -> None:
    """Per sample, many draws average to the exact sum over the classes within five standard errors."""
    model, x, _ = subject("mlp_batchnorm")
    exact = double_backward(model, x, direction="all", reduction="none", center=center).per_sample
    penalty = EffectiveWeightPenalty(model, direction="random", reduction="none", center=center)
    with torch.no_grad():
        draws = torch.stack([penalty(x) for _ in range(400)])
    assert ((draws.mean(0) - exact).abs() < 5 * draws.std(0) / 20).all()
    assert (draws.std(0) > 1e-3 * exact).all()


@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu"])
def test_random_direction_gradient_by_central_differences(entry_id: str) -> None:
    model, x, _ = subject(entry_id)
    model.zero_grad()
    random_penalty(model, x, 5).backward()
    for parameter in model.parameters():
        if parameter.dim() < 2:
            continue
        step = 1e-6 * torch.randn_like(parameter)
        ends = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter.add_(sign * step)
            ends.append(random_penalty(model, x, 5).detach())
        with torch.no_grad():
            parameter.add_(step)
        assert parameter.grad is not None
        torch.testing.assert_close((ends[0] - ends[1]) / 2, (parameter.grad * step).sum(), rtol=1e-5, atol=1e-14)


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(classes: int) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.SiLU(), nn.Linear(5, classes)).double()
    x, y = torch.rand(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.long)
    for direction in ("softmax", "label", "all") if classes == 1 else DIRECTIONS:
        reference = double_backward(model, x, y, direction=direction)
        model.zero_grad()
        EffectiveWeightPenalty(model, direction=direction)(x, y).backward()
        assert_gradients_match(model, reference.grads)

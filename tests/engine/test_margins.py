"""Effective weights, their norms and effective margins against autograd loops and closed forms."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from emr_kernels import effective_margins, effective_weight_norms, effective_weights
from oracle import double_backward, evaluation_mode

MODELS = ["mlp_batchnorm", "wrn_10_2", "act_silu", "vit_fused_attention", "tied_parameters", "lenet_tanh"]
ORDERS = [1, 2, math.inf]


def loop_weights(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [N, C] and effective weights [N, C, *x.shape[1:]], one gradient at a time."""
    rows = []
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
        for sample in x:
            leaf = sample[None].clone().requires_grad_()
            z = model(leaf)[0]
            rows.append(torch.stack([torch.autograd.grad(z_c, leaf, retain_graph=True)[0][0] for z_c in z]))
        return model(x).detach(), torch.stack(rows)


def loop_margins(model: nn.Module, x: Tensor, y: Tensor, order: float, top_k: int | None = None) -> Tensor:
    z, w = loop_weights(model, x)
    result = []
    for i in range(len(x)):
        label = int(y[i])
        rivals = sorted((j for j in range(z.shape[1]) if j != label), key=lambda j: -float(z[i, j]))[:top_k]
        ratios = [(z[i, label] - z[i, j]) / torch.linalg.vector_norm(w[i, label] - w[i, j], order) for j in rivals]
        result.append(torch.stack(ratios).min())
    return torch.stack(result)


def made(entry_id: str) -> tuple[nn.Module, Tensor, Tensor]:
    entry = zoo.get(entry_id)
    return entry.make(), *entry.data(5)


@pytest.mark.parametrize("entry_id", MODELS)
def test_effective_weights(entry_id: str) -> None:
    model, x, _ = made(entry_id)
    _, expected = loop_weights(model, x)
    found = effective_weights(model, x)
    assert found.shape == (5, 4, *x.shape[1:]) and not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(effective_weights(model, x, [2, 0]), expected[:, [2, 0]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("entry_id", MODELS)
def test_norms_of_classes(entry_id: str, order: float) -> None:
    model, x, _ = made(entry_id)
    expected = torch.linalg.vector_norm(loop_weights(model, x)[1].flatten(2), order, dim=2)
    found = effective_weight_norms(model, x, classes=[3, 1], ord=order)
    torch.testing.assert_close(found, expected[:, [3, 1]], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("direction", ["softmax", "label", "margin", "all"])
@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu"])
def test_norms_of_directions(entry_id: str, direction: str, center: bool) -> None:
    model, x, y = made(entry_id)
    r = double_backward(model, x, y, direction=direction, temperature=0.7, center=center, reduction="none").per_sample
    found = effective_weight_norms(model, x, y, direction=direction, temperature=0.7, center=center)
    torch.testing.assert_close(found, r.sqrt(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_norms_of_the_label_in_other_orders(order: float) -> None:
    model, x, y = made("act_silu")
    w = loop_weights(model, x)[1]
    expected = torch.stack([torch.linalg.vector_norm(w[i, y[i]], order) for i in range(5)])
    torch.testing.assert_close(effective_weight_norms(model, x, y, direction="label", ord=order), expected)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("entry_id", MODELS)
def test_effective_margins(entry_id: str, order: float) -> None:
    model, x, y = made(entry_id)
    found = effective_margins(model, x, y, ord=order)
    assert found.shape == (5,) and not found.requires_grad
    torch.testing.assert_close(found, loop_margins(model, x, y, order), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("top_k", [1, 2, 3, 10])
def test_margins_over_the_strongest_rivals(top_k: int) -> None:
    model, x, y = made("act_silu")
    expected = loop_margins(model, x, y, 2, top_k)
    torch.testing.assert_close(effective_margins(model, x, y, top_k=top_k), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 100])
def test_chunks_give_the_same_margins(batch_size: int) -> None:
    model, x, y = made("act_silu")
    expected = effective_margins(model, x, y)
    torch.testing.assert_close(effective_margins(model, x, y, batch_size=batch_size), expected, rtol=1e-12, atol=0)


def test_margin_signs_follow_the_prediction() -> None:
    model, x, _ = made("act_silu")
    with evaluation_mode(model):
        order = model(x).argsort(dim=1, descending=True)
    assert (effective_margins(model, x, order[:, 0]) > 0).all()
    assert (effective_margins(model, x, order[:, 1]) < 0).all()


@pytest.mark.parametrize("order", ORDERS)
def test_linear_models_in_closed_form(order: float) -> None:
    """The margin is the exact distance to the boundary: moving x by it in the dual norm reaches a tie."""
    model = nn.Linear(7, 3).double()
    x = torch.rand(6, 7, dtype=torch.float64)
    z, weight = model(x).detach(), model.weight.detach()
    y = z.argmax(1)
    torch.testing.assert_close(effective_weights(model, x), weight.expand(6, 3, 7))
    margins = effective_margins(model, x, y, ord=order)
    for i in range(6):
        rivals = [j for j in range(3) if j != y[i]]
        normals = [weight[y[i]] - weight[j] for j in rivals]
        distances = [
            (z[i, y[i]] - z[i, j]) / torch.linalg.vector_norm(n, order) for j, n in zip(rivals, normals, strict=True)
        ]
        closest = min(range(2), key=lambda k: float(distances[k]))
        torch.testing.assert_close(margins[i], distances[closest])
        n = normals[closest]
        steps = {1: n.sign(), 2: n / n.norm(), math.inf: n.sign() * (n.abs() == n.abs().max())}
        moved = model(x[i] - margins[i] * steps[order])
        torch.testing.assert_close(moved[y[i]], moved[rivals[closest]])


@pytest.mark.parametrize("factor", [1e-3, 5.0])
def test_last_layer_scale_does_not_change_margins(factor: float) -> None:
    model, x, y = made("wrn_10_2")
    before = effective_margins(model, x, y)
    norms = effective_weight_norms(model, x, y, direction="margin")
    with torch.no_grad():
        for parameter in model.fc.parameters():  # type: ignore[union-attr, operator]
            parameter.mul_(factor)
    torch.testing.assert_close(effective_margins(model, x, y), before, rtol=1e-10, atol=0)
    torch.testing.assert_close(effective_weight_norms(model, x, y, direction="margin"), factor * norms)


def test_two_classes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x, y = torch.rand(4, 6, dtype=torch.float64), torch.tensor([0, 1, 1, 0])
    torch.testing.assert_close(effective_margins(model, x, y), loop_margins(model, x, y, 2))


def test_zero_effective_weight_gives_an_infinite_margin() -> None:
    """Classes that differ by a constant have no boundary in reach."""
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    margins = effective_margins(model, torch.rand(2, 3).double(), torch.tensor([0, 1]))
    assert margins.tolist() == [math.inf, -math.inf]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry_id", ["custom_function_activation", "no_grad_region", "data_dependent_control_flow"])
def test_models_that_cannot_be_linearized(entry_id: str) -> None:
    model, x, y = made(entry_id)
    with evaluation_mode(model):
        leaf = x.clone().requires_grad_()
        z = model(leaf)
        expected = torch.stack([torch.autograd.grad(z[:, c].sum(), leaf, retain_graph=True)[0] for c in range(4)], 1)
    torch.testing.assert_close(effective_weights(model, x), expected)
    assert torch.isfinite(effective_margins(model, x, y)).all()


def test_the_model_is_left_as_it_was() -> None:
    model, x, y = made("mlp_batchnorm")
    model[2].training = False  # type: ignore[index]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    effective_weights(model, x)
    effective_weight_norms(model, x)
    effective_margins(model, x, y)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters()) and not x.requires_grad


BAD: list[tuple[Any, dict[str, Any], Any, str]] = [
    (effective_weights, {"classes": [4]}, ValueError, r"classes.*4"),
    (effective_weights, {"classes": []}, ValueError, r"classes"),
    (effective_weights, {"classes": [0.5]}, (TypeError, ValueError), r"classes.*0\.5"),
    (effective_weight_norms, {"ord": 3}, ValueError, r"ord.*3"),
    (effective_weight_norms, {"direction": "label"}, (TypeError, ValueError), r"\by\b"),
    (effective_weight_norms, {"direction": "up"}, ValueError, r"direction.*up"),
    (effective_weight_norms, {"temperature": 0}, ValueError, r"temperature.*0"),
    (effective_margins, {"y": "good", "ord": 0}, ValueError, r"ord.*0"),
    (effective_margins, {"y": "good", "top_k": 0}, ValueError, r"top_k.*0"),
    (effective_margins, {"y": "good", "batch_size": 0}, ValueError, r"batch_size.*0"),
    (effective_margins, {"y": torch.tensor([0, 9, 1, 2, 3])}, ValueError, r"\by\b.*9"),
    (effective_margins, {"y": torch.tensor([0, 1])}, ValueError, r"\by\b.*2"),
    (effective_margins, {"y": torch.rand(5)}, TypeError, r"\by\b.*float32"),
]


@pytest.mark.parametrize(("function", "options", "error", "text"), BAD)
def test_bad_arguments(function: Any, options: dict[str, Any], error: Any, text: str) -> None:
    model, x, y = made("act_silu")
    options = {k: y if isinstance(v, str) and v == "good" else v for k, v in options.items()}
    with pytest.raises(error, match=f"(?s){text}"):
        function(model, x, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_x(value: float) -> None:
    model, x, y = made("act_silu")
    x[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=r"(?s)\bx\b"):
        effective_margins(model, x, y)

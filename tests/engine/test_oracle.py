"""The oracle against formulations that share none of its code: loops, torch.func, differences."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, jacrev, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

import zoo
from oracle import captured_inputs, double_backward, evaluation_mode, relative_error, seeds

SUBJECTS = ["mlp_batchnorm", "act_silu", "vit", "densenet", "tied_parameters"]


def directional_slope(entry_id: str, temperature: float) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """2 * gradient of d/dh s(x + h g; p fixed) at h = 0 by forward mode, g held constant."""
    entry = zoo.get(entry_id)
    model, (x, _) = entry.make(), entry.data()
    parameters = dict(model.named_parameters())
    with evaluation_mode(model), sdpa_kernel(SDPBackend.MATH):
        jacobian = jacrev(model)(x)  # [N, C, N, ...]
        p = torch.softmax(model(x).detach() / temperature, 1)
        g = torch.stack([torch.tensordot(p[i], jacobian[i, :, i], 1) for i in range(len(x))]).detach()
        _, slope = jvp(lambda t: (p * functional_call(model, parameters, (t,))).sum(), (x,), (g,))
        gradients = torch.autograd.grad(2 * slope, list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True)), model


# Not "vit": reverse over forward mode loses terms of LayerNorm's statistics; differences cover it.
@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu", "multihead_attention", "densenet", "fourier"])
def test_gradient_is_the_forward_mode_directional_derivative(entry_id: str) -> None:
    slope, model = directional_slope(entry_id, 0.7)
    x, _ = zoo.get(entry_id).data()
    reference = double_backward(model, x, temperature=0.7, reduction="sum")
    largest = max(g.norm().item() for g in reference.grads.values() if g is not None)
    for name, g in reference.grads.items():
        assert relative_error(slope[name], g, floor=1e-5 * largest) < 1e-10, name


@pytest.mark.parametrize("entry_id", SUBJECTS)
def test_norms_are_rows_of_the_jacobian(entry_id: str) -> None:
    entry = zoo.get(entry_id)
    model, (x, y) = entry.make(), entry.data()
    with evaluation_mode(model):
        logits = model(x).detach()
        for i in range(len(x)):
            rows = jacrev(lambda t: model(t)[0])(x[i : i + 1]).flatten(1)  # [C, d]
            for direction in ("softmax", "label", "margin", "all"):
                r = double_backward(model, x, y, temperature=0.7, direction=direction, reduction="none").per_sample
                mixes = seeds(logits[i : i + 1], y[i : i + 1], 0.7, direction, center=False)
                torch.testing.assert_close(r[i], sum((mix[0] @ rows).square().sum() for mix in mixes))


@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu", "vit"])
def test_gradient_by_central_differences(entry_id: str) -> None:
    entry = zoo.get(entry_id)
    model, (x, y) = entry.make(), entry.data()
    options = {"direction": "label", "reduction": "sum", "layers": ("input", *entry.layers[:1])}
    reference = double_backward(model, x, y, **options)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.dim() > 1)
    step = 1e-6 * torch.randn_like(parameter)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            parameter.add_(sign * step)
        values.append(double_backward(model, x, y, **options).value)
        with torch.no_grad():
            parameter.sub_(sign * step)
    expected = (reference.grads[name] * step).sum()
    torch.testing.assert_close((values[0] - values[1]) / 2, expected, rtol=1e-5, atol=0)


def test_layer_norms_are_those_of_the_tail_of_the_net() -> None:
    entry = zoo.get("mlp_batchnorm")
    model, (x, y) = entry.make(), entry.data()
    found = double_backward(model, x, y, direction="label", layers=("input", "4"))
    with evaluation_mode(model):
        h = model[:4](x).detach()
        tail = double_backward(model[4:], h, y, direction="label")
    torch.testing.assert_close(found.norms["4"], tail.norms["input"])
    torch.testing.assert_close(found.per_sample, found.norms["input"].square() + found.norms["4"].square())


def test_captured_inputs_belong_to_the_named_modules() -> None:
    model = zoo.get("mlp").make()
    x, _ = zoo.get("mlp").data()
    with captured_inputs(model, ("input", "3")) as captured:
        model(x)
    torch.testing.assert_close(captured["3"], model[:3](x))


def test_the_oracle_leaves_modes_and_statistics_alone() -> None:
    model = zoo.get("mlp_batchnorm").make()
    model[2].training = False
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    double_backward(model, *zoo.get("mlp_batchnorm").data())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_relative_error_sees_what_it_must() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a) == 0 and relative_error(None, None) == 0 and relative_error(None, 0 * a) == 0
    assert relative_error(2 * a, a) == 1 and relative_error(None, a) == 1
    assert relative_error(a, None) == float("inf") and relative_error(a, 0 * a, floor=10) == 0.5
    assert not relative_error(a * float("nan"), a) <= 1e300

"""Identities of the effective weight penalty that hold whatever the implementation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import zoo
from emr_kernels import EffectiveWeightPenalty, effective_margins
from oracle import assert_gradients_match, double_backward, evaluation_mode, relative_error

RELU_NETS = ["mlp_batchnorm", "wrn_10_2"]


def made(entry_id: str, batch: int = 5) -> tuple[nn.Module, Tensor, Tensor]:
    entry = zoo.get(entry_id)
    model = entry.make()
    model.zero_grad()
    return model, *entry.data(batch)


def log_sum_exp_gradient(model: nn.Module, x: Tensor, temperature: float, create_graph: bool = False) -> Tensor:
    with evaluation_mode(model):
        x = x.detach().requires_grad_()
        s = temperature * torch.logsumexp(model(x) / temperature, dim=1).sum()
        return torch.autograd.grad(s, x, create_graph=create_graph)[0]


@pytest.mark.parametrize("temperature", [0.1, 1.0, 40.0])
@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu"])
def test_value_is_the_log_sum_exp_gradient(entry_id: str, temperature: float) -> None:
    """R = 1/N^2 sum_i ||grad_x T LSE(z/T)||^2, over the batch and sample by sample."""
    model, x, _ = made(entry_id)
    value = EffectiveWeightPenalty(model, temperature=temperature)(x).detach()
    batch = log_sum_exp_gradient(model, x, temperature).square().sum() / len(x) ** 2
    loop = sum(log_sum_exp_gradient(model, x[i : i + 1], temperature).square().sum() for i in range(len(x)))
    torch.testing.assert_close(value, batch, rtol=1e-12, atol=0)
    torch.testing.assert_close(value, loop / len(x) ** 2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu"])
def test_the_class_mix_is_held_constant(entry_id: str) -> None:
    """The log-sum-exp form, differentiated in full, has another gradient than the penalty with p detached."""
    model, x, _ = made(entry_id)
    names = [name for name, p in model.named_parameters() if p.dim() > 1]
    other = log_sum_exp_gradient(model, x, 1.0, create_graph=True).square().sum() / len(x) ** 2
    parameters = dict(model.named_parameters())
    through_p = dict(zip(names, torch.autograd.grad(other, [parameters[n] for n in names]), strict=True))
    EffectiveWeightPenalty(model, temperature=1.0)(x).backward()
    assert_gradients_match(model, double_backward(model, x, temperature=1.0).grads)
    assert max(relative_error(parameters[n].grad, through_p[n]) for n in names) > 1e-2


@pytest.mark.parametrize("entry_id", RELU_NETS)
def test_finite_difference_form_inside_a_linear_region(entry_id: str) -> None:
    """(2/h) grad_theta [s(x + h g) - s(x)] with p and g fixed: no second derivative at all."""
    model, x, _ = made(entry_id)
    parameters = [p for p in model.parameters() if p.dim() > 1]
    with evaluation_mode(model):
        leaf = x.clone().requires_grad_()
        p = torch.softmax(model(leaf).detach(), 1) / len(x)
        (g,) = torch.autograd.grad((p * model(leaf)).sum(), leaf)
        h = 1e-4 / g.flatten(1).norm(dim=1).max()
        difference = (p * (model(x + h * g) - model(x))).sum()
        expected = torch.autograd.grad(2 / h * difference, parameters)
    EffectiveWeightPenalty(model, temperature=1.0)(x).backward()
    for parameter, reference in zip(parameters, expected, strict=True):
        assert relative_error(parameter.grad, reference) < 1e-9


@pytest.mark.parametrize("entry_id", RELU_NETS)
def test_biases_and_input_have_no_gradient_on_relu_nets(entry_id: str) -> None:
    model, x, _ = made(entry_id)
    x.requires_grad_()
    EffectiveWeightPenalty(model, temperature=1.0)(x).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name
    assert x.grad is None or not x.grad.any()


def test_biases_and_input_have_a_gradient_on_smooth_nets() -> None:
    model, x, _ = made("act_silu")
    x.requires_grad_()
    EffectiveWeightPenalty(model, temperature=1.0)(x).backward()
    for name in ("0.bias", "1.bias", "3.bias"):
        assert model.get_parameter(name).grad.any(), name  # type: ignore[union-attr]
    assert x.grad is not None and x.grad.any()


@pytest.mark.parametrize("entry_id", ["mlp_batchnorm", "act_silu"])
def test_scaling_the_last_layer(entry_id: str) -> None:
    """Last layer times c: R times c^2 at equal p (T times c too), effective margins unchanged."""
    model, x, y = made(entry_id)
    value = EffectiveWeightPenalty(model, temperature=0.5)(x)
    margins = effective_margins(model, x, y)
    with torch.no_grad():
        for parameter in model[-1].parameters():  # type: ignore[index]
            parameter.mul_(3.0)
    torch.testing.assert_close(EffectiveWeightPenalty(model, temperature=1.5)(x), 9 * value, rtol=1e-12, atol=0)
    torch.testing.assert_close(effective_margins(model, x, y), margins, rtol=1e-11, atol=0)


def test_centring_the_last_layer() -> None:
    """A last layer less its class mean keeps cross-entropy and margins; only ``center`` keeps R."""
    model, x, y = made("mlp_batchnorm")
    centred = copy.deepcopy(model)
    with torch.no_grad():
        centred[-1].weight -= centred[-1].weight.mean(0)  # type: ignore[index, union-attr, operator]
        centred[-1].bias -= centred[-1].bias.mean()  # type: ignore[index, union-attr, operator]
    with evaluation_mode(model), evaluation_mode(centred):
        before, after = model(x), centred(x)
    torch.testing.assert_close(F.cross_entropy(before, y), F.cross_entropy(after, y))
    assert torch.equal(before.argmax(1), after.argmax(1))
    plain = [EffectiveWeightPenalty(m, temperature=40.0)(x).item() for m in (model, centred)]
    assert plain[1] < 0.5 * plain[0]
    kept = [EffectiveWeightPenalty(m, temperature=40.0, center=True)(x) for m in (model, centred)]
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-9, atol=0)
    torch.testing.assert_close(effective_margins(model, x, y), effective_margins(centred, x, y))


def test_repeating_the_batch() -> None:
    """Twice the same batch: the paper's reduction halves, the mean stays, the sum doubles."""
    model, x, _ = made("mlp_batchnorm")
    twice = torch.cat([x, x])
    for reduction, factor in (("paper", 0.5), ("mean", 1.0), ("sum", 2.0)):
        penalty = EffectiveWeightPenalty(model, reduction=reduction)
        torch.testing.assert_close(penalty(twice), factor * penalty(x), rtol=1e-12, atol=0)

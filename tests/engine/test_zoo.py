"""Every model of the zoo: value, gradients and per-sample norms equal float64 double backward's."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import zoo
from emr_kernels import EffectiveWeightPenalty
from oracle import assert_gradients_match, double_backward, gradients, relative_error
from zoo import ENTRIES, Entry

by_id = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.id)
TEMPERATURE = 0.7
pytestmark = pytest.mark.device


def fallback_notices(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if re.search("double backward|autograd", str(w.message))]


def check(
    entry: Entry, model: nn.Module, penalty: EffectiveWeightPenalty, batch: int, reduction: str = "paper"
) -> None:
    """Value and gradients of parameters and x; unequal weights, so that no sample stands for another."""
    twin = entry.make(reference=True)
    x, y = entry.data(batch)
    weights = torch.linspace(-1, 2, batch, dtype=x.dtype, device=x.device) if reduction == "none" else None
    penalty.prepare(x)
    model.zero_grad()
    twin.load_state_dict(model.state_dict())
    for parameter, copied in zip(model.parameters(), twin.parameters(), strict=True):
        copied.requires_grad_(parameter.requires_grad)
    torch.manual_seed(7)
    reference = double_backward(twin, x, y, temperature=TEMPERATURE, reduction=reduction, weights=weights)
    torch.manual_seed(7)
    x.requires_grad_()
    value = penalty(x, y)
    value.backward(weights)
    assert value.shape == reference.value.shape
    torch.testing.assert_close(value.detach(), reference.value, rtol=entry.tolerance, atol=0)
    assert_gradients_match(model, reference.grads, entry.tolerance)
    if entry.piecewise_linear:
        assert x.grad is None or not x.grad.any()
    else:
        assert reference.grad_x.norm() > 0
        assert relative_error(x.grad, reference.grad_x) <= entry.tolerance
    if entry.engine != "any":
        assert penalty.engine == entry.engine, penalty.engine_reason


@by_id
def test_gradients_equal_double_backward(entry: Entry) -> None:
    model = entry.shared()
    penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check(entry, model, penalty, entry.batch)
    if penalty.engine == "linearized":
        assert penalty.engine_reason is None and not fallback_notices(caught)


@by_id
@pytest.mark.filterwarnings("ignore")
def test_per_sample_penalties(entry: Entry) -> None:
    model = entry.shared()
    penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE, reduction="none")
    check(entry, model, penalty, entry.batch, "none")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.any_batch], ids=lambda entry: entry.id)
def test_other_batch_sizes(entry: Entry) -> None:
    """One prepared penalty serves a larger batch, a single sample and the first size again."""
    model = entry.shared()
    penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE)
    for batch in (6, 1, entry.batch):
        check(entry, model, penalty, batch)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.engine == "autograd"], ids=lambda entry: entry.id)
def test_the_fallback_warns_once_and_names_its_reason(entry: Entry) -> None:
    x, y = entry.data()
    penalty = EffectiveWeightPenalty(entry.make())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        penalty.prepare(x)
        penalty(x, y).backward()
        penalty(x, y).backward()
    notices = fallback_notices(caught)
    assert len(notices) == 1, notices
    assert penalty.engine == "autograd" and penalty.engine_reason is not None
    assert re.search(entry.reason, penalty.engine_reason), penalty.engine_reason
    assert re.search(entry.reason, notices[0]), notices[0]


def test_call_counter_is_not_counted_twice_for_the_penalty() -> None:
    """A buffer mutated in evaluation mode counts a call of the penalty at most once."""
    model = zoo.get("call_counter").make()
    x, y = zoo.get("call_counter").data()
    penalty = EffectiveWeightPenalty(model)
    penalty(x, y)
    settled = int(model.calls)
    penalty(x, y)
    assert int(model.calls) - settled in (0, 1)


@pytest.mark.parametrize("entry_id", ["transformer_encoder_layer_frozen", "mlp_batchnorm", "act_silu"])
def test_fully_frozen_models_have_a_gradient_in_x_alone(entry_id: str) -> None:
    entry = zoo.get(entry_id)
    model = entry.make().requires_grad_(False)
    check(entry, model, EffectiveWeightPenalty(model, temperature=TEMPERATURE), entry.batch)
    assert gradients(model) == {}
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("scale", [0.0, 1e-300, 1e-14, 1e-7])
def test_batchnorm_scales_at_and_near_zero(scale: float) -> None:
    """As after pruning or in a zero-initialised residual branch: every scale keeps its exact gradient."""
    entry = zoo.get("wrn_16_4_leaky_channel_padding")
    model, (x, _) = entry.make(), entry.data()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.weight[1] = scale
        norms[1].weight.fill_(scale)
    reference = double_backward(model, x, temperature=TEMPERATURE)
    EffectiveWeightPenalty(model, temperature=TEMPERATURE)(x).backward()
    assert_gradients_match(model, reference.grads)
    assert any(norm.weight.grad[1] != 0 for norm in norms)  # type: ignore[index]


def test_several_threads() -> None:
    entry = zoo.get("wrn_16_4")
    model = entry.shared()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        check(entry, model, EffectiveWeightPenalty(model, temperature=TEMPERATURE), entry.batch)
    finally:
        torch.set_num_threads(threads)

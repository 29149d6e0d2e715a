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


def prepared(entry: Entry, model: nn.Module, **options: object) -> EffectiveWeightPenalty:
    """A prepared penalty with the expected engine; a fallback warns exactly once, naming its reason."""
    penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE, **options)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        penalty.prepare(entry.data()[0])
        penalty(*entry.data())
    notices = [
        str(w.message) for w in caught if "double backward" in str(w.message) or "autograd" in str(w.message)
    ]
    if entry.engine != "any":
        assert penalty.engine == entry.engine, penalty.engine_reason
    if penalty.engine == "autograd":
        assert len(notices) == 1, notices
        assert penalty.engine_reason and re.search(entry.reason, penalty.engine_reason), penalty.engine_reason
        assert re.search(entry.reason, notices[0]), notices[0]
    else:
        assert penalty.engine_reason is None and not notices, (penalty.engine_reason, notices)
    return penalty


@by_id
def test_gradients_equal_double_backward(entry: Entry) -> None:
    model, twin = entry.make(), entry.make(reference=True)
    x, y = entry.data()
    penalty = prepared(entry, model)
    model.zero_grad()
    twin.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    reference = double_backward(twin, x, y, temperature=TEMPERATURE)
    torch.manual_seed(7)
    x = x.requires_grad_()
    value = penalty(x, y)
    value.backward()
    torch.testing.assert_close(value.detach(), reference.value, rtol=entry.tolerance, atol=0)
    assert value.shape == ()
    assert_gradients_match(model, reference.grads, entry.tolerance)
    if entry.piecewise_linear:
        assert x.grad is None or not x.grad.any()
    else:
        assert reference.grad_x.norm() > 0
        assert relative_error(x.grad, reference.grad_x) <= entry.tolerance


@by_id
def test_per_sample_penalties(entry: Entry) -> None:
    """``reduction="none"``, contracted with unequal weights so that no sample may stand for another."""
    model, twin = entry.make(), entry.make(reference=True)
    x, y = entry.data()
    penalty = prepared(entry, model, reduction="none")
    model.zero_grad()
    twin.load_state_dict(model.state_dict())
    weights = torch.linspace(-1, 2, len(x), dtype=x.dtype)
    torch.manual_seed(7)
    reference = double_backward(twin, x, y, temperature=TEMPERATURE, reduction="none", weights=weights)
    torch.manual_seed(7)
    r = penalty(x, y)
    torch.testing.assert_close(r.detach(), reference.per_sample, rtol=entry.tolerance, atol=0)
    if r.requires_grad:
        r.backward(weights)
    assert_gradients_match(model, reference.grads, entry.tolerance)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.any_batch], ids=lambda entry: entry.id)
def test_other_batch_sizes(entry: Entry) -> None:
    """One prepared penalty serves a larger batch, a single sample and the first size again."""
    model, twin = entry.make(), entry.make(reference=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        penalty = EffectiveWeightPenalty(model, temperature=TEMPERATURE)
        for batch in (entry.batch, 6, 1, entry.batch):
            x, y = entry.data(batch)
            torch.manual_seed(7)
            reference = double_backward(twin, x, y, temperature=TEMPERATURE)
            penalty.prepare(x)
            model.zero_grad()
            torch.manual_seed(7)
            value = penalty(x, y)
            if value.requires_grad:
                value.backward()
            torch.testing.assert_close(value.detach(), reference.value, rtol=entry.tolerance, atol=0)
            assert_gradients_match(model, reference.grads, entry.tolerance)
    if entry.engine == "linearized":
        assert penalty.engine == "linearized", penalty.engine_reason


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
    x, y = entry.data()
    reference = double_backward(model, x, y, temperature=TEMPERATURE)
    penalty = prepared(entry, model)
    x.requires_grad_()
    value = penalty(x, y)
    torch.testing.assert_close(value.detach(), reference.value, rtol=entry.tolerance, atol=0)
    assert value.requires_grad
    value.backward()
    assert gradients(model) == {}
    assert all(p.grad is None for p in model.parameters())
    assert relative_error(x.grad, reference.grad_x) <= entry.tolerance

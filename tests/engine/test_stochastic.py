"""The cheap variants: a random subset of the batch and a penalty every few calls, unbiased both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import zoo
from emr_kernels import EffectiveWeightPenalty, EMRLoss
from oracle import double_backward


def made(entry_id: str, batch: int = 4) -> tuple[nn.Module, Tensor, Tensor]:
    entry = zoo.get(entry_id)
    return entry.make(), *entry.data(batch)


def flops(call: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_subset_is_unbiased() -> None:
    """Value and gradient of the stochastic penalty average to the full ones, within five standard errors."""
    model, x, _ = made("act_silu", batch=6)
    full = double_backward(model, x, temperature=1.0)
    penalty = EffectiveWeightPenalty(model, temperature=1.0, subset=0.5)
    weight = model.get_parameter("3.weight")
    values, slopes = [], []
    for _ in range(150):
        weight.grad = None
        value = penalty(x)
        value.backward()
        values.append(value.detach())
        assert weight.grad is not None
        slopes.append((weight.grad * full.grads["3.weight"]).sum() / full.grads["3.weight"].square().sum())  # type: ignore[union-attr]
    for draws, expected in (
        (torch.stack(values), full.value),
        (torch.stack(slopes), torch.ones(()).double()),
    ):
        assert draws.std() > 0
        assert abs(draws.mean() - expected) < 5 * draws.std() / 150**0.5


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_subset_of_equal_samples_is_exact(reduction: str) -> None:
    """All samples alike: any subset, scaled rightly, gives the full value whatever was drawn."""
    model, x, _ = made("act_silu", batch=1)
    x = x.expand(8, -1, -1, -1).contiguous()
    full = EffectiveWeightPenalty(model, reduction=reduction)(x)
    for subset in (0.01, 0.25, 0.5, 1.0):
        torch.testing.assert_close(EffectiveWeightPenalty(model, reduction=reduction, subset=subset)(x), full)


def test_subset_does_less_work() -> None:
    model, x, _ = made("wrn_10_2", batch=8)
    full, quarter = EffectiveWeightPenalty(model), EffectiveWeightPenalty(model, subset=0.25)
    counts = []
    for penalty in (full, quarter):
        penalty(x)
        counts.append(flops(lambda p=penalty: p(x).backward()))  # type: ignore[misc]
    assert counts[1] <= 0.3 * counts[0]


def test_every_is_exact_over_a_period_and_counts_in_its_state() -> None:
    model, x, y = made("act_silu")
    model.eval()
    base = F.cross_entropy(model(x), y).detach()
    penalty = double_backward(model, x).value
    criterion = EMRLoss(model, strength=1.0, every=3)
    terms = torch.stack([criterion(x, y).detach() - base for _ in range(6)])
    assert (terms.abs() < 1e-15).sum() == 4
    torch.testing.assert_close(terms[:3].sum(), 3 * penalty)
    torch.testing.assert_close(terms[3:], terms[:3])

    criterion(x, y)
    resumed = EMRLoss(model, strength=1.0, every=3)
    resumed.load_state_dict(criterion.state_dict())
    following = [torch.stack([c(x, y).detach() for _ in range(3)]) for c in (criterion, resumed)]
    torch.testing.assert_close(following[0], following[1])
    assert following[0].unique().numel() == 2


def test_skipped_calls_still_train_on_the_base_loss() -> None:
    model, x, y = made("act_silu")
    criterion = EMRLoss(model, every=2)
    for _ in range(2):
        model.zero_grad()
        criterion(x, y).backward()
        assert model.get_parameter("0.weight").grad.any()  # type: ignore[union-attr]

"""What attacks maximise: values by their definitions, seeds by autograd, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from emr_training.attacks.losses import LOSSES, divergence, find_loss

Definition = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def _of(logits: Tensor, label: Tensor) -> Tensor:
    return logits.gather(1, label[:, None]).squeeze(1)


def _rival(logits: Tensor, label: Tensor) -> Tensor:
    return logits.masked_fill(F.one_hot(label, logits.shape[1]).bool(), -torch.inf).amax(1)


def ce(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, target, reduction="none")


def cw(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        return _rival(logits, y) - _of(logits, y)
    return _of(logits, target) - _rival(logits, target)


def dlr(logits: Tensor, y: Tensor, target: Tensor | None) -> Tensor:
    ranked = logits.sort(1, descending=True).values
    if target is None:
        return -(_of(logits, y) - _rival(logits, y)) / (ranked[:, 0] - ranked[:, 2] + 1e-12)
    return -(_of(logits, y) - _of(logits, target)) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12)


def case(targeted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    logits, y = 4 * torch.randn(64, 6, dtype=torch.float64), torch.randint(6, (64,))
    target = (y + torch.randint(1, 6, (64,))) % 6 if targeted else None
    predicted = logits.argmax(1)
    assert (predicted == y).any() and (predicted != y).any()
    return logits.requires_grad_(), y, target


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(("name", "definition"), [("cw", cw), ("dlr", dlr)])
def test_values_and_seeds(name: str, definition: Definition, targeted: bool) -> None:
    logits, y, target = case(targeted)
    expected = definition(logits, y, target)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, seed = LOSSES[name](logits.detach(), y, target)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seed, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("targeted", [False, True])
def test_cross_entropy_up_to_its_saturation(targeted: bool) -> None:
    logits, y, target = case(targeted)
    expected = ce(logits, y, target)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, seed = LOSSES["ce"](logits.detach(), y, target)
    # Cross-entropy is the softplus of the log odds; its gradient is theirs times 1 - p.
    sign = 1 if target is None else -1
    torch.testing.assert_close(sign * F.softplus(sign * value), expected.detach())
    goal = y if target is None else target
    torch.testing.assert_close(seed * (1 - _of(logits.detach().softmax(1), goal))[:, None], gradient)


@pytest.mark.parametrize("targeted", [False, True])
def test_cross_entropy_of_coupled_images(targeted: bool) -> None:
    logits, y, target = case(targeted)
    expected = ce(logits, y, target)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, seed = find_loss("ce", "train")(logits.detach(), y, target)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seed, gradient, rtol=1e-10, atol=1e-12)
    assert find_loss("ce", "eval") is LOSSES["ce"] and find_loss("cw", "train") is LOSSES["cw"]


def test_divergence() -> None:
    clean, (logits, y, _) = 4 * torch.randn(64, 6, dtype=torch.float64), case(False)
    expected = F.kl_div(logits.log_softmax(1), clean.softmax(1), reduction="none").sum(1)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, seed = divergence(clean)(logits.detach(), y, None)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seed, gradient, rtol=1e-10, atol=1e-12)
    # The other direction of the divergence is another number.
    swapped = F.kl_div(clean.log_softmax(1), logits.softmax(1), reduction="none").sum(1)
    assert (swapped - expected).abs().max() > 0.1
    at_the_image, none = divergence(clean)(clean, y, None)
    assert not none.any() and not at_the_image.any()


def test_dlr_ignores_shift_and_scale() -> None:
    logits, y, target = case(True)
    for goal in (None, target):
        value, _ = LOSSES["dlr"](logits.detach(), y, goal)
        moved, _ = LOSSES["dlr"](100 * logits.detach() - 7, y, goal)
        torch.testing.assert_close(moved, value)


def test_dlr_towards_the_runner_up_has_the_sign_of_dlr() -> None:
    logits, y, _ = case(False)
    logits = logits.detach()
    runner_up = logits.scatter(1, y[:, None], -torch.inf).argmax(1)
    plain, _ = LOSSES["dlr"](logits, y, None)
    targeted, _ = LOSSES["dlr"](logits, y, runner_up)
    assert torch.equal(plain.sign(), targeted.sign()) and plain.sign().unique().numel() == 2


def test_the_loss_of_most_even_odds_survives_low_precision() -> None:
    # In bfloat16 the log odds are computed in float32: a seed that sums to zero to its precision.
    logits, y, _ = case(False)
    _, seed = LOSSES["ce"](logits.detach().bfloat16(), y, None)
    assert seed.dtype == torch.float32
    assert seed.sum(1).abs().max() < 1e-6

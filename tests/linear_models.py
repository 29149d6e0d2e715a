"""Classifiers whose distance to the decision boundary is known, and images to go with them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import emr_kernels

SIZE = 12


def linear(classes: int) -> nn.Module:
    """Logits 0 at x = 1/2, random weights."""
    model = nn.Linear(SIZE, classes)
    return _centred(model, model)


def one_region(classes: int) -> nn.Module:
    """A ReLU network, centred alike, none of whose units ever changes its side in the box."""
    first, last = nn.Linear(SIZE, 16), nn.Linear(16, classes)
    with torch.no_grad():
        reach = first.weight.abs().sum(1)
        first.bias.copy_(torch.where(torch.arange(16) % 4 == 0, -1.1 * reach, 1.1 * reach))
    return _centred(nn.Sequential(first, nn.ReLU(), last), last)


def _centred(model: nn.Module, last: nn.Linear) -> nn.Module:
    with torch.no_grad():
        last.bias -= model(torch.full((1, SIZE), 0.5))[0]
    return model


def images(model: nn.Module, least: float) -> tuple[Tensor, Tensor]:
    """Images and labels as the model has them, at least `least` (Linf) from its boundary and far from the box's."""
    x = 0.5 + 0.2 * (torch.rand(400, SIZE) - 0.5)
    with torch.no_grad():
        y = model(x).argmax(1)
    far = emr_kernels.effective_margins(model, x, y, ord=1) > least
    return x[far][:20], y[far][:20]

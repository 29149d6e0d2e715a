"""A model that makes every side effect that an attack could leave behind, and what is looked at afterwards."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor, nn


class Awkward(nn.Module):
    """Writes to a buffer and replaces another in every mode, is random, fails on request, and resets its own mode."""

    def __init__(self, failure: BaseException | None = None, fail_at: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(64, 32)
        self.norm = nn.BatchNorm1d(32)
        self.frozen_norm = nn.BatchNorm1d(32)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(32, 10)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(64))
        self.failure, self.fail_at = failure, fail_at

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * x.detach().flatten(1).mean(0)
        if self.failure is not None and self.calls >= self.fail_at:
            self.train()
            raise self.failure
        h = self.dropout(self.frozen_norm(self.norm(self.first(x.flatten(1)))))
        h = h + 1e-3 * torch.randn_like(h)
        self.dropout.train()  # as models do that switch their mode by themselves
        return self.last(h)


class Plain(nn.Module):
    """Two BatchNorms without the awkwardness: the engine runs it as a linearized program.

    They normalise over pixels, too, so that in training mode a batch may shrink to one image.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, stride=2)
        self.norm = nn.BatchNorm2d(8)
        self.frozen_norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(72, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.frozen_norm(self.norm(self.first(x)))).flatten(1))


class Normalising(nn.Module):
    """The classifier behind a normalisation of its input, in place or not."""

    def __init__(self, inner: nn.Module, in_place: bool) -> None:
        super().__init__()
        self.inner, self.in_place = inner, in_place

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.sub_(0.1).mul_(1.2) if self.in_place else (x - 0.1) * 1.2)


def in_training(model: Awkward | Plain) -> None:
    """As in the middle of fine-tuning: one BatchNorm frozen by its mode, a bias by its flag, one gradient there."""
    model.train()
    model.frozen_norm.eval()
    model.first.bias.requires_grad_(False)
    model.last.weight.grad = torch.ones_like(model.last.weight)


def trace(model: nn.Module) -> dict[str, object]:
    """All that an attack could change."""
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad_identity": [id(p.grad) for p in model.parameters()],
        "grad_values": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "buffer_identity": [id(b) for b in model.buffers()],
        "state": {name: value.tolist() for name, value in model.state_dict().items()},
        "rng": torch.get_rng_state().tolist(),
        "python_rng": random.getstate(),
        "numpy_rng": repr(np.random.get_state()),
        "grad_mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }

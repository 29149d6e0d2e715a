"""Averages of the weights along training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from emr_training.config.optimization import AverageConfig


class Average:
    """A copy of `model` whose parameters average those of the model.

    ema: theta_bar <- tau theta_bar + (1 - tau) theta after every step, tau = min(decay, (1 + t) / (10 + t)) with t = 0
        at the first step that counts (Gowal et al. 2020). BatchNorm statistics are the model's own.
    swa: the mean of the weights at the ends of the epochs that count (Izmailov et al. 2018); BatchNorm statistics are
        estimated anew from the training images.
    """

    def __init__(self, config: AverageConfig, model: nn.Module) -> None:
        self.config = config
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.count = 0
        self._source = model

    @property
    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.model.parameters()), [p.detach() for p in self._source.parameters()]

    @torch.no_grad()
    def after_step(self, epoch: int) -> None:
        """Take up the weights after a step of this epoch."""
        averaged, current = self._pairs
        if epoch < self.config.start:
            torch._foreach_copy_(averaged, current)
        elif self.config.name == "ema":
            tau = min(self.config.decay, (1 + self.count) / (10 + self.count))
            torch._foreach_lerp_(averaged, current, 1 - tau)
            self.count += 1

    @torch.no_grad()
    def after_epoch(self, epoch: int, images: Iterable[Tensor]) -> nn.Module:
        """The averaged model at the end of this epoch; `images` are run for BatchNorm's statistics where needed."""
        averaged, current = self._pairs
        if self.config.name == "swa" and epoch >= self.config.start:
            self.count += 1
            torch._foreach_lerp_(averaged, current, 1 / self.count)
        for mine, theirs in zip(self.model.buffers(), self._source.buffers(), strict=True):
            mine.copy_(theirs)
        if self.config.name == "swa" and self.count > 1:
            estimate_statistics(self.model, images)
        return self.model

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up again."""
        return {"count": self.count, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.count = state["count"]
        self.model.load_state_dict(state["model"])


@torch.no_grad()
def estimate_statistics(model: nn.Module, images: Iterable[Tensor]) -> None:
    """BatchNorm's running statistics of `model` as the mean over these batches; without BatchNorm nothing is run."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        for x in images:
            model(x)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.training = False

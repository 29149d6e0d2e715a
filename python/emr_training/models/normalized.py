"""Classifiers that were trained on images of mean 0 and standard deviation 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalized(nn.Module):
    """`model` at (x - mean) / std, channel by channel: x [N, C, H, W] in [0, 1] -> logits [N, classes].

    Attacks and penalties then work on x as it is. mean, std: a number for each channel, or one for all.

    Raises ValueError unless they suit images of so many `channels`, and std is positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float], channels: int) -> None:
        super().__init__()
        for name, values in (("mean", mean), ("std", std)):
            if len(values) not in (1, channels):
                raise ValueError(f"model.{name} is {list(values)}; expected one number, or one for each of {channels}")
        if min(std) <= 0:
            raise ValueError(f"model.std is {list(std)}; expected numbers > 0")
        self.model = model
        self.register_buffer("mean", torch.tensor(list(mean)).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(list(std)).view(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.model((x - self.mean) / self.std)
        return logits

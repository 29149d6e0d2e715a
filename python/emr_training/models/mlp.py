"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from torch import Tensor, nn


class MLP(nn.Module):
    """ReLU network on the flattened image: x [N, *input_shape] in [0, 1] -> logits [N, classes]."""

    def __init__(self, input_shape: Sequence[int], classes: int, widths: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        sizes = [prod(input_shape), *widths]
        hidden: list[nn.Module] = []
        for fan_in, fan_out in pairwise(sizes):
            hidden += [nn.Linear(fan_in, fan_out), nn.ReLU()]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], classes))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits

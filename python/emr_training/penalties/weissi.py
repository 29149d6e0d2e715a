"""A penalty of the weights that does not change when layers are rescaled against each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from emr_training.attacks.base import check_choice
from emr_training.errors import check_number

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class WEISSI:
    """Weight-scale-shift-invariant regularisation: sum_l log |W_l| + sparsity * sum_l | W_l / |W_l| |_1.

    W_l are the weights of the linear and convolutional layers that `model` has (as a matrix, one row for each output
    channel). Invariant under W_l -> g_l W_l with product 1 of the g_l, which leave a positively homogeneous net as it
    is; weight decay is not. After Liu, Cui & Chan 2020, whose choice of norm is not known to us: "frobenius" or
    "spectral".
    """

    model: nn.Module
    strength: float
    sparsity: float = 0.0
    norm: Literal["frobenius", "spectral"] = "frobenius"
    name: str = "weissi"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0)
        check_number("sparsity", self.sparsity, low=0.0)
        check_choice("norm", self.norm, ("frobenius", "spectral"))
        if not self._weights():
            raise ValueError("model has no linear or convolutional layer; expected at least one")

    def _weights(self) -> list[Tensor]:
        return [m.weight for m in self.model.modules() if isinstance(m, _LAYERS) and m.weight.requires_grad]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The penalty, a scalar without the strength; x and y are not looked at."""
        terms = []
        for weight in self._weights():
            matrix = weight.flatten(1)
            size = torch.linalg.matrix_norm(matrix, "fro" if self.norm == "frobenius" else 2)
            term = size.log()
            if self.sparsity:
                term = term + self.sparsity * (matrix / size).abs().sum()
            terms.append(term)
        return torch.stack(terms).sum()

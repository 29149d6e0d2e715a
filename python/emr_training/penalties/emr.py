"""Effective Margin Regularization as a penalty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from emr_kernels import EffectiveWeightPenalty
from emr_training.errors import check_number


@dataclass
class EMR:
    """The effective weight penalty of Liu & Chan (BMVC 2022) on `model`, weighted by `strength`.

    R(x) = mean_i |sum_c p_ic dz_c/dx_i|^2 / N with p = softmax(z / temperature) held constant and
    evaluation-mode statistics. `options` go to `emr_kernels.EffectiveWeightPenalty`, which documents and
    checks them.
    """

    model: nn.Module
    strength: float
    temperature: float
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "emr"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0)
        self.penalty = EffectiveWeightPenalty(self.model, temperature=self.temperature, **self.options)

    @property
    def engine(self) -> str:
        """How the penalty is differentiated: "linearized", "autograd", or at first "unprepared"."""
        return str(self.penalty.engine)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The penalty at images x [N, ...] with labels y [N], a scalar without the strength."""
        value: Tensor = self.penalty(x, y)
        return value

"""Penalties that are squared norms of effective weights: EMR, input gradients, Jacobians."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from emr_kernels import EffectiveWeightPenalty
from emr_training.errors import check_count, check_number


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


@dataclass
class InputGradient:
    """Half the squared norm of the loss's input gradient; Ross & Doshi-Velez 2018.

    1/2 sum_i |d(mean CE)/dx_i|^2 = 1/2 (1/N) mean_i |d CE_i / dx_i|^2, in evaluation mode, without double backward
    where the model can be linearized. `options` go to `emr_kernels.EffectiveWeightPenalty`: reduction="mean" leaves out
    the 1/N that the mean loss hides.
    """

    model: nn.Module
    strength: float
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "input_gradient"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0)
        self.penalty = EffectiveWeightPenalty(self.model, direction="cross_entropy", **self.options)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The penalty at images x [N, ...] with labels y [N], a scalar without the strength."""
        value: Tensor = 0.5 * self.penalty(x, y)
        return value


@dataclass
class Jacobian:
    """1/2 mean_i |J_i|_F^2, J the logits' Jacobian in x; Hoffman et al. 2019. In evaluation mode.

    projections: how many random projections estimate it (unbiased); None: exact, one pass for each class.
    """

    model: nn.Module
    strength: float
    projections: int | None = 1
    name: str = "jacobian"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0)
        if self.projections is not None:
            check_count("projections", self.projections)
        direction = "all" if self.projections is None else "random"
        self.penalty = EffectiveWeightPenalty(self.model, direction=direction, reduction="mean")

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The penalty at images x [N, ...], a scalar without the strength; y is not looked at."""
        count = self.projections or 1
        value: Tensor = 0.5 * torch.stack([self.penalty(x) for _ in range(count)]).mean()
        return value

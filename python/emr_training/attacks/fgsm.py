"""The fast gradient sign method, and the random step of fast adversarial training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from emr_training.attacks.base import BoundedAttack, check_choice
from emr_training.attacks.losses import LOSSES, find_loss
from emr_training.attacks.problem import Problem
from emr_training.errors import check_number


@dataclass(frozen=True)
class FGSM(BoundedAttack):
    """x_adv = clamp(x + epsilon * sign(gradient), 0, 1); Goodfellow et al. 2015. Under L2 a normalised step of epsilon.

    loss: "ce", "cw" or "dlr".
    """

    loss: Literal["ce", "cw", "dlr"] = "ce"

    targetable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("loss", self.loss, tuple(LOSSES))

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        _, _, gradient = problem.ascend(problem.x, find_loss(self.loss, self.bn_mode))
        return self.ball.step(problem.x, problem.x, self.ball.open_to(problem.x, gradient), self.epsilon)


@dataclass(frozen=True)
class RFGSM(FGSM):
    """One step of `step_size` from a uniform random start in the ball: fast adversarial training's; Wong et al. 2020.

    step_size: None is 1.25 * epsilon.
    """

    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0.0)

    @property
    def step(self) -> float:
        """The step size in use, in units of the [0, 1] pixel range."""
        return 1.25 * self.epsilon if self.step_size is None else self.step_size

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        start = self.ball.start(problem.x, problem.generator)
        _, _, gradient = problem.ascend(start, find_loss(self.loss, self.bn_mode))
        return self.ball.step(start, problem.x, self.ball.open_to(start, gradient), self.step)

"""Auto-PGD, untargeted and towards the likeliest wrong classes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from emr_kernels.directions import rivals
from emr_training.attacks.ascent import Climb, Momentum, Sparse, Strategy, climb
from emr_training.attacks.balls import Ball
from emr_training.attacks.base import BoundedAttack, check_choice, per_row
from emr_training.attacks.losses import LOSSES, Loss, find_loss
from emr_training.attacks.noise import Noise
from emr_training.attacks.problem import Problem
from emr_training.errors import check_count, check_number


@dataclass(frozen=True)
class APGD(BoundedAttack):
    """PGD that chooses its own step size; Croce and Hein 2020, under L1 Croce and Hein 2021.

    steps: iterations of a run. A run ends for an image at its first success.
    restarts: independent runs, each from a random point: at distance epsilon in a random direction under Linf and L2
        (uniform in the cube or Gaussian), the projection of a standard Gaussian under L1; then the box.
    loss: "ce", "dlr" (needs 3 classes, targeted 4), or "cw" (the margin).
    rho: the part of the iterations in which the loss must rise for the step to stay.
    eot: forward passes that each gradient is the mean of, for a model that is random; then every run goes to its end,
        and its last success is returned.
    best_loss: return each image's point of greatest loss, success or not; for training.
    shrinking: under L1 only, 30% of the steps in a ball of 3 epsilon, 30% in one of 2, the rest in epsilon's, each from
        the best point of the one before.
    """

    steps: int = 100
    restarts: int = 1
    loss: Literal["ce", "dlr", "cw"] = "ce"
    rho: float = 0.75
    eot: int = 1
    best_loss: bool = False
    shrinking: bool = False

    targetable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        check_count("eot", self.eot)
        check_choice("loss", self.loss, tuple(LOSSES))
        check_number("rho", self.rho, low=0.0, high=1.0)
        if self.shrinking and self.norm != "L1":
            raise ValueError(f"shrinking is True under {self.norm}; expected False, as only L1 has it")

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        noise = problem.noise()
        if self.best_loss:
            return self._greatest(problem, noise)
        result, active = _clean(problem)
        for restart in range(self.restarts):
            if active.numel() == 0:
                break
            found = self._run(problem.subset(active), noise.subset(active), restart, find_loss(self.loss, self.bn_mode))
            active = _record(result, active, found)
        return result

    def _greatest(self, problem: Problem, noise: Noise) -> Tensor:
        best: Climb | None = None
        for restart in range(self.restarts):
            found = self._run(problem, noise, restart, find_loss(self.loss, self.bn_mode), stop=False)
            if best is None:
                best = found
            else:
                better = found.best_value > best.best_value
                point = torch.where(per_row(better, found.best), found.best, best.best)
                best = best._replace(best=point, best_value=torch.maximum(best.best_value, found.best_value))
        assert best is not None
        return best.best

    def _run(
        self,
        problem: Problem,
        noise: Noise,
        stream: int,
        loss: Loss,
        goal: Tensor | None = None,
        *,
        stop: bool = True,
    ) -> Climb:
        """One run of all `steps`, over its balls."""
        radii, lengths = [1.0], [self.steps]
        if self.shrinking:
            first = math.ceil(0.3 * self.steps)
            radii, lengths = [3.0, 2.0, 1.0], [first, first, max(self.steps - 2 * first, 0)]
        point: Tensor | None = None
        for radius, length in zip(radii, lengths, strict=True):
            ball = replace(self.ball, epsilon=radius * self.epsilon)
            point = random_start(ball, problem.x, noise, stream) if point is None else ball.project(point, problem.x)
            inside = radius == 1.0
            found = climb(
                problem,
                point,
                self._strategy(ball, length),
                loss,
                length,
                goal=goal,
                eot=self.eot,
                stop=stop and inside and self.eot == 1,
                started=self.shrinking,
            )
            point = found.best
        return found

    def _strategy(self, ball: Ball, steps: int) -> Strategy:
        return Sparse(ball, steps) if self.norm == "L1" else Momentum(ball, steps, self.rho)


@dataclass(frozen=True)
class APGDT(APGD):
    """Auto-PGD towards one wrong class after another; any misclassification is a success.

    n_targets: the likeliest wrong classes at the image, all of them if there are fewer; a full run (`restarts` of them)
        for each, on the images that are still robust.
    loss: the targeted form of "dlr", "ce" or "cw". With fewer than 4 classes "cw" stands in for "dlr", which has no
        targeted form there.
    """

    loss: Literal["ce", "dlr", "cw"] = "dlr"
    n_targets: int = 9

    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_targets", self.n_targets)
        if self.best_loss:
            raise ValueError("best_loss is True; expected False, as the losses towards several classes do not compare")

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        noise = problem.noise()
        clean = problem.logits(problem.x)
        goals = likeliest_wrong(clean, problem.y, self.n_targets)
        loss = find_loss("cw" if self.loss == "dlr" and clean.shape[1] < 4 else self.loss, self.bn_mode)
        result, active = _clean(problem, clean)
        for run in range(goals.shape[1] * self.restarts):
            if active.numel() == 0:
                break
            goal = goals[active, run // self.restarts]
            found = self._run(problem.subset(active), noise.subset(active), run, loss, goal)
            active = _record(result, active, found)
        return result


def likeliest_wrong(logits: Tensor, y: Tensor, count: int) -> Tensor:
    """The `count` wrong classes with the largest logits, or all, in that order: [N, min(count, C - 1)]."""
    return rivals(logits, y, min(count, logits.shape[1] - 1))


def random_direction(norm: str, x: Tensor, noise: Noise, stream: int) -> Tensor:
    """A direction of length 1 under `norm` for each image: uniform in the cube under Linf, else Gaussian; scaled."""
    shape, dtype = x.shape[1:], _at_least_float32(x)
    direction = 2 * noise.uniform(stream, shape, dtype) - 1 if norm == "Linf" else noise.normal(stream, shape, dtype)
    order = {"Linf": torch.inf, "L2": 2.0, "L1": 1.0}[norm]
    return (direction / per_row(torch.linalg.vector_norm(direction.flatten(1), order, dim=1), x)).to(x.dtype)


def random_start(ball: Ball, x: Tensor, noise: Noise, stream: int) -> Tensor:
    """Where a run of `APGD` starts: see `restarts` there."""
    if ball.norm == "L1":
        return ball.project(x + noise.normal(stream, x.shape[1:], _at_least_float32(x)).to(x.dtype), x)
    return ball.project(x + ball.epsilon * random_direction(ball.norm, x, noise, stream), x)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _clean(problem: Problem, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The result to begin with, the images themselves, and the rows that are not a success already."""
    logits = problem.logits(problem.x) if logits is None else logits
    return problem.x.clone(), (~problem.fooled(problem.x, logits)).nonzero().squeeze(1)


def _record(result: Tensor, active: Tensor, found: Climb) -> Tensor:
    """Note the successes of the rows `active` in the result; the rows that are left."""
    result[active[found.found]] = found.success[found.found]
    return active[~found.found]

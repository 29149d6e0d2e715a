"""Projected gradient descent and its relatives: BIM, MI-FGSM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from emr_training.attacks.base import BoundedAttack, check_choice, per_row
from emr_training.attacks.graphed import run_as_graph
from emr_training.attacks.losses import LOSSES, Loss, divergence, find_loss
from emr_training.attacks.problem import Problem
from emr_training.errors import check_count, check_number


@dataclass(frozen=True)
class PGD(BoundedAttack):
    """x <- P(x + step), P the projection on ball and box; Madry et al. 2018.

    The step is step_size * sign(gradient) under Linf, step_size * gradient / ||gradient||_2 under L2, and under L1
    step_size shared evenly by the `fraction` of the pixels with the largest gradients (Tramer and Boneh 2019), of those
    that can move that way in the box.

    steps, step_size: None is 2.5 * epsilon / steps.
    loss: "ce", "cw" (the margin of Carlini and Wagner), "dlr", or "kl" (TRADES's: the divergence from the clean image's
        softmax; it needs a random start and has no targeted form).
    random_start: uniform in the ball; with start_std a Gaussian of that standard deviation (TRADES and MART: 0.001),
        which with keep "last" may lie outside of ball and box, as there: the first step brings it in.
    restarts: independent runs.
    keep: which point of a path is returned.

        - "best": the first success of any restart (such a sample is attacked no further), else the point of greatest
          loss, the clean image included. For evaluation: more restarts, and more steps of the same size, are never
          weaker.
        - "last": the end point (of several restarts, the one of greatest loss). For adversarial training.

    graph: capture the whole loop of keep "last" in a CUDA graph for each shape of batch, and replay it: one launch
        instead of hundreds. Where that cannot be (on the CPU, for a model that is not linearized) it runs as without.

    Raises ValueError or TypeError for a value out of range; see `Attack` for the call.
    """

    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    start_std: float | None = None
    loss: Literal["ce", "cw", "dlr", "kl"] = "ce"
    fraction: float = 0.01
    momentum: float = 0.0
    keep: Literal["best", "last"] = "best"
    graph: bool = False

    targetable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0.0)
        if self.start_std is not None:
            check_number("start_std", self.start_std, low=0.0)
        check_number("fraction", self.fraction, low=0.0, high=1.0)
        check_number("momentum", self.momentum, low=0.0)
        check_choice("keep", self.keep, ("best", "last"))
        check_choice("loss", self.loss, (*LOSSES, "kl"))
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts is {self.restarts} without random_start; expected 1, as all would be the same")
        if self.loss == "kl" and not self.random_start:
            raise ValueError("loss is 'kl' without random_start; expected a random start, as its gradient is 0 at x")

    @property
    def step(self) -> float:
        """The step size in use, in units of the [0, 1] pixel range."""
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        if self.loss == "kl" and problem.target is not None:
            raise ValueError("target is given with loss 'kl'; expected 'ce', 'cw' or 'dlr' for a targeted attack")
        return (self._best if self.keep == "best" else self._last)(problem)

    def _loss(self, clean: Tensor | None) -> Loss:
        if self.loss != "kl":
            return find_loss(self.loss, self.bn_mode)
        assert clean is not None
        return divergence(clean)

    def _start(self, problem: Problem) -> Tensor:
        x = problem.x
        if not self.random_start:
            return x
        if self.start_std is None:
            return self.ball.start(x, problem.generator)
        noise = torch.empty_like(x).normal_(0.0, self.start_std, generator=problem.generator)
        # With keep "best" the start may be what is returned.
        return self.ball.project(x + noise, x) if self.keep == "best" else x + noise

    def _moved(self, point: Tensor, x: Tensor, gradient: Tensor, out: Tensor | None = None) -> Tensor:
        gradient = self.ball.open_to(point, gradient)
        return self.ball.step(point, x, gradient, self.step, fraction=self.fraction, out=out)

    def _direction(self, velocity: Tensor | None, gradient: Tensor) -> Tensor:
        """The gradient, or with momentum mu MI-FGSM's velocity mu * velocity + gradient / mean |gradient|."""
        if self.momentum == 0:
            return gradient
        scale = gradient.abs().flatten(1).mean(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        unit = gradient / per_row(scale, gradient)
        return unit if velocity is None else velocity.mul_(self.momentum).add_(unit)

    def _last(self, problem: Problem) -> Tensor:
        x = problem.x
        best, best_value = x, None
        for _ in range(self.restarts):
            start = self._start(problem)
            found = run_as_graph(self, problem, start, self._loop) if self.graph else None
            point = self._loop(problem, start) if found is None else found
            if self.restarts == 1:
                return point
            loss = self._loss(problem.logits(x) if self.loss == "kl" else None)
            value, _ = loss(problem.logits(point), problem.y, problem.target)
            if best_value is None:
                best, best_value = point, value
            else:
                best = torch.where(per_row(value > best_value, point), point, best)
                best_value = torch.maximum(best_value, value)
        return best

    def _loop(self, problem: Problem, point: Tensor) -> Tensor:
        loss = self._loss(problem.logits(problem.x) if self.loss == "kl" else None)
        x, start, velocity = problem.x, point, None
        for _ in range(self.steps):
            _, _, gradient = problem.ascend(point, loss)
            velocity = self._direction(velocity, gradient)
            point = self._moved(point, x, velocity, out=None if point is start else point)
        return point

    def _best(self, problem: Problem) -> Tensor:
        clean = problem.logits(problem.x)
        loss = self._loss(clean)
        best = problem.x.clone()
        best_value, _ = loss(clean, problem.y, problem.target)
        active = (~problem.fooled(problem.x, clean)).nonzero().squeeze(1)  # no point has succeeded so far
        for _ in range(self.restarts):
            # Drawn for all samples, so that one sample's start does not depend on which others are left.
            start = self._start(problem)
            if active.numel() == 0:
                break
            left, point, velocity = problem.subset(active), start[active], None
            loss = self._loss(clean[active])
            for step in range(self.steps + 1):
                if step < self.steps:
                    logits, value, gradient = left.ascend(point, loss)
                else:
                    logits = left.logits(point)
                    value, _ = loss(logits, left.y, left.target)
                fooled = left.fooled(point, logits)
                update = fooled | (value > best_value[active])
                best[active[update]] = point[update]
                best_value[active[update]] = value[update]
                if bool(fooled.any()):
                    stays = (~fooled).nonzero().squeeze(1)
                    active, left, point = active[stays], left.subset(stays), point[stays]
                    if active.numel() == 0:
                        break
                    loss = self._loss(clean[active])
                    velocity = None if velocity is None else velocity[stays]
                    if step < self.steps:
                        gradient = gradient[stays]
                if step < self.steps:
                    velocity = self._direction(velocity, gradient)
                    point = self._moved(point, left.x, velocity)
        return best


@dataclass(frozen=True)
class BIM(PGD):
    """The basic iterative method: PGD from the clean image itself; Kurakin et al. 2017."""

    random_start: bool = False


@dataclass(frozen=True)
class MIFGSM(PGD):
    """PGD along an accumulated direction, g <- momentum * g + gradient / mean |gradient|; Dong et al. 2018.

    From the clean image; step_size None is epsilon / steps, as there.
    """

    random_start: bool = False
    momentum: float = 1.0

    @property
    def step(self) -> float:
        """The step size in use, in units of the [0, 1] pixel range."""
        return self.epsilon / self.steps if self.step_size is None else self.step_size

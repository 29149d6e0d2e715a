"""The climb of Auto-PGD: its loop, and the two ways it moves and adapts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from emr_training.attacks.balls import Ball
from emr_training.attacks.base import per_row
from emr_training.attacks.losses import Loss
from emr_training.attacks.problem import Problem

#: How much of a step of the momentum form is the new direction; the rest is the last one.
MOMENTUM_SHARE = 0.75


def checkpoints(steps: int) -> list[int]:
    """After which iterations Auto-PGD adapts: intervals of 22% of the steps, each 3% shorter, down to 6%."""
    interval, shorter, least = (max(int(share * steps), 1) for share in (0.22, 0.03, 0.06))
    places = []
    place = interval
    while place <= steps:
        places.append(place)
        interval = max(interval - shorter, least)
        place += interval
    return places


@dataclass
class State:
    """Where the climbs of the images `rows` are.

    `rises` counts the iterations in which the loss rose since the strategy reset it; `own` holds what else the strategy
    keeps for each image.
    """

    rows: Tensor
    problem: Problem
    goal: Tensor | None
    point: Tensor
    previous: Tensor
    value: Tensor
    gradient: Tensor
    best: Tensor
    best_value: Tensor
    best_gradient: Tensor
    rises: Tensor
    own: dict[str, Tensor] = field(default_factory=dict)

    def keep(self, stays: Tensor) -> None:
        """Drop all images but these (indices)."""
        for name, entry in vars(self).items():
            if isinstance(entry, Tensor):
                setattr(self, name, entry[stays])
        self.problem = self.problem.subset(stays)
        self.own = {name: entry[stays] for name, entry in self.own.items()}

    def observe(self, value: Tensor, gradient: Tensor | None) -> None:
        """Note loss and gradient at the point; the last of a climb comes without a gradient."""
        self.rises = self.rises + (value > self.value)
        better = value > self.best_value
        self.best_value = torch.where(better, value, self.best_value)
        mask = per_row(better, self.point)
        self.best = torch.where(mask, self.point, self.best)
        self.value = value
        if gradient is not None:
            self.best_gradient = torch.where(mask, gradient, self.best_gradient)
            self.gradient = gradient

    def back_to_best(self, rows: Tensor) -> None:
        """Go on from the best point where `rows` [N] says."""
        mask = per_row(rows, self.point)
        self.point = torch.where(mask, self.best, self.point)
        self.gradient = torch.where(mask, self.best_gradient, self.gradient)


class Strategy(ABC):
    """How a climb moves and adapts within a ball."""

    def __init__(self, ball: Ball, adapts_after: list[int]) -> None:
        self.ball = ball
        self.adapts_after = frozenset(adapts_after)

    @abstractmethod
    def begin(self, state: State, started: bool) -> None:
        """Set `state.own` up; `started`: the start is the end of an earlier climb, not random."""

    @abstractmethod
    def moved(self, state: State, first: bool) -> Tensor:
        """The next point."""

    @abstractmethod
    def adapt(self, state: State, iteration: int) -> None:
        """What happens at the checkpoint after this iteration."""


class Momentum(Strategy):
    """Under Linf and L2: steps of 2 epsilon with momentum; a step that does not pay is halved (Croce and Hein 2020).

    At a checkpoint an image's step is halved, and its climb goes on from its best point, if the loss rose in at most
    the part `rho` of the iterations since the last one; or if then the step was not halved and the best loss has not
    improved since.
    """

    def __init__(self, ball: Ball, steps: int, rho: float) -> None:
        places = checkpoints(steps)
        super().__init__(ball, places)
        self.rho = rho
        self.windows = {place: place - before for before, place in zip([0, *places], places, strict=False)}

    def begin(self, state: State, started: bool) -> None:
        best = state.best_value
        state.own = {
            "step": torch.full_like(best, 2 * self.ball.epsilon, dtype=state.point.dtype),
            # True at first, so that the second condition waits for the second checkpoint.
            "halved": torch.ones_like(best, dtype=torch.bool),
            "best_then": best,
        }

    def moved(self, state: State, first: bool) -> Tensor:
        x, point = state.problem.x, state.point
        moved = self.ball.step(point, x, state.gradient, state.own["step"])
        if first:
            return moved
        mixed = point + MOMENTUM_SHARE * (moved - point) + (1 - MOMENTUM_SHARE) * (point - state.previous)
        return self.ball.project(mixed, x)

    def adapt(self, state: State, iteration: int) -> None:
        own = state.own
        oscillates = state.rises <= self.rho * self.windows[iteration]
        stuck = ~own["halved"] & (own["best_then"] >= state.best_value)
        halve = oscillates | stuck
        state.own = {
            "step": torch.where(halve, own["step"] / 2, own["step"]),
            "halved": halve,
            "best_then": state.best_value,
        }
        state.rises = torch.zeros_like(state.rises)
        state.back_to_best(halve)


class Sparse(Strategy):
    """Under L1: steps along the signs of the largest gradients (Croce and Hein 2021).

    The step, epsilon at first, is shared by a part of the pixels: 20% of them, at checkpoints (every 4% of the steps)
    then 1 / 1.5 of those in which the best point differs from the image. If they have become fewer by 5% or more the
    step is epsilon again and the climb goes on from the best point, else the step is divided by 1.5, down to
    epsilon / 10.
    """

    def __init__(self, ball: Ball, steps: int) -> None:
        every = max(int(0.04 * steps), 1)
        super().__init__(ball, list(range(every, steps + 1, every)))

    @staticmethod
    def _nonzero(point: Tensor, x: Tensor) -> Tensor:
        """How many pixels differ, [N]."""
        return (point != x).flatten(1).sum(1).to(point.dtype)

    def _fraction(self, nonzero: Tensor, x: Tensor) -> Tensor:
        # The nearest whole number of pixels: rounded up, two pixels would stay two for ever.
        return (((nonzero / 1.5).round() + 0.5) / x[0].numel()).clamp_max(1.0)

    def begin(self, state: State, started: bool) -> None:
        x = state.problem.x
        everywhere = torch.full_like(state.best_value, x[0].numel(), dtype=x.dtype)
        nonzero = self._nonzero(state.point, x) if started else everywhere
        state.own = {
            "step": torch.full_like(nonzero, self.ball.epsilon),
            "fraction": self._fraction(nonzero, x) if started else torch.full_like(nonzero, 0.2),
            "nonzero": nonzero,
        }

    def moved(self, state: State, first: bool) -> Tensor:
        own = state.own
        return self.ball.step(state.point, state.problem.x, state.gradient, own["step"], fraction=own["fraction"])

    def adapt(self, state: State, iteration: int) -> None:
        own, epsilon = state.own, self.ball.epsilon
        nonzero = self._nonzero(state.best, state.problem.x)
        sparser = nonzero < 0.95 * own["nonzero"]
        state.own = {
            "step": torch.where(sparser, epsilon, (own["step"] / 1.5).clamp_min(epsilon / 10)),
            "fraction": self._fraction(nonzero, state.problem.x),
            "nonzero": nonzero,
        }
        state.back_to_best(sparser)


class Climb(NamedTuple):
    """What a climb found for N images: whether it succeeded [N], its success, its point of greatest loss, that loss."""

    found: Tensor
    success: Tensor
    best: Tensor
    best_value: Tensor


def climb(
    problem: Problem,
    start: Tensor,
    strategy: Strategy,
    loss: Loss,
    steps: int,
    *,
    goal: Tensor | None = None,
    eot: int = 1,
    stop: bool = True,
    started: bool = False,
) -> Climb:
    """Climb the loss from `start` [N, ...] in `steps` iterations.

    Args:
        goal: [N], classes towards which the loss is climbed although any success counts.
        eot: forward passes that loss and gradient are the mean of; whether a point succeeds is read from the last one.
        stop: leave an image at its first success. Else all climb to the end, and the last success is returned.
        started: `start` is where an earlier climb ended.
    """
    found = torch.zeros_like(problem.y, dtype=torch.bool)
    success, best = problem.x.clone(), problem.x.clone()
    best_value = torch.full((len(problem),), -torch.inf, device=problem.x.device, dtype=problem.x.dtype)
    state: State | None = None
    point, rows, here = start, torch.arange(len(problem), device=problem.x.device), problem
    for iteration in range(steps + 1):
        aim = here if goal is None else here.with_target(goal)
        logits, value, gradient = evaluated(aim, point, loss, eot, last=iteration == steps)
        value = value.to(best_value.dtype).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        fooled = here.fooled(point, logits)
        if state is None:
            assert gradient is not None or steps == 0
            slope = torch.zeros_like(point) if gradient is None else gradient
            state = State(rows, problem, goal, point, point, value, slope, point, value, slope, torch.zeros_like(rows))
            strategy.begin(state, started)
        else:
            state.previous, state.point = state.point, point
            state.observe(value, gradient)
        hit = fooled.nonzero().squeeze(1)
        if hit.numel():
            found[state.rows[hit]] = True
            success[state.rows[hit]] = point[hit]
            if stop:
                state.keep((~fooled).nonzero().squeeze(1))
                here, goal = state.problem, state.goal
                if state.rows.numel() == 0:
                    break
        if iteration < steps:
            if iteration in strategy.adapts_after:
                strategy.adapt(state, iteration)
            point = strategy.moved(state, first=iteration == 0)
    assert state is not None
    best[state.rows], best_value[state.rows] = state.best, state.best_value
    return Climb(found, success, best, best_value)


def evaluated(aim: Problem, point: Tensor, loss: Loss, eot: int, last: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits of the last of `eot` forward passes, mean loss, and mean gradient (None: not wanted of the last point)."""
    values, gradients = [], []
    for _ in range(eot):
        if last:
            logits = aim.logits(point)
            value, _ = loss(logits, aim.y, aim.target)
        else:
            logits, value, gradient = aim.ascend(point, loss)
            gradients.append(gradient)
        values.append(value)
    mean = values[0] if eot == 1 else torch.stack(values).mean(0)
    if last:
        return logits, mean, None
    return logits, mean, gradients[0] if eot == 1 else torch.stack(gradients).mean(0)

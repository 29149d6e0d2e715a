"""FAB: the least adversarial perturbation, by steps onto the linearized decision boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from emr_training.attacks.apgd import likeliest_wrong, random_direction
from emr_training.attacks.balls import Ball, Norm, check_in_box, check_norm, distance
from emr_training.attacks.base import Attack, per_row
from emr_training.attacks.classifier import At
from emr_training.attacks.hyperplanes import to_hyperplane
from emr_training.attacks.noise import Noise
from emr_training.attacks.problem import Problem
from emr_training.errors import check_count, check_number

_DUAL = {"Linf": 1.0, "L2": 2.0, "L1": torch.inf}


@dataclass(frozen=True)
class FAB(Attack):
    """Fast adaptive boundary attack; Croce and Hein 2020, in AutoAttack's version, without the final line search.

    In each step the boundary to the nearest wrong class (nearest to first order) is linearized at the point, and the
    point and the image are projected on it within the box; the next point is a mixture of both, a little beyond. From a
    misclassified point the search goes on nearer to the image.

    epsilon: None: the nearest misclassified point found is returned, however far. A number: only one within epsilon
        counts, and the search for an image ends with the first; without one the image itself is returned.
    norm: "Linf", "L2" or "L1".
    steps: of a run, each with a backward pass for every wrong class.
    restarts: the first from the image, the others from a random point at half the distance found so far, at most
        epsilon / 2.
    alpha_max, eta, beta: the largest weight of the image's projection, the overshoot, and the part of the way from the
        image that is kept after a success.
    """

    epsilon: float | None = None
    norm: Norm = "Linf"
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    targetable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_norm(self.norm)
        if self.epsilon is not None:
            check_number("epsilon", self.epsilon, low=0.0)
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        check_number("alpha_max", self.alpha_max, low=0.0, high=1.0)
        check_number("eta", self.eta, low=1.0)
        check_number("beta", self.beta, low=0.0, high=1.0)

    def verify(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return x_adv; raise RuntimeError unless it is in [0, 1], and with an epsilon in the ball around x."""
        return check_in_box(x_adv) if self.epsilon is None else Ball(self.norm, self.epsilon).check(x_adv, x)

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        noise = problem.noise()
        clean = problem.logits(problem.x)
        goals = self._goals(clean, problem.y)
        found = _Found(problem, problem.fooled(problem.x, clean), self.norm, self.epsilon)
        for run in range(len(goals) * self.restarts):
            rows = found.left()
            if rows.numel() == 0:
                break
            part = problem.subset(rows)
            goal = goals[run // self.restarts]
            start = part.x
            if run % self.restarts > 0:
                start = self._random_start(part.x, noise.subset(rows), run, found.distance[rows])
            self._run(part, rows, start, None if goal is None else goal[rows], found)
        return found.point

    def _goals(self, clean: Tensor, y: Tensor) -> list[Tensor | None]:
        """A class [N] for each group of runs; None: the nearest one at each step."""
        return [None]

    def _random_start(self, x: Tensor, noise: Noise, stream: int, found: Tensor) -> Tensor:
        """A random direction's point at half of the smallest distance known; without any, half of the box's size."""
        pixels = x[0].numel()
        largest = {"Linf": 1.0, "L2": pixels**0.5, "L1": float(pixels)}[self.norm]
        radius = found.clamp_max(largest if self.epsilon is None else self.epsilon) / 2
        direction = random_direction(self.norm, x, noise, stream)
        return (x + direction * per_row(radius.to(x.dtype), x)).clamp(0, 1)

    def _run(self, problem: Problem, rows: Tensor, point: Tensor, goal: Tensor | None, found: _Found) -> None:
        """One run on the images `rows`; what it finds goes into `found`."""
        for _ in range(self.steps):
            at = problem.linearized(point)
            gap, w = self._boundary(problem, at, goal)
            point = self._stepped(problem.x, point, gap, w)
            logits = problem.logits(point)
            fooled = problem.judged(logits)
            if not bool(fooled.any()):
                continue
            found.note(problem, rows, point, logits, fooled)
            back = problem.x + self.beta * (point - problem.x)
            point = torch.where(per_row(fooled, point), back, point)
            if self.epsilon is not None:
                stays = (found.distance[rows] > self.epsilon).nonzero().squeeze(1)
                if stays.numel() == 0:
                    return
                if stays.numel() < rows.numel():
                    rows, point, problem = rows[stays], point[stays], problem.subset(stays)
                    goal = None if goal is None else goal[stays]

    def _boundary(self, problem: Problem, at: At, goal: Tensor | None) -> tuple[Tensor, Tensor]:
        """z_l - z_y [n] and its gradient [n, D] for the goal l, or else for the nearest class to first order."""
        classes, y = at.logits.shape[1], problem.y
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for place in range(classes - 1 if goal is None else 1):
            # The classes in order, without the label.
            rival = place + (y <= place).long() if goal is None else goal
            seed = torch.zeros_like(at.logits).scatter_(1, rival[:, None], 1.0).scatter_(1, y[:, None], -1.0)
            w = at.vjp(seed).nan_to_num(nan=0.0).flatten(1).to(problem.x.dtype)
            problem.classifier.backwards += len(problem)
            # Not the product with the seed: a class that the model masks has the logit -inf.
            gap = (at.logits.gather(1, rival[:, None]) - at.logits.gather(1, y[:, None])).squeeze(1).to(problem.x.dtype)
            if goal is not None:
                return gap, w
            far = gap.abs() / (torch.linalg.vector_norm(w, _DUAL[self.norm], dim=1) + 1e-12)
            if best is None:
                best = far, gap, w
            else:
                nearer = far < best[0]
                best = (
                    torch.where(nearer, far, best[0]),
                    torch.where(nearer, gap, best[1]),
                    torch.where(nearer[:, None], w, best[2]),
                )
        assert best is not None
        return best[1], best[2]

    def _stepped(self, x: Tensor, point: Tensor, gap: Tensor, w: Tensor) -> Tensor:
        """The mixture of the two projections."""
        flat, origin = point.flatten(1), x.flatten(1)
        gap_at_x = gap + (w * (origin - flat)).sum(1)
        step, near = to_hyperplane(self.norm, flat, w, gap)
        step_from_x, far = to_hyperplane(self.norm, origin, w, gap_at_x)
        near, far = near.clamp_min(1e-8), far.clamp_min(1e-8)
        alpha = (near / (near + far)).clamp_max(self.alpha_max)[:, None]
        mixed = step.mul_(self.eta).add_(flat).lerp_(step_from_x.mul_(self.eta).add_(origin), alpha)
        return mixed.clamp_(0, 1).view_as(x)


@dataclass(frozen=True)
class FABT(FAB):
    """FAB towards one wrong class after another, one backward pass a step; any misclassification counts.

    n_targets: the likeliest wrong classes at the image, all of them if there are fewer.
    """

    n_targets: int = 9

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("n_targets", self.n_targets)

    def _goals(self, clean: Tensor, y: Tensor) -> list[Tensor | None]:
        return list(likeliest_wrong(clean, y, self.n_targets).unbind(1))


class _Found:
    """The nearest success so far: `point` like x, the image itself without one, and its `distance` [N] (inf).

    With an epsilon nothing farther away is looked at.
    """

    def __init__(self, problem: Problem, wrong: Tensor, norm: str, epsilon: float | None) -> None:
        self._norm, self._epsilon = norm, epsilon
        self.point = problem.x.clone()
        self.distance = torch.where(wrong, 0.0, torch.inf).to(torch.float64)

    def left(self) -> Tensor:
        """The images still worth a run."""
        return (self.distance > (self._epsilon or 0.0)).nonzero().squeeze(1)

    def note(self, problem: Problem, rows: Tensor, point: Tensor, logits: Tensor, taken: Tensor) -> None:
        """Keep, of the points of the images `rows` that the search takes for successes, the nearest that are some."""
        far = distance(self._norm, point, problem.x)
        nearer = taken & (far < self.distance[rows])
        if self._epsilon is not None:
            nearer &= far <= self._epsilon
        at = nearer.nonzero().squeeze(1)
        if at.numel():
            at = at[problem.subset(at).fooled(point[at], logits[at])]
            self.point[rows[at]], self.distance[rows[at]] = point[at], far[at]

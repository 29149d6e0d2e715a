"""DeepFool: the shortest way out of a class, by one linearization after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emr_kernels.directions import rivals
from emr_training.attacks.balls import check_norm
from emr_training.attacks.base import Attack, per_row
from emr_training.attacks.classifier import At
from emr_training.attacks.problem import Problem
from emr_training.errors import check_count, check_number

#: Added to the length of each step, as in the authors' code: near the boundary, and where the box takes a part of each
#: step away, lengths would shrink towards 0 before the class changes.
NUDGE = 1e-4


@dataclass(frozen=True)
class DeepFool(Attack):
    """Steps to the nearest decision boundary of the model linearized where it stands; Moosavi-Dezfooli et al. 2016.

    With w_k = grad z_k - grad z_y and f_k = z_k - z_y at the present point, the nearest rival k has the least
    |f_k| / ||w_k||_q. The step is (|f_k| / ||w_k||_2 + 1e-4) * w_k / ||w_k||_2 under L2 (q 2), and
    (|f_k| / ||w_k||_1 + 1e-4) * sign(w_k) under Linf (q 1). The next point is x + (1 + overshoot) * (sum of the steps
    so far), clamped to the box [0, 1], which the original ignores; and so on until the class changes.

    y are the true labels; as images that are misclassified already are returned unchanged, they are the predicted
    classes of the others. An image without success is returned unchanged, too.

    steps: linearizations at most.
    overshoot: part of the perturbation that is added to cross the boundary.
    num_classes: how many classes are looked at, those of the largest logits of the clean image, its own among them.
    norm: "L2" or "Linf", in which the path is short.
    """

    steps: int = 50
    overshoot: float = 0.02
    num_classes: int = 10
    norm: Literal["L2", "Linf"] = "L2"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("num_classes", self.num_classes, low=2)
        check_number("overshoot", self.overshoot, low=0.0)
        check_norm(self.norm, ("L2", "Linf"))

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        found = problem.x.clone()
        at: At = problem.linearized(problem.x)
        clean = problem.fooled(problem.x, at.logits)
        count = min(self.num_classes, at.logits.shape[1]) - 1
        path = _Paths(problem, rivals(at.logits, problem.y, count))
        at = path.keep((~clean).nonzero().squeeze(1), at)
        for _ in range(self.steps):
            if path.rows.numel() == 0:
                break
            path.total += self._step(at, path)
            path.point = (path.problem.x + (1 + self.overshoot) * path.total).clamp(0, 1)
            at = path.problem.linearized(path.point)
            arrived = path.problem.fooled(path.point, at.logits)
            hit = arrived.nonzero().squeeze(1)
            if hit.numel():
                found[path.rows[hit]] = path.point[hit]
                at = path.keep((~arrived).nonzero().squeeze(1), at)
        return found

    def _step(self, at: At, path: _Paths) -> Tensor:
        """To the nearest boundary of the linearized model, [n, ...]; 0 where no rival has a gradient."""
        y, x = path.problem.y[:, None], path.problem.x
        order, shortest = (1 if self.norm == "Linf" else 2), torch.full_like(path.problem.y, torch.inf, dtype=x.dtype)
        step, logits = torch.zeros_like(x), at.logits.to(x.dtype)
        for rival in path.rivals.unbind(1):
            seed = torch.zeros_like(at.logits).scatter_(1, y, -1.0).scatter_(1, rival[:, None], 1.0)
            path.problem.classifier.backwards += len(x)
            slope = at.vjp(seed).nan_to_num(nan=0.0)
            gap = (logits.gather(1, rival[:, None]) - logits.gather(1, y)).squeeze(1).abs()
            norm = torch.linalg.vector_norm(slope.flatten(1), order, dim=1)
            length = gap / norm
            nearer = length < shortest  # never where the slope is 0: there it is infinite or NaN
            shortest = torch.where(nearer, length, shortest)
            if order == 1:
                move = per_row(length + NUDGE, x) * slope.sign()
            else:
                move = per_row((length + NUDGE) / norm, x) * slope
            step = torch.where(per_row(nearer, x), move, step)
        return step


class _Paths:
    """Where the paths of the images `rows` are.

    Attributes:
        rivals: classes [n, K] whose boundaries are looked at.
        total: sum of the steps so far, [n, ...].
    """

    def __init__(self, problem: Problem, rivals: Tensor) -> None:
        self.problem, self.rivals = problem, rivals
        self.rows = torch.arange(len(problem), device=problem.x.device)
        self.point, self.total = problem.x, torch.zeros_like(problem.x)

    def keep(self, stays: Tensor, at: At) -> At:
        """Drop all paths but these (indices); the linearization of those left, given that of all."""
        count = len(self.rows)
        if stays.numel() == count:
            return at
        self.problem = self.problem.subset(stays)
        for name in ("rows", "rivals", "point", "total"):
            setattr(self, name, getattr(self, name)[stays])
        if stays.numel() and stays.numel() < (count - stays.numel()) * self.rivals.shape[1]:
            # One more forward for those left costs less than backward passes for the others.
            return self.problem.linearized(self.point)
        return _Part(at, stays)


class _Part:
    """`At` for some rows of a batch."""

    def __init__(self, at: At, rows: Tensor) -> None:
        self._at, self._rows, self._shape = at, rows, at.logits.shape
        self.logits = at.logits[rows]

    def vjp(self, seed: Tensor) -> Tensor:
        return self._at.vjp(seed.new_zeros(self._shape).index_copy_(0, self._rows, seed))[self._rows]

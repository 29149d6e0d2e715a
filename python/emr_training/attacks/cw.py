"""The attack of Carlini and Wagner: the least perturbation, by optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from emr_training.attacks.base import Attack, per_row
from emr_training.attacks.losses import margin
from emr_training.attacks.problem import Problem
from emr_training.errors import check_count, check_number

#: Images are drawn towards 1/2 by this factor, so that black and white have a finite artanh; the authors' number.
_SHRINK = 0.999999
#: A loss has to fall below this part of what it was, or its run ends; the authors' number.
_PROGRESS = 0.9999
#: With so many runs or more the last tries the upper bound of c itself, as in the authors' code.
_RUNS_TO_END_AT_THE_BOUND = 10
_BETA1, _BETA2, _TINY = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class CarliniWagner(Attack):
    """Minimises ||x_adv - x||_2^2 + c * max(z_y - max over j != y of z_j + kappa, 0); Carlini and Wagner 2017, L2.

    With a target t the second term is c * max(max over j != t of z_j - z_t + kappa, 0). Adam moves w, where
    x_adv = (1 + tanh(w)) / 2, from the image itself, in runs that differ in c: after a run that found a success, c is
    an upper bound, after one that did not, a lower bound, and the next c is halfway between both, or ten times as large
    while there is no upper bound. The result is the success of least distance. An image without one is returned
    unchanged, and so is one that is a success by `kappa` to begin with.

    Each image has a c and a clock of its own, so that its result does not depend on the batch: `abort_early` ends its
    run when its own loss has not fallen by 0.01% in a tenth of the steps, and the next begins at once. (The authors'
    code looks at the sum over the batch.)

    steps: of a run, at most.
    kappa: by how much the logits of a success have to win.
    learning_rate: Adam's.
    runs: how many values of c are tried; of ten or more the last is the upper bound.
    c: the first of them.
    """

    steps: int = 1000
    kappa: float = 0.0
    learning_rate: float = 0.01
    runs: int = 9
    c: float = 1e-3
    abort_early: bool = True

    targetable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("steps", self.steps)
        check_count("runs", self.runs)
        for name in ("kappa", "learning_rate", "c"):
            check_number(name, getattr(self, name), low=0.0)
        if self.c == 0:
            raise ValueError("c is 0; expected a number > 0, as it is found by factors of 10")

    def search(self, problem: Problem) -> Tensor:
        """See `Attack`."""
        logits = problem.logits(problem.x)
        value, _ = margin(logits, problem.y, problem.target)
        done = problem.fooled(problem.x, logits) & (value >= self.kappa)
        rows = (~done).nonzero().squeeze(1)
        best = problem.x.clone()
        if rows.numel() == 0:
            return best
        runs = _Runs(rows, problem.subset(rows), self.c)
        while runs.rows.numel():
            better, point, loss = runs.look(self.kappa)
            best[runs.rows[better]] = point[better]
            ended = self._ended(runs, loss)
            runs.descend(self.learning_rate)
            if bool(ended.any()):
                runs.restart(ended, last=self.runs - 1 if self.runs >= _RUNS_TO_END_AT_THE_BOUND else None)
                runs.keep((runs.count < self.runs).nonzero().squeeze(1))
        return best

    def _ended(self, runs: _Runs, loss: Tensor) -> Tensor:
        """Which runs take their last step now, [n]."""
        ended = runs.clock + 1 >= self.steps
        if self.abort_early:
            due = runs.clock % max(self.steps // 10, 1) == 0
            ended |= due & (loss > _PROGRESS * runs.loss_then)
            runs.loss_then = torch.where(due, loss, runs.loss_then)
        return ended


class _Runs:
    """Where the runs of the images `rows` are, [n] or [n, ...] each.

    Attributes:
        origin: w of the image; move: what Adam has added; first, second, slope: its moments, and the gradient.
        clock: steps of the present run; count: runs before it.
        c, lower, upper: the weight and its bounds.
        hit: whether the present run has had a success; nearest: least squared distance of a success in any run.
        loss_then: where the loss was looked at last.
    """

    def __init__(self, rows: Tensor, problem: Problem, c: float) -> None:
        # In half precision black and white would have an infinite w.
        self.x = problem.x.to(torch.promote_types(problem.x.dtype, torch.float32))
        self.rows, self.problem = rows, problem
        self.origin = (_SHRINK * (2 * self.x - 1)).atanh()
        self.move, self.first, self.second, self.slope = (torch.zeros_like(self.x) for _ in range(4))
        self.clock, self.count = torch.zeros_like(rows), torch.zeros_like(rows)
        self.c = torch.full_like(rows, c, dtype=self.x.dtype)
        self.lower, self.upper = torch.zeros_like(self.c), torch.full_like(self.c, torch.inf)
        self.hit, self.nearest = torch.zeros_like(rows, dtype=torch.bool), self.upper.clone()
        self.loss_then = self.upper.clone()

    def look(self, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
        """Which points are the best success so far (indices), the points [n, ...] and their loss [n]."""
        tanh = (self.origin + self.move).tanh()
        wide = (1 + tanh) / 2
        point = wide.to(self.problem.x.dtype)
        logits, value, slope = self.problem.ascend(point, margin)
        value = value.to(wide.dtype)
        success = self.problem.judged(logits) & (value >= kappa)
        nearer = success & ((wide - self.x).flatten(1).square().sum(1) < self.nearest)
        better, refuted = nearer.nonzero().squeeze(1), nearer
        if better.numel():
            better = better[self.problem.subset(better).fooled(point[better], logits[better])]
            self.nearest[better] = (wide[better] - self.x[better]).flatten(1).square().sum(1)
            refuted = nearer.index_fill(0, better, False)
        # What would not be better needs no confirmation: another success stands already.
        self.hit |= success & ~nearer
        self.hit[better] = True
        # Measured from the shrunk image, so that the first step has a gradient of misclassification alone.
        change = wide - (1 + self.origin.tanh()) / 2
        short = kappa - value
        # On towards the other class, too, where the search alone takes the point for a success.
        pull = torch.where((short > 0) | refuted, self.c, 0)
        self.slope = (2 * change - per_row(pull, change) * slope) * (1 - tanh.square()) / 2
        return better, point, change.flatten(1).square().sum(1) + self.c * short.clamp_min(0)

    def descend(self, learning_rate: float) -> None:
        """A step of Adam."""
        self.clock += 1
        self.first.lerp_(self.slope, 1 - _BETA1)
        self.second.lerp_(self.slope.square(), 1 - _BETA2)
        clock = per_row(self.clock.to(self.x.dtype), self.x)
        scale = (self.second / (1 - _BETA2**clock)).sqrt_().add_(_TINY)
        self.move -= learning_rate * (self.first / (1 - _BETA1**clock)) / scale

    def restart(self, ended: Tensor, last: int | None) -> None:
        """Settle the runs that have `ended` [n], and begin the next; run number `last` tries the upper bound."""
        hit, miss = ended & self.hit, ended & ~self.hit
        self.upper = torch.where(hit, torch.minimum(self.upper, self.c), self.upper)
        self.lower = torch.where(miss, torch.maximum(self.lower, self.c), self.lower)
        bounded = self.upper < torch.inf
        following = torch.where(bounded, (self.lower + self.upper) / 2, 10 * self.c)
        self.count += ended
        if last is not None:
            following = torch.where(bounded & (self.count == last), self.upper, following)
        self.c = torch.where(ended, following, self.c)
        for state in (self.move, self.first, self.second):
            state.masked_fill_(per_row(ended, state), 0)
        self.clock.masked_fill_(ended, 0)
        self.hit &= ~ended
        self.loss_then.masked_fill_(ended, torch.inf)

    def keep(self, stays: Tensor) -> None:
        """Drop all images but these (indices)."""
        if stays.numel() == self.rows.numel():
            return
        for name, state in vars(self).items():
            if isinstance(state, Tensor):
                setattr(self, name, state[stays])
        self.problem = self.problem.subset(stays)

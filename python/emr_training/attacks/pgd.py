"""Projected gradient descent in the Linf ball."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from emr_kernels.ops import pgd_step
from emr_training.attacks.base import Model, check_in_ball, objective, objective_seed
from emr_training.errors import check_count, check_images, check_logits, check_number, nearest
from emr_training.guard import left_as_found


@dataclass(frozen=True)
class PGD:
    """Untargeted Linf PGD on cross-entropy: x <- clip(x + step_size * sign(gradient)) to ball and box.

    Source: Madry et al. 2018. `epsilon` and `step_size` are in units of the [0, 1] pixel range; step_size
    None is 2.5 * epsilon / steps. A random start is uniform in the ball. `keep` says which point of a path
    is returned:

    - "best": the first misclassified point of any restart (such a sample is attacked no further), else the
      point of greatest cross-entropy, the clean image included. For evaluation: more steps or restarts are
      never weaker.
    - "last": the end point (of several restarts, the one of greatest cross-entropy). For adversarial
      training.

    Raises ValueError or TypeError for a value out of range, an x outside [0, 1] or a label out of range.
    """

    epsilon: float
    steps: int = 10
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    keep: Literal["best", "last"] = "best"
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("epsilon", self.epsilon, low=0.0)
        check_count("steps", self.steps)
        check_count("restarts", self.restarts)
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0.0)
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep is {self.keep!r}; {nearest(str(self.keep), ['best', 'last'])}")
        if self.restarts > 1 and not self.random_start:
            raise ValueError(f"restarts is {self.restarts} without random_start; expected 1, as all would be the same")

    @property
    def step(self) -> float:
        """The step size in use, in units of the [0, 1] pixel range."""
        return 2.5 * self.epsilon / self.steps if self.step_size is None else self.step_size

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Adversarial examples for images x [N, ...] in [0, 1] and labels y [N] (int64); see `Attack`."""
        check_images(x, y)
        if x.numel() == 0:
            return x.detach().clone()
        if generator is None:
            generator = torch.Generator(x.device).manual_seed(self.seed)
        with left_as_found(model, x.device):
            # Tensors made in inference mode cannot take part in autograd; copies made outside of it can.
            x, y = x.detach().clone(), y.clone()
            x_adv = (self._best if self.keep == "best" else self._last)(model, x, y, generator)
        return check_in_ball(x_adv, x, self.epsilon)

    def _start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        if not self.random_start:
            return x
        noise = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        start = (x + self.epsilon * (2 * noise - 1)).clamp(x - self.epsilon, x + self.epsilon)
        return start.clamp(0, 1)

    def _stepped(self, point: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        # A NaN in the gradient moves nothing, rather than spoil the point.
        return pgd_step(point, x, gradient.nan_to_num(0.0), self.step, self.epsilon)

    def _last(self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        best, best_value = x, None
        for restart in range(self.restarts):
            point = self._start(x, generator)
            for step in range(self.steps):
                _, gradient = ascent(model, point, y, check=restart == step == 0)
                point = self._stepped(point, x, gradient)
            if self.restarts == 1:
                return point
            with torch.no_grad():
                value = objective(model(point), y)
            if best_value is None:
                best, best_value = point, value
            else:
                better = value > best_value
                best = torch.where(_rows(better, point), point, best)
                best_value = torch.maximum(best_value, value)
        return best

    def _best(self, model: Model, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            logits = model(x)
        check_logits(logits, y)
        best = x.clone()
        best_value = objective(logits, y)
        active = (logits.argmax(1) == y).nonzero().squeeze(1)  # samples that no point has fooled so far
        for _ in range(self.restarts):
            # Noise for all samples, so that one sample's start does not depend on which others are left.
            start = self._start(x, generator)
            if active.numel() == 0:
                break
            point, origin, label = start[active], x[active], y[active]
            for step in range(self.steps + 1):
                logits, gradient = ascent(model, point, label)
                correct, value = logits.argmax(1) == label, objective(logits, label)
                update = ~correct | (value > best_value[active])
                best[active[update]] = point[update]
                best_value[active[update]] = value[update]
                if not bool(correct.all()):
                    active, point, label = active[correct], point[correct], label[correct]
                    origin, gradient = origin[correct], gradient[correct]
                    if active.numel() == 0:
                        break
                if step < self.steps:
                    point = self._stepped(point, origin, gradient)
        return best


def ascent(model: Model, point: Tensor, y: Tensor, check: bool = False) -> tuple[Tensor, Tensor]:
    """Detached logits [N, C] at `point` [N, ...], and cross-entropy's gradient up to positive factors."""
    point = point.detach().requires_grad_()
    logits = model(point)
    if check:
        check_logits(logits, y)
    (gradient,) = torch.autograd.grad(logits, point, objective_seed(logits.detach(), y))
    return logits.detach(), gradient


def _rows(mask: Tensor, like: Tensor) -> Tensor:
    """`mask` [N] shaped to broadcast over the rows of `like` [N, ...]."""
    return mask.view(-1, *[1] * (like.dim() - 1))

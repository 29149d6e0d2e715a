"""Penalties of how the loss changes around an image: finite differences, and local linearity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from emr_kernels.linearize.wrappers import evaluation_mode
from emr_kernels.slope import loss_slopes
from emr_training.attacks.balls import Ball
from emr_training.attacks.base import check_choice, per_row
from emr_training.errors import check_count, check_number
from emr_training.guard import left_as_found, logits_of


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = logits_of(model, x)
    return F.cross_entropy(logits.float() if x.dtype.itemsize < 4 else logits, y, reduction="none")


@dataclass
class FiniteDifference:
    """The squared slope of the loss along its own gradient, by a finite difference; Finlay & Oberman 2019.

    1/2 mean_i D_i^2 with D_i = (CE(x_i + h v_i) - CE(x_i)) / h, or (CE(x_i + h v_i) - CE(x_i - h v_i)) / 2h if
    `central`; with g_i the gradient of CE in x_i, held constant, v_i is

        norm "L2"    g_i / |g_i|_2
        norm "L1"    sign(g_i) / sqrt(d), d the number of pixels
        norm "Linf"  the sign of the largest |g_i|, at its pixel alone

    where `norm` is that of the gradient: "L1" for Linf attacks. The model is run in the mode it is in.
    """

    model: nn.Module
    strength: float
    norm: Literal["L2", "L1", "Linf"] = "L2"
    h: float = 1e-2
    central: bool = False
    name: str = "finite_difference"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0)
        check_choice("norm", self.norm, ("L2", "L1", "Linf"))
        check_number("h", self.h, low=0.0)
        if self.h == 0:
            raise ValueError("h is 0; expected a step > 0")

    def _direction(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten(1)
        if self.norm == "L2":
            direction = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True).clamp_min(1e-30)
        elif self.norm == "L1":
            direction = flat.sign() / flat.shape[1] ** 0.5
        else:
            place = flat.abs().argmax(1, keepdim=True)
            direction = torch.zeros_like(flat).scatter(1, place, flat.gather(1, place).sign())
        return direction.view_as(gradient)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The penalty at images x [N, ...] with labels y [N], a scalar without the strength."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            here = _losses(self.model, leaf, y)
            (gradient,) = torch.autograd.grad(here.sum(), leaf, retain_graph=not self.central)
        move = self.h * self._direction(gradient)
        ahead = _losses(self.model, x.detach() + move, y)
        if self.central:
            slope = (ahead - _losses(self.model, x.detach() - move, y)) / (2 * self.h)
        else:
            slope = (ahead - here) / self.h
        return 0.5 * slope.square().mean()


@dataclass
class LLR:
    """Local linearity regularisation: gamma + ratio * mean_i |d_i . grad CE(x_i)|; Qin et al. 2019.

    gamma = mean_i |CE(x_i + d_i) - CE(x_i) - d_i . grad CE(x_i)| at the d_i of the Linf ball of `epsilon` that makes it
    largest, found by `steps` of sign ascent (of step_size, None: epsilon / 2) from a uniform start. The paper's lambda
    is the strength, its mu strength * ratio (4 and 3 on CIFAR-10). All in evaluation mode, where each image has a loss
    of its own; without double backward where the model can be linearized.
    """

    model: nn.Module
    strength: float
    epsilon: float
    ratio: float = 0.75
    steps: int = 2
    step_size: float | None = None
    seed: int = 0
    name: str = "llr"

    def __post_init__(self) -> None:
        check_number("strength", self.strength, low=0.0)
        check_number("ratio", self.ratio, low=0.0)
        check_count("steps", self.steps)
        if self.step_size is not None:
            check_number("step_size", self.step_size, low=0.0)
        self._ball = Ball("Linf", self.epsilon)
        self._generator: torch.Generator | None = None

    def _worst(self, x: Tensor, y: Tensor) -> Tensor:
        """The point of the ball where the loss is farthest from linear."""
        if self._generator is None or self._generator.device != x.device:
            self._generator = torch.Generator(x.device).manual_seed(self.seed)
        with left_as_found(self.model, x.device):
            leaf = x.detach().clone().requires_grad_()
            here = _losses(self.model, leaf, y)
            (slope,) = torch.autograd.grad(here.sum(), leaf)
            point = self._ball.start(leaf.detach(), self._generator)
            for _ in range(self.steps):
                moved = point.detach().requires_grad_()
                there = _losses(self.model, moved, y)
                (gradient,) = torch.autograd.grad(there.sum(), moved)
                rise = ((point - x) * slope).flatten(1).sum(1)
                side = (there.detach() - here.detach() - rise).sign()
                ascent = per_row(side, x) * (gradient - slope)
                step_size = self.epsilon / 2 if self.step_size is None else self.step_size
                point = self._ball.step(point, x.detach(), ascent, step_size)
        return point

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """The penalty at images x [N, ...] with labels y [N], a scalar without the strength."""
        x = x.detach()
        point = self._worst(x, y)
        rise = loss_slopes(self.model, x, y, point - x)
        with evaluation_mode(self.model):
            gamma = (_losses(self.model, point, y) - _losses(self.model, x, y) - rise).abs()
        return (gamma + self.ratio * rise.abs()).mean()

"""The Lp balls that bounded attacks stay in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from emr_kernels.ops import pgd_start, pgd_step
from emr_training.errors import check_number, nearest

Norm = Literal["Linf", "L2", "L1"]
NORMS = ("Linf", "L2", "L1")


def check_norm(norm: str, among: tuple[str, ...] = NORMS) -> None:
    """Raise ValueError unless `norm` is one of these."""
    if norm not in among:
        raise ValueError(f"norm is {norm!r}; {nearest(str(norm), list(among))}")


def distance(norm: str, a: Tensor, b: Tensor) -> Tensor:
    """||a - b|| per sample, [N], computed in float64."""
    difference = (a.double() - b.double()).flatten(1)
    return torch.linalg.vector_norm(difference, {"Linf": torch.inf, "L2": 2, "L1": 1}[norm], dim=1)


@dataclass(frozen=True)
class Ball:
    """Images within `epsilon` of an image in `norm` ("Linf", "L2", "L1"), and in the box [0, 1]."""

    norm: Norm
    epsilon: float

    def __post_init__(self) -> None:
        check_norm(self.norm)
        check_number("epsilon", self.epsilon, low=0.0)

    def start(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """A point uniform in the ball around each image, clamped to the box."""
        seed = int(torch.randint(2**62, (1,), generator=generator, device=generator.device))
        return pgd_start(x, self.epsilon, self.norm.lower(), seed=seed)

    def step(
        self,
        point: Tensor,
        x: Tensor,
        gradient: Tensor,
        step_size: float | Tensor,
        *,
        fraction: float | Tensor = 0.01,
        out: Tensor | None = None,
    ) -> Tensor:
        """`point` moved by `step_size` (a number or [N]) along the gradient, back in ball and box; see `pgd_step`."""
        return pgd_step(point, x, gradient, step_size, self.epsilon, self.norm.lower(), fraction=fraction, out=out)

    def open_to(self, point: Tensor, gradient: Tensor) -> Tensor:
        """The gradient, under L1 without the pixels that it would move out of the box.

        There a step is that of the few pixels with the largest gradients: black and white ones would stay where they
        are, and no other would move in their place.
        """
        if self.norm != "L1":
            return gradient
        return gradient.masked_fill(((point >= 1) & (gradient > 0)) | ((point <= 0) & (gradient < 0)), 0.0)

    def project(self, point: Tensor, x: Tensor) -> Tensor:
        """The point brought back into the ball around x and into the box.

        The nearest point of both under Linf and L1; under L2 the ball first, then the box, which stays in the ball.
        """
        return self.step(point, x, torch.zeros_like(point), 0.0)

    def distance(self, point: Tensor, x: Tensor) -> Tensor:
        """||point - x||, [N], in float64."""
        return distance(self.norm, point, x)

    def check(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Return x_adv; raise RuntimeError unless it is in the ball around x and in [0, 1], to float rounding."""
        check_in_box(x_adv)
        if x.numel():
            # Under Linf one rounding in x + epsilon and one in the difference, of numbers up to 1 + epsilon; under the
            # others as much for each pixel, and the projection's own relative error.
            pixels = {"Linf": 1.0, "L2": x[0].numel() ** 0.5, "L1": float(x[0].numel())}[self.norm]
            relative = 0.0 if self.norm == "Linf" else 1e-5
            rounding = 2 * (1 + self.epsilon) * torch.finfo(x.dtype).eps * pixels
            farthest = float(self.distance(x_adv, x).max())
            if not farthest <= self.epsilon * (1 + relative) + rounding:
                raise RuntimeError(f"the attack left its ball: {self.norm} distance {farthest:g} > {self.epsilon:g}")
        return x_adv


def check_in_box(x_adv: Tensor) -> Tensor:
    """Return x_adv; raise RuntimeError unless all its values are in [0, 1]."""
    if x_adv.numel():
        low, high = (float(bound) for bound in torch.aminmax(x_adv))
        if not (low >= 0 and high <= 1):
            raise RuntimeError(f"the attack left the box: values in [{low:g}, {high:g}], expected [0, 1]")
    return x_adv

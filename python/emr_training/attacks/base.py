"""What every attack shares: its interface, its objective, and the check of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

Model = Callable[[Tensor], Tensor]


class Attack(Protocol):
    """Finds, for each image, a misclassified one nearby.

    `attack(model, x, y)` takes images x [N, ...] in [0, 1], labels y [N] (int64) and a model that returns
    logits [N, C] and holds its input normalisation inside. It returns x_adv, shaped and typed like x and
    detached. `generator` is the source of random starts; without one, a fresh generator with the attack's
    own seed is used.
    """

    def __call__(
        self, model: nn.Module, x: Tensor, y: Tensor, *, generator: torch.Generator | None = None
    ) -> Tensor: ...


def objective(logits: Tensor, y: Tensor) -> Tensor:
    """What attacks maximise, for logits z [N, C]: m = (logsumexp over j != y of z_j) - z_y, [N].

    Cross-entropy is log(1 + exp(m)), so m orders points as cross-entropy does, without saturating at zero.
    """
    rivals = logits.scatter(1, y[:, None], -torch.inf)
    return rivals.logsumexp(1) - logits.gather(1, y[:, None]).squeeze(1)


def objective_seed(logits: Tensor, y: Tensor) -> Tensor:
    """dm/dz of `objective`, [N, C]: cross-entropy's gradient in the logits, divided by 1 - p_y > 0.

    Sign and normalised steps are the same as with cross-entropy, but nothing underflows on confident
    points, where an attack would otherwise see a zero gradient and report robustness that is not there.
    """
    rivals = logits.scatter(1, y[:, None], -torch.inf)
    return rivals.softmax(1).scatter(1, y[:, None], -1.0)


def check_in_ball(x_adv: Tensor, x: Tensor, epsilon: float) -> Tensor:
    """Return x_adv [N, ...]; raise RuntimeError unless it lies in the Linf ball around x and in [0, 1]."""
    if x.numel():
        low, high = torch.aminmax(x_adv)
        distance = float((x_adv - x).abs().max())
        # One rounding in x + epsilon and one in the difference, both of numbers up to 1 + epsilon.
        rounding = 2 * (1 + epsilon) * torch.finfo(x.dtype).eps
        if not (float(low) >= 0 and float(high) <= 1 and distance <= epsilon + rounding):
            raise RuntimeError(
                f"the attack left its bounds: distance {distance:g} (epsilon {epsilon:g}), values in "
                f"[{float(low):g}, {float(high):g}]"
            )
    return x_adv

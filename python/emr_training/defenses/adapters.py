"""TRADES and MART under the names and arguments that training code of the field calls."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from emr_training.attacks import PGD
from emr_training.attacks.base import check_choice
from emr_training.defenses.mart import MART
from emr_training.defenses.trades import TRADES

Distance = Literal["l_inf", "l_2"]


def _attack(step_size: float, epsilon: float, steps: int, distance: str, loss: Any) -> PGD:
    check_choice("distance", distance, ("l_inf", "l_2"))
    # From torch's global generator, as where these signatures come from.
    seed = int(torch.randint(2**31, ()))
    norm: Any = "Linf" if distance == "l_inf" else "L2"
    return PGD(epsilon, steps, step_size, norm=norm, loss=loss, start_std=0.001, keep="last", seed=seed)


def trades_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    step_size: float = 0.003,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 1.0,
    distance: Distance = "l_inf",
) -> Tensor:
    """TRADES's loss of a batch, a scalar to call `backward()` on; Zhang et al. 2019.

    As `TRADES` computes it, with x run twice for BatchNorm's running statistics. The model is put in training mode and
    the optimizer's gradients are cleared, as callers of this signature expect.
    """
    attack = _attack(step_size, epsilon, perturb_steps, distance, "kl")
    model.train()
    if optimizer is not None:
        optimizer.zero_grad()
    return TRADES(attack, beta, clean_forwards=2)(model, x_natural, y).total


def mart_loss(
    model: nn.Module,
    x_natural: Tensor,
    y: Tensor,
    optimizer: torch.optim.Optimizer | None = None,
    step_size: float = 0.007,
    epsilon: float = 0.031,
    perturb_steps: int = 10,
    beta: float = 6.0,
    distance: Distance = "l_inf",
) -> Tensor:
    """MART's loss of a batch, a scalar to call `backward()` on; Wang et al. 2020. As `MART` computes it.

    The model is put in training mode and the optimizer's gradients are cleared, as callers of this signature expect.
    """
    attack = _attack(step_size, epsilon, perturb_steps, distance, "ce")
    model.train()
    if optimizer is not None:
        optimizer.zero_grad()
    return MART(attack, beta)(model, x_natural, y).total

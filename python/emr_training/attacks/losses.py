"""What attacks maximise: a value per sample, and its gradient in the logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from emr_kernels.ops import logit_seeds

#: (logits [N, C], y [N], target [N] or None) -> the value that the attack maximises [N], its gradient [N, C].
Loss = Callable[[Tensor, Tensor, "Tensor | None"], tuple[Tensor, Tensor]]
LossName = Literal["ce", "cw", "dlr"]


def _wide(logits: Tensor) -> Tensor:
    """At least float32."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _log_odds(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """m = (logsumexp over j != label of z_j) - z_label, and dm/dz."""
    rivals = logits.scatter(1, label[:, None], -torch.inf)
    value = rivals.logsumexp(1) - logits.gather(1, label[:, None]).squeeze(1)
    return value, rivals.softmax(1).scatter(1, label[:, None], -1.0)


def cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The log odds against y (with a target: for it), which order points as cross-entropy does.

    Cross-entropy is log(1 + exp(m)) of m = (logsumexp over j != y of z_j) - z_y, and its gradient that of m times
    1 - p_y > 0. Sign and normalised steps are the same, but nothing underflows on confident points, where an attack
    would otherwise see a zero gradient and report robustness that is not there.
    """
    value, seed = _log_odds(_wide(logits), y if target is None else target)
    return (value, seed) if target is None else (-value, -seed)


def coupled_cross_entropy(logits: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy itself (with a target: minus that of the target).

    For networks in which the images of a batch depend on each other: there one image's gradient is a sum over all of
    them, whose direction changes with the scale of each, and log odds would lead elsewhere.
    """
    found = logit_seeds(_wide(logits), y, target, kind="ce" if target is None else "ce_targeted")
    return found.loss, found.seed


def margin(logits: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss of Carlini and Wagner, max over j != y of z_j, minus z_y; with a target t: z_t - max over j != t."""
    if target is None:
        found = logit_seeds(logits, y, kind="cw")
        return found.loss, found.seed
    found = logit_seeds(logits, target, kind="margin")
    return found.loss, found.seed


def dlr(logits: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The difference of logits ratio (Croce and Hein 2020), z_(i) the i-th largest logit.

    -(z_y - max over j != y of z_j) / (z_(1) - z_(3)), for a target t -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2).
    Does not change when the logits are scaled or shifted.

    Raises:
        ValueError: with fewer than 3 classes, or 4 with a target.
    """
    least = 3 if target is None else 4
    if logits.shape[1] < least:
        raise ValueError(
            f"loss is 'dlr' with a model of {logits.shape[1]} classes; expected at least {least} classes "
            f"{'' if target is None else 'for a targeted attack '}(the losses 'ce' and 'cw' serve any number)"
        )
    found = logit_seeds(logits, y, target, kind="dlr" if target is None else "dlr_targeted")
    return found.loss, found.seed


def divergence(clean: Tensor) -> Loss:
    """TRADES's attack loss (Zhang et al. 2019): KL(softmax(clean) || softmax(logits)), [N]; clean are logits [N, C].

    Its gradient is zero at the clean image itself: start elsewhere.
    """
    log_p = _wide(clean.detach()).log_softmax(1)
    p = log_p.exp()

    def loss(logits: Tensor, y: Tensor, target: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_q = _wide(logits).log_softmax(1)
        return (p * (log_p - log_q)).sum(1), log_q.exp() - p

    return loss


LOSSES: dict[str, Loss] = {"ce": cross_entropy, "cw": margin, "dlr": dlr}


def find_loss(name: str, bn_mode: str) -> Loss:
    """The loss of this name for a network in evaluation mode, or in training mode, where BatchNorm couples images."""
    return coupled_cross_entropy if name == "ce" and bn_mode == "train" else LOSSES[name]

"""Signs that an evaluation cannot be trusted, each with what to do about it."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from emr_training.attacks.losses import dlr, margin
from emr_training.attacks.problem import Problem

#: Square finds this much only where gradients mislead.
SQUARE_TOLERANCE = 0.002
_DIFFERENTIATORS = (torch.autograd.grad.__code__, torch.autograd.backward.__code__)


class EvaluationWarning(UserWarning):
    """Robust accuracy may be overestimated."""


def randomized(problem: Problem, repetitions: int = 5) -> str | None:
    """Whether the model answers differently to the same images."""
    answers = [problem.classifier.plain_logits(problem.x) for _ in range(repetitions)]
    counts = {int((answer.argmax(1) == problem.y).sum()) for answer in answers}
    units = torch.stack([answer / (answer.norm(dim=1, keepdim=True) + 1e-10) for answer in answers])
    spread = float((units[1:] - units[:1]).norm(dim=2).max())
    # Twice the farthest from the first bounds the distance of any two.
    if len(counts) == 1 and spread <= 1e-4:
        return None
    return (
        f"the model is random: its logits differ between forward passes (by {spread:.2g} of their norm). "
        'Use version="rand", which averages over passes, or fix what is drawn if that is not part of the defense'
    )


def probabilities(logits: Tensor) -> str | None:
    """Whether what should be logits looks like the output of a softmax."""
    rows = logits.double()
    if float(rows.min()) < -1e-5 or float(rows.max()) > 1 + 1e-5 or float((rows.sum(1) - 1).abs().max()) > 1e-5:
        return None
    return (
        "the model's outputs are probabilities: non-negative, with sum 1. Their gradients vanish where the model is "
        "sure. Return the logits, without the softmax"
    )


def zero_gradients(problem: Problem) -> str | None:
    """Whether the DLR loss (with two classes the margin) has no gradient at some image that is classified correctly."""
    logits = problem.classifier.plain_logits(problem.x)
    # Elsewhere a gradient of zero means nothing: DLR is constant where the label has the third largest logit.
    problem = problem.subset(logits.argmax(1) == problem.y)
    if len(problem) == 0:
        return None
    classes = logits.shape[1]
    _, _, gradient = problem.ascend(problem.x, dlr if classes > 2 else margin)
    count = int((gradient.flatten(1).abs().amax(1) == 0).sum())
    if count == 0:
        return None
    return (
        f"the gradient of the loss is exactly zero at {count} of {len(problem)} images: attacks by gradient do not "
        "move them. Look for rounding, clipping or saturation in the model, attack a differentiable version of it, and "
        "trust Square, with more queries and restarts, rather than APGD and FAB"
    )


def dynamic(problem: Problem) -> str | None:
    """Whether the model takes gradients in its forward pass; not looked for under cProfile before Python 3.12."""
    calls = 0

    def watch(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "call" and frame.f_code in _DIFFERENTIATORS:
            calls += 1

    before = sys.getprofile()
    if before is not None and not callable(before):
        return None  # cProfile's, which could not be put back
    sys.setprofile(watch)
    try:
        problem.classifier.plain_logits(problem.x)
    finally:
        sys.setprofile(before)
    if calls == 0:
        return None
    return (
        f"the model takes {calls} gradients in one forward pass: it changes with the image it is given. AutoAttack may "
        "be too weak for it; evaluate its static base, too, and write an adaptive attack"
    )


def met_nan(name: str, count: int) -> str | None:
    """Whether an attack met NaN in the logits of perturbed images, so many times."""
    if count == 0:
        return None
    return (
        f"{name} met NaN in the model's logits {count} times. NaN counts for no class, and so for no success: the "
        "robust accuracy may be too high. Find what makes it (an overflow, a division by zero, the logarithm of zero), "
        "and mend the model"
    )


def square_lowered(before: float, after: float) -> str | None:
    """Whether Square broke, after attacks by gradient, more than 0.2 points of the images (accuracies in [0, 1])."""
    if before - after <= SQUARE_TOLERANCE:
        return None
    return (
        f"Square lowered the robust accuracy by {100 * (before - after):.2f} points after attacks by gradient had run. "
        "Gradients may be masked: run Square with more queries and restarts, or an adaptive attack"
    )

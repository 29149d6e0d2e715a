"""Effective weights, their norms, and effective margins of a trained classifier."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from emr_kernels.checks import check_input, check_labels, check_logits, check_model
from emr_kernels.directions import DIRECTIONS, NEEDS_LABELS, rivals, seeds
from emr_kernels.linearize import LinearizedPoint, UnsupportedModelError
from emr_kernels.linearize.cache import find_program
from emr_kernels.linearize.chain import Chain
from emr_kernels.linearize.verify import live_evaluation, untouched_forward
from emr_kernels.linearize.wrappers import ordinary, ordinary_tensors, unwrap
from emr_kernels.options import number, whole

ORDERS = (1, 2, float("inf"))
# From so many classes on, a multilayer perceptron's are carried back together.
_LEAST_ROWS = 2


class _AutogradPoint:
    """The same face as `LinearizedPoint`, by autograd on the live model, for models that cannot be exported."""

    def __init__(self, model: nn.Module, x: torch.Tensor) -> None:
        with live_evaluation(model):
            self._x = x.detach().clone().requires_grad_()
            self._live = untouched_forward(model, self._x)
        check_logits(self._live, x.shape[0])
        self.logits = self._live.detach()

    def vjp(self, seed: torch.Tensor) -> torch.Tensor:
        with ordinary_tensors():
            (weight,) = torch.autograd.grad(
                self._live, self._x, ordinary(seed).to(self._live.dtype), retain_graph=True, materialize_grads=True
            )
        return weight


def _point(model: nn.Module, x: torch.Tensor) -> LinearizedPoint | _AutogradPoint:
    try:
        program = find_program(model, x)
    except UnsupportedModelError:
        return _AutogradPoint(model, x)
    return LinearizedPoint.at(program, model, x)


def _num_classes(model: nn.Module, x: torch.Tensor) -> int:
    try:
        return find_program(model, x).graph.num_classes
    except UnsupportedModelError as error:
        return error.num_classes


def _checked(model: nn.Module, x: torch.Tensor) -> nn.Module:
    check_model(model)
    inner = unwrap(model)
    check_input(inner, x, values=isinstance(x, torch.Tensor) and x.device.type == "cpu")
    return inner


def _norm(weight: torch.Tensor, ord: float) -> torch.Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.flatten(1), ord, dim=1, dtype=dtype)


def _check_order(ord: float) -> None:
    if isinstance(ord, bool) or ord not in ORDERS:
        raise ValueError(f"ord is {ord!r}; expected 1, 2 or float('inf')")


def _check_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    if classes is None:
        return list(range(num_classes))
    chosen = list(classes)
    if not chosen:
        raise ValueError("classes is empty; expected at least one class, or None for all")
    for c in chosen:
        if isinstance(c, bool) or not isinstance(c, int):
            raise TypeError(f"classes holds {c!r}; expected whole numbers")
        if not 0 <= c < num_classes:
            raise ValueError(f"classes holds {c}; expected classes in [0, {num_classes})")
    return chosen


def _chain(point: LinearizedPoint | _AutogradPoint, count: int) -> Chain | None:
    """The point's Jacobian as one product, where that serves `count` classes faster than a pass for each."""
    return point.chain() if count >= _LEAST_ROWS and isinstance(point, LinearizedPoint) else None


def _class_weights(point: LinearizedPoint | _AutogradPoint, classes: Sequence[int]) -> Iterator[torch.Tensor]:
    for c in classes:
        seed = torch.zeros_like(point.logits)
        seed[:, c] = 1
        yield point.vjp(seed)


def effective_weights(model: nn.Module, x: torch.Tensor, classes: Sequence[int] | None = None) -> torch.Tensor:
    """w_c(x) = ∂f_c(x)/∂x of the evaluation-mode classifier, exact.

    Args:
        model: classifier `[N, ...]` -> logits `[N, C]`; left as it was found.
        x: `[N, ...]`.
        classes: which classes; None for all.

    Returns:
        `[N, k, *input]`, detached, in x's dtype. Time: one forward and k backward passes; for a multilayer
        perceptron (linear layers, ReLUs, BatchNorm) one product, on the CPU without the units that are off.

    Raises:
        TypeError, ValueError: for bad input or a class outside [0, C).
    """
    point = _point(_checked(model, x), x)
    chosen = _check_classes(classes, point.logits.shape[1])
    chain = _chain(point, len(chosen))
    if chain is not None:
        return chain.carry_back(chain.head[chosen]).to(x.dtype)
    return torch.stack(list(_class_weights(point, chosen)), 1)


def effective_weight_norms(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor | None = None,
    *,
    classes: Sequence[int] | None = None,
    direction: str = "softmax",
    temperature: float = 1.0,
    center: bool = False,
    ord: float = 2,
) -> torch.Tensor:
    """‖w_p(x)‖ of the effective weight of a class mix, or of single classes.

    Args:
        model: classifier `[N, ...]` -> logits `[N, C]`; left as it was found.
        x: `[N, ...]`.
        y: class indices `[N]`, for the directions "label" and "margin".
        classes: norms of these classes' effective weights instead of a mix's.
        direction, temperature, center: the mix, as in `EffectiveWeightPenalty`; "all" and "random" give
            (Σ ‖w_c‖²)^½ and its estimate.
        ord: 1, 2 or inf.

    Returns:
        `[N, k]` with `classes`, else `[N]`; detached, float32 (float64 for a float64 model).

    Raises:
        TypeError, ValueError: for bad input or an unknown option.
    """
    _check_order(ord)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; expected one of {', '.join(map(repr, DIRECTIONS))}")
    number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    inner = _checked(model, x)
    if direction in NEEDS_LABELS and classes is None:
        check_labels(y, x, _num_classes(inner, x), values=True)
    point = _point(inner, x)
    if classes is not None:
        chosen = _check_classes(classes, point.logits.shape[1])
        chain = _chain(point, len(chosen))
        if chain is not None:
            return chain.norms(chain.head[chosen], ord)
        return torch.stack([_norm(weight, ord) for weight in _class_weights(point, chosen)], 1)
    if direction == "all":
        chain = _chain(point, point.logits.shape[1])
        if chain is not None:
            rows = chain.centered_head() if center else chain.head
            return torch.linalg.vector_norm(chain.norms(rows, ord), dim=1)
    norms = [_norm(point.vjp(seed), ord) for seed in seeds(point.logits, y, direction, temperature, center)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).square().sum(0).sqrt()


def effective_margins(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    ord: float = 2,
    top_k: int | None = None,
    batch_size: int | None = None,
) -> torch.Tensor:
    """M(x, y) = min over j ≠ y of (f_y(x) − f_j(x)) / ‖w_y(x) − w_j(x)‖_ord, signed.

    The first-order distance to the decision boundary in the dual norm: `ord` 2 for L2 threats, 1 for Linf, inf for
    L1. Exact as long as the boundary lies in the linear region of x (methods of this kind: the first step of
    DeepFool). Negative where x is misclassified.

    Args:
        model: classifier `[N, ...]` -> logits `[N, C]`; left as it was found.
        x: `[N, ...]`.
        y: class indices `[N]`.
        ord: norm of the weight difference: 1, 2 or inf.
        top_k: only the k strongest rivals by logit, for many classes; None for all C − 1 (exact).
        batch_size: samples at a time. Memory is that of one forward's bits and of one backward at this batch;
            no more than one weight difference `[batch, *input]` exists at a time, or of a multilayer perceptron one
            block of them. None: all at once.

    Returns:
        `[N]`, detached, float32 (float64 for a float64 model).

    Raises:
        TypeError, ValueError: for bad input, before any work.
    """
    inner = _checked(model, x)
    _check_order(ord)
    if top_k is not None:
        whole("top_k", top_k)
    if batch_size is not None:
        whole("batch_size", batch_size)
    classes = _num_classes(inner, x)
    check_labels(y, x, classes, values=True)
    if classes < 2:
        raise ValueError(f"model has {classes} class; expected two or more")
    # Parts of nearly equal size: a last part of a single sample would need an export of its own.
    count = -(-x.shape[0] // (batch_size or x.shape[0]))
    parts = [
        _margins(_point(inner, xs), ys, ord, top_k)
        for xs, ys in zip(x.tensor_split(count), y.tensor_split(count), strict=True)
    ]
    return torch.cat(parts)


def _margins(point: LinearizedPoint | _AutogradPoint, y: torch.Tensor, ord: float, top_k: int | None) -> torch.Tensor:
    logits = point.logits.to(torch.promote_types(point.logits.dtype, torch.float32))
    classes = logits.shape[1]
    own = logits.gather(1, y[:, None])[:, 0]
    others = rivals(logits, y, min(top_k or classes, classes - 1))
    chain = _chain(point, others.shape[1])
    if chain is not None:
        ratios = (own[:, None] - logits.gather(1, others)) / chain.difference_norms(y, others, ord)
        return _reached(ratios).amin(1)
    best: torch.Tensor | None = None
    for j in others.unbind(1):
        seed = torch.zeros_like(logits)
        seed.scatter_(1, y[:, None], 1.0)
        seed.scatter_(1, j[:, None], -1.0)
        gap = own - logits.gather(1, j[:, None])[:, 0]
        ratio = _reached(gap / _norm(point.vjp(seed), ord))
        best = ratio if best is None else torch.minimum(best, ratio)
    assert best is not None
    return best


def _reached(ratio: torch.Tensor) -> torch.Tensor:
    """A rival whose logit moves exactly with f_y is never reached, or, at a tie, is on the boundary already."""
    return torch.where(ratio.isnan(), 0.0, ratio)

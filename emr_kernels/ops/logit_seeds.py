"""Seeds of backward passes, losses and margins from the logits, row by row in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype

#: Directions of the effective weight, then losses that an attack maximises. Backends know a kind by its place here.
KINDS = ("softmax", "label", "margin", "ce", "cw", "dlr", "ce_targeted", "dlr_targeted")
TARGETED = ("ce_targeted", "dlr_targeted")
#: Keeps the difference of logits ratio's denominator from zero.
DLR_FLOOR = 1e-12

_Optional = torch.Tensor | None
_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class LogitSeeds(NamedTuple):
    """What `logit_seeds` returns; see there."""

    seed: torch.Tensor
    loss: torch.Tensor
    margin: torch.Tensor
    runner_up: torch.Tensor
    probability_margin: torch.Tensor


def _at(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, place[:, None]).squeeze(1)


def _only(z: torch.Tensor, place: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
    """Rows of zeros but for one value each, at a place of its own."""
    here = torch.arange(z.shape[1], device=z.device) == place[:, None]
    return torch.where(here, (torch.zeros_like(z[:, 0]) + value)[:, None], 0)


class Softmax(NamedTuple):
    """Softmax of each row, exact to the last bits also where one class has nearly all of it.

    Attributes:
        p: `[N, C]`.
        complement: 1 - p, `[N, C]`.
        log_p: `[N, C]`.
    """

    p: torch.Tensor
    complement: torch.Tensor
    log_p: torch.Tensor


def softmax_rows(z: torch.Tensor) -> Softmax:
    """Softmax, its complement and its logarithm, for float32 or float64 logits."""
    top, place = z.max(1, keepdim=True)
    shifted = z - top
    e = torch.exp(shifted)
    # A row whose largest is not finite is NaN throughout, as in torch.softmax.
    rest = e.scatter(1, place, 0.0).sum(1, keepdim=True) + (top - top)
    total = 1 + rest
    p = e / total
    return Softmax(p, (1 - p).scatter(1, place, rest / total), shifted - torch.log1p(rest))


def rivals_of(z: torch.Tensor, y: _Optional) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The order of each row's logits, the label (the first of them without y), and the largest that is not the label.

    NaN counts as the largest, among equals the first class is first: the first of the order is torch.argmax.
    """
    order = torch.sort(z, dim=1, descending=True, stable=True).indices
    label = order[:, 0] if y is None else y
    return order, label, torch.where(order[:, 0] == label, order[:, 1], order[:, 0])


def logit_seeds_reference(
    logits: torch.Tensor, y: _Optional, target: _Optional, kind: str, temperature: float, center: bool
) -> _Result:
    """`logit_seeds` in plain PyTorch."""
    z = logits.to(compute_dtype(logits))
    classes = z.shape[1]
    order, label, rival = rivals_of(z, y)
    goal = label if target is None else target
    soft = softmax_rows(z)
    margin = _at(z, label) - _at(z, rival)
    if kind == "softmax" or kind == "label":
        # Shifted first: a small temperature then overflows nothing but what vanishes.
        shifted = z - z.amax(1, keepdim=True)
        seed = torch.softmax(shifted / temperature, 1) if kind == "softmax" else _only(z, label, 1.0)
        loss = torch.where(seed == 0, 0, seed * z).sum(1)
        if center:
            seed, loss = seed - 1 / classes, loss - z.sum(1) / classes
    elif kind == "margin":
        seed, loss = _only(z, label, 1.0) + _only(z, rival, -1.0), margin.clone()
    elif kind == "cw":
        seed, loss = _only(z, rival, 1.0) + _only(z, label, -1.0), -margin
    elif kind == "ce":
        seed = soft.p.scatter(1, label[:, None], -_at(soft.complement, label)[:, None])
        loss = -_at(soft.log_p, label)
    elif kind == "ce_targeted":
        seed = (-soft.p).scatter(1, goal[:, None], _at(soft.complement, goal)[:, None])
        loss = _at(soft.log_p, goal)
    else:
        goal = rival if kind == "dlr" else goal
        ranked = z.gather(1, order[:, :4])
        shares = {2: 1.0} if kind == "dlr" else {2: 0.5, 3: 0.5}
        width = ranked[:, 0] - sum(ranked[:, place] * share for place, share in shares.items()) + DLR_FLOOR
        ratio = (_at(z, label) - _at(z, goal)) / width
        seed = _only(z, label, -1 / width) + _only(z, goal, 1 / width) + _only(z, order[:, 0], ratio / width)
        for place, share in shares.items():
            seed = seed - _only(z, order[:, place], ratio / width * share)
        loss = -ratio
    probability_margin = _at(soft.p, label) - _at(soft.p, rival)
    return seed.to(logits.dtype), loss, margin, rival, probability_margin


def _logit_seeds_fake(
    logits: torch.Tensor, y: _Optional, target: _Optional, kind: str, temperature: float, center: bool
) -> _Result:
    rows, wide = logits.shape[:1], compute_dtype(logits)
    return (
        torch.empty_like(logits),
        logits.new_empty(rows, dtype=wide),
        logits.new_empty(rows, dtype=wide),
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=wide),
    )


_logit_seeds = _dispatch.define(
    "logit_seeds(Tensor logits, Tensor? y, Tensor? target, str kind, float temperature, bool center) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    logit_seeds_reference,
    _logit_seeds_fake,
)


def logit_seeds(
    logits: torch.Tensor,
    y: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    *,
    kind: str,
    temperature: float = 1.0,
    center: bool = False,
) -> LogitSeeds:
    """The seed v of a backward pass, v·∂f/∂x, with its loss; and each sample's margins: one pass over the logits.

    With z the logits, p = softmax(z), r the runner-up (the largest logit but the label's) and z_(i) the i-th largest:

    ============== ================================== ==============================================
    kind           loss                               seed
    ============== ================================== ==============================================
    softmax        q·z, with q held constant          q = softmax(z / T), the paper's class mix
    label          z_y                                e_y
    margin         z_y − z_r                          e_y − e_r
    ce             −log p_y                           p − e_y
    cw             −(z_y − z_r)                       e_r − e_y
    dlr            −(z_y − z_r) / D                   ∂loss/∂z; D = z_(1) − z_(3) + 1e-12
    ce_targeted    log p_t                            e_t − p
    dlr_targeted   −(z_y − z_t) / D                   ∂loss/∂z; D = z_(1) − (z_(3) + z_(4)) / 2 + 1e-12
    ============== ================================== ==============================================

    The first three are directions of Effective Margin Regularization (Liu & Chan 2022), the others losses that attacks
    maximise: cw is Carlini and Wagner's without a confidence, dlr the difference of logits ratio of Croce and Hein
    2020. A row with a NaN is NaN wherever it depends on it. Among equal logits the first class comes first.

    Args:
        logits: `[N, C]`; float32, bfloat16, float16 or float64. C is at least 2; 3 for dlr, 4 for dlr_targeted.
        y: int64 `[N]`, class indices; None: the class of the largest logit. A GPU's kernels make a row NaN
            whose label is out of range, elsewhere that is an error.
        target: int64 `[N]`, t of the targeted kinds, and for these alone.
        temperature: T of softmax.
        center: seeds minus their mean over the classes, which is 1/C for softmax and label and else 0.

    Returns:
        seed: `[N, C]`, like logits; computed in float32 (float64 for float64) and rounded once.
        loss: `[N]`, float32 (float64 for float64); so are the margins.
        margin: `[N]`, z_y − z_r.
        runner_up: `[N]`, int64, r.
        probability_margin: `[N]`, p_y − p_r.

    Raises:
        TypeError, ValueError: for a wrong kind, dtype, shape, device, label or temperature.
        RuntimeError: if logits require grad in grad mode (the operator has no derivative of its own).
    """
    _checks.check_one_of("kind", kind, KINDS)
    least = {"dlr": 3, "dlr_targeted": 4}.get(kind, 2)
    _checks.check_rows("logits", logits, least)
    _checks.check_not_differentiated("logit_seeds", logits=logits)
    if y is not None:
        _checks.check_classes("y", y, "logits", logits)
    if (target is None) == (kind in TARGETED):
        found = "None" if target is None else "given"
        raise ValueError(f"target is {found} with kind {kind!r}; expected one for {' and '.join(TARGETED)} only")
    if target is not None:
        _checks.check_classes("target", target, "logits", logits)
    if not (0 < temperature < math.inf):
        raise ValueError(f"temperature is {temperature}; expected a finite number > 0")
    dense = logits.contiguous()
    labels, targets = (None if t is None else t.contiguous() for t in (y, target))
    return LogitSeeds(*_logit_seeds(dense, dense, labels, targets, kind, float(temperature), center))

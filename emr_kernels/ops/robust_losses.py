"""The losses of adversarial training, row by row, with their gradients in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype
from emr_kernels.ops.logit_seeds import Softmax, rivals_of, softmax_rows

#: Backends know a kind by its place here.
KINDS = ("ce", "kl", "trades", "mart")
#: MART's constants, as released: log(1.0001 - p + 1e-12), log(p + 1e-12) and 1.0000001 - p.
MART_CROSS, MART_LOG, MART_WEIGHT = 1e-4, 1e-12, 1e-7
#: MAIL's factor of the sigmoid, as released.
MAIL_SCALE = 3.0

_Optional = torch.Tensor | None
_Result = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _at(rows: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, place[:, None])


def _cross_entropy(soft: Softmax, y: torch.Tensor, smoothing: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Label-smoothed cross-entropy `[N, 1]` and its gradient `[N, C]`."""
    loss = -_at(soft.log_p, y)
    uniform = smoothing / soft.p.shape[1]
    if smoothing:
        loss = (1 - smoothing) * loss - uniform * soft.log_p.sum(1, keepdim=True)
    return loss, (soft.p - uniform).scatter(1, y[:, None], smoothing - _at(soft.complement, y) - uniform)


def _boosted(adv: Softmax, y: torch.Tensor, rival: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MART's boosted cross-entropy `[N, 1]` and its gradient `[N, C]`."""
    room = _at(adv.complement, rival) + (MART_CROSS + MART_LOG)
    ratio = _at(adv.p, rival) / room
    grad = adv.p * (1 - ratio)
    grad = grad.scatter(1, y[:, None], -_at(adv.complement, y) - ratio * _at(adv.p, y))
    grad = grad.scatter(1, rival[:, None], _at(adv.p, rival) + ratio * _at(adv.complement, rival))
    return -_at(adv.log_p, y) - torch.log(room), grad


def _divergence(clean: Softmax, adv: Softmax, floor: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """KL(clean || adv + floor) `[N, 1]`, and its gradients in the adversarial and the clean logits, `[N, C]`."""
    difference = clean.log_p - (torch.log(adv.p + floor) if floor else adv.log_p)
    loss = torch.where(clean.p == 0, 0, clean.p * difference).sum(1, keepdim=True)
    clean_grad = torch.where(clean.p == 0, 0, clean.p * (difference - loss))
    # Where one class has nearly everything in both, their complements tell the two apart.
    sure = (clean.p > 0.5) & (adv.p > 0.5)
    adv_grad = torch.where(sure, clean.complement - adv.complement, adv.p - clean.p)
    if floor:
        missing = clean.p * (floor / (adv.p + floor))
        adv_grad = adv_grad - adv.p * missing.sum(1, keepdim=True) + missing
    return loss, adv_grad, clean_grad


def robust_losses_reference(
    adversarial: torch.Tensor,
    clean: _Optional,
    y: _Optional,
    weights: _Optional,
    kind: str,
    beta: float,
    smoothing: float,
    mail: bool,
    slope: float,
    bias: float,
) -> _Result:
    """`robust_losses` in plain PyTorch."""
    z = adversarial.to(compute_dtype(adversarial))
    adv = softmax_rows(z)
    weight = torch.ones_like(z[:, :1]) if weights is None else weights.to(z.dtype)[:, None]
    rival = rivals_of(z, y)[2] if mail or kind == "mart" else None
    if mail:
        assert y is not None and rival is not None
        margin = _at(adv.p, y) - _at(adv.p, rival)
        weight = weight * MAIL_SCALE * torch.sigmoid(slope * (bias - margin))
    if kind == "ce":
        assert y is not None
        loss, grad = _cross_entropy(adv, y, smoothing)
        return (weight * loss).squeeze(1), weight * grad, z.new_empty((0,))
    assert clean is not None
    soft = softmax_rows(clean.to(z.dtype))
    divergence, adv_grad, clean_grad = _divergence(soft, adv, MART_LOG if kind == "mart" else 0.0)
    if kind == "kl":
        return (weight * divergence).squeeze(1), weight * adv_grad, weight * clean_grad
    assert y is not None
    if kind == "trades":
        loss, grad = _cross_entropy(soft, y, smoothing)
        share = beta * weight
        return (loss + share * divergence).squeeze(1), share * adv_grad, grad + share * clean_grad
    assert rival is not None
    loss, grad = _boosted(adv, y, rival)
    share = beta * (_at(soft.complement, y) + MART_WEIGHT)
    away = soft.p.scatter(1, y[:, None], -_at(soft.complement, y))
    return (
        (weight * loss + share * divergence).squeeze(1),
        weight * grad + share * adv_grad,
        share * clean_grad + beta * divergence * _at(soft.p, y) * away,
    )


def _robust_losses_fake(
    adversarial: torch.Tensor,
    clean: _Optional,
    y: _Optional,
    weights: _Optional,
    kind: str,
    beta: float,
    smoothing: float,
    mail: bool,
    slope: float,
    bias: float,
) -> _Result:
    wide = compute_dtype(adversarial)
    grad = torch.empty_like(adversarial, dtype=wide)
    loss = adversarial.new_empty(adversarial.shape[:1], dtype=wide)
    return loss, grad, grad.new_empty((0,)) if clean is None else torch.empty_like(grad)


_robust_losses = _dispatch.define(
    "robust_losses(Tensor adversarial, Tensor? clean, Tensor? y, Tensor? weights, str kind, float beta, "
    "float smoothing, bool mail, float slope, float bias) -> (Tensor, Tensor, Tensor)",
    robust_losses_reference,
    _robust_losses_fake,
)


def robust_losses(
    adversarial: torch.Tensor,
    clean: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    *,
    kind: str,
    beta: float = 1.0,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    mail: Sequence[float] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Per-sample loss of adversarial training and its gradients in both logits: one pass over them.

    With p' and p the softmax of the adversarial and the clean logits, j the class of the largest p' but the label's,
    K = Σ_k p_k log(p_k / p'_k) and CE label-smoothed cross-entropy:

    ====== =========================================================================== ===============================
    kind   loss                                                                        source
    ====== =========================================================================== ===============================
    ce     w · CE(p', y)                                                               Madry et al. 2018 (w = 1)
    kl     w · K
    trades CE(p, y) + beta · w · K                                                     Zhang et al. 2019 (w = 1)
    mart   w · (−log p'_y − log(1.0001 − p'_j + 1e-12)) + beta · K' · (1.0000001 − p_y) Wang et al. 2020 (w = 1)
    ====== =========================================================================== ===============================

    K' is K with log(p' + 1e-12). Gradients flow through every p and p', not through w: the weights given, times
    MAIL's (Wang et al. 2021), 3σ(slope · (p'_j − p'_y + bias)), where `mail` is. MAIL's weights normalised over the
    batch, as the paper has them, need the whole batch first: pass `logit_seeds(...).probability_margin`, put through
    the sigmoid and divided by its mean, as `weights`.

    Args:
        adversarial: logits at the adversarial example, `[N, C]`, C >= 2; float32, bfloat16, float16 or float64.
        clean: logits at the clean example, like adversarial; for every kind but ce, and for these alone.
        y: int64 `[N]`, class indices; needed for every kind but kl without mail. A GPU's kernels make a row
            NaN whose label is out of range, elsewhere that is an error.
        beta: for trades and mart.
        smoothing: of the labels in CE, in [0, 1): for ce and trades.
        weights: `[N]`, floating.
        mail: slope and bias.

    Returns:
        loss: `[N]`, float32 (float64 for float64); so are the gradients.
        grad_adversarial: `[N, C]`, the derivative of each row's loss in its row of adversarial.
        grad_clean: `[N, C]`, likewise; None without clean.

    Raises:
        TypeError, ValueError: for a wrong kind, dtype, shape, device, label or number.
        RuntimeError: if an argument requires grad in grad mode; `emr_kernels.robust_loss` is differentiable.
    """
    _checks.check_one_of("kind", kind, KINDS)
    _checks.check_rows("adversarial", adversarial, 2)
    _checks.check_not_differentiated("robust_losses", adversarial=adversarial, clean=clean, weights=weights)
    if (clean is None) != (kind == "ce"):
        raise ValueError(
            f"clean is {'None' if clean is None else 'given'} with kind {kind!r}; expected for all but 'ce'"
        )
    if clean is not None:
        _checks.check_like("clean", clean, "adversarial", adversarial)
        clean = clean.contiguous()
    if y is not None:
        _checks.check_classes("y", y, "adversarial", adversarial)
        y = y.contiguous()
    elif kind != "kl" or mail is not None:
        raise ValueError(f"y is None with kind {kind!r}{' and mail' if mail else ''}; expected class indices [N]")
    if weights is not None:
        weights = _row_weights(weights, adversarial)
    slope, bias = (0.0, 0.0) if mail is None else _mail_numbers(mail)
    if not math.isfinite(beta):
        raise ValueError(f"beta is {beta}; expected a finite number")
    if not (0 <= smoothing < 1) or (smoothing and kind not in ("ce", "trades")):
        raise ValueError(f"smoothing is {smoothing} with kind {kind!r}; expected 0, or for ce and trades one in [0, 1)")
    dense = adversarial.contiguous()
    loss, grad, clean_grad = _robust_losses(
        dense, dense, clean, y, weights, kind, float(beta), float(smoothing), mail is not None, slope, bias
    )
    return loss, grad, None if clean is None else clean_grad


def _row_weights(weights: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Checked weights, contiguous and in the arithmetic's dtype."""
    _checks.check_floating("weights", weights)
    if weights.shape != like.shape[:1]:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected ({like.shape[0]},), one for each row")
    if weights.device != like.device:
        raise ValueError(f"weights is on device {weights.device}; expected {like.device}, that of adversarial")
    return weights.to(compute_dtype(like)).contiguous()


def _mail_numbers(mail: Sequence[float]) -> tuple[float, float]:
    if not isinstance(mail, Sequence) or len(mail) != 2 or not all(math.isfinite(v) for v in mail):
        raise ValueError(f"mail is {mail!r}; expected two finite numbers, slope and bias")
    return float(mail[0]), float(mail[1])

"""Effective margins against every other class, from the effective weights of all classes."""

from __future__ import annotations

import math

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype

ORDERS = (1, 2, math.inf)


def pairwise_margins_reference(
    weights: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, ord: float
) -> torch.Tensor:
    """`pairwise_margins` in plain PyTorch, one class at a time."""
    dtype = compute_dtype(weights)
    sample = torch.arange(y.shape[0], device=y.device)
    own = weights[sample, y].to(dtype)
    gaps = logits[sample, y][:, None] - logits
    # Differences first: the expansion ‖a‖² − 2⟨a, b⟩ + ‖b‖² cancels where two classes' weights are close.
    norm = torch.zeros_like(gaps)
    for j, other in enumerate(weights.unbind(1) if own.numel() else ()):
        norm[:, j] = torch.linalg.vector_norm(own - other.to(dtype), ord, dim=1)
    ratio = torch.where((gaps == 0) & (norm == 0), 0.0, gaps / norm)
    return ratio.scatter(1, y[:, None], math.inf)


def _pairwise_margins_fake(weights: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, ord: float) -> torch.Tensor:
    return logits.new_empty(logits.shape)


_pairwise_margins = _dispatch.define(
    "pairwise_margins(Tensor weights, Tensor logits, Tensor y, float ord) -> Tensor",
    pairwise_margins_reference,
    _pairwise_margins_fake,
)


def pairwise_margins(weights: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, ord: float = 2) -> torch.Tensor:
    """(f_y − f_j) / ‖w_y − w_j‖_ord for every class j: the first-order distances to the decision boundaries.

    Their minimum over j is the effective margin. The differences w_y − w_j are formed element by element and never
    written. Sums are float32 with many partial sums, float64 for float64; the same number comes out at every call.

    Args:
        weights: `[N, K, ...]`, the effective weights of K classes; float32, bfloat16, float16 or float64.
        logits: `[N, K]`, any floating dtype.
        y: int64 `[N]`, an index among the K.
        ord: 1, 2 or inf.

    Returns:
        `[N, K]`, float32 (float64 for float64 weights). inf at j = y; 0 where gap and norm are both 0; ±inf where
        only the norm is.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or order, or (on the CPU) an index out of range.
        RuntimeError: if an argument requires grad in grad mode (the operator has no derivative of its own).
    """
    _checks.check_floating("weights", weights)
    if weights.dim() < 3:
        raise ValueError(f"weights has shape {tuple(weights.shape)}; expected [N, K, ...]")
    _checks.check_rows("logits", logits, 1)
    _checks.check_not_differentiated("pairwise_margins", weights=weights, logits=logits)
    if logits.shape != weights.shape[:2]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}; expected {tuple(weights.shape[:2])}, as weights")
    if logits.device != weights.device:
        raise ValueError(f"logits is on device {logits.device}; expected {weights.device}, that of weights")
    _checks.check_classes("y", y, "logits", logits)
    if isinstance(ord, bool) or ord not in ORDERS:
        raise ValueError(f"ord is {ord!r}; expected 1, 2 or float('inf')")
    dense = weights.flatten(2).contiguous()
    wide = logits.to(compute_dtype(weights)).contiguous()
    return _pairwise_margins(dense, dense, wide, y.contiguous(), float(ord))

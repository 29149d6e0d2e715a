"""The losses of adversarial training, differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emr_kernels.once import differentiable_once
from emr_kernels.ops.robust_losses import robust_losses


class _RobustLoss(torch.autograd.Function):
    """Both gradients come out of the forward's one pass; the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, adversarial: torch.Tensor, clean: torch.Tensor | None, y: torch.Tensor | None, options: dict[str, Any]
    ) -> torch.Tensor:
        loss, *grads = robust_losses(adversarial, clean, y, **options)
        ctx.save_for_backward(adversarial, clean, *grads)
        return loss

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        factor = cotangents[0][:, None]
        inputs, grads = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        scaled: list[torch.Tensor | None] = [
            (grad * factor).to(logits.dtype) if wanted else None
            for wanted, grad, logits in zip(ctx.needs_input_grad[:2], grads, inputs, strict=True)
        ]
        if torch.is_grad_enabled():
            sources = [t for t in (*inputs, *cotangents) if t is not None and t.requires_grad]
            scaled = differentiable_once("the robust loss", scaled, sources)
        return (*scaled, None, None)


def robust_loss(
    adversarial: torch.Tensor,
    clean: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    *,
    kind: str,
    beta: float = 1.0,
    smoothing: float = 0.0,
    weights: torch.Tensor | None = None,
    mail: Sequence[float] | None = None,
) -> torch.Tensor:
    """Per-sample loss of adversarial training, differentiable in both logits.

    PGD-AT, TRADES, MART and MAIL's version of each, with or without label smoothing: `emr_kernels.ops.robust_losses`
    has the formulas and says what each argument is. The gradient is computed in the same pass as the loss; it can be
    taken once.

    Returns:
        `[N]`, float32 (float64 for float64 logits); take its mean for the papers' losses.

    Raises:
        TypeError, ValueError: for a wrong kind, dtype, shape, device, label or number.
        RuntimeError: if weights require grad, for they are held constant; and by whoever differentiates the gradient.
    """
    if isinstance(weights, torch.Tensor) and weights.requires_grad:
        raise RuntimeError("weights requires grad; expected constant weights, for instance weights.detach()")
    options = {"kind": kind, "beta": beta, "smoothing": smoothing, "weights": weights, "mail": mail}
    return _RobustLoss.apply(adversarial, clean, y, options)  # type: ignore[no-untyped-call]

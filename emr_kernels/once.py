"""Gradients that refuse a second derivative, instead of passing for constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class _DifferentiatedOnce(torch.autograd.Function):
    """Gradients, as functions of the tensors that they depend on, with a backward that refuses."""

    @staticmethod
    def forward(ctx: Any, what: str, sources: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.what = what
        return tuple(grad.view_as(grad) for grad in tensors[sources:])

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise RuntimeError(
            f"the gradient of {ctx.what} was differentiated again; it has no second derivative here. "
            "Use double backward on the model itself for that."
        )


def differentiable_once(
    what: str, grads: Sequence[torch.Tensor | None], sources: Sequence[torch.Tensor]
) -> list[torch.Tensor | None]:
    """Under `create_graph=True`, gradients that raise when differentiated.

    Args:
        what: whose gradients they are, for the error's message.
        grads: the gradients.
        sources: the tensors that they depend on, which require grad.
    """
    present = [g for g in grads if g is not None]
    if not present or not sources:
        return list(grads)
    guarded = iter(_DifferentiatedOnce.apply(what, len(sources), *sources, *present))  # type: ignore[no-untyped-call]
    return [None if g is None else next(guarded) for g in grads]

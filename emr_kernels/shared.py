"""Logits and penalty from one forward, for classifiers that compute the same in training and in evaluation mode."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from emr_kernels.function import PENALTY, Request, Sink, add_penalty, report, wide
from emr_kernels.once import differentiable_once


class LogitsAndPenalty(torch.autograd.Function):
    """x, leaves -> the logits, and the sum of squared norms times the request's factor.

    The penalty's gradient is computed in the forward, as in `PenaltyFunction`. The logits' is an ordinary backward pass
    over what the same forward kept, when the base loss's cotangent arrives.
    """

    @staticmethod
    def forward(
        ctx: Any, request: Request, x: torch.Tensor, *leaves: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        program, factor = request.program, request.factor
        assert factor is not None
        wants_x = bool(ctx.needs_input_grad[1])
        moves = request.options.moves
        plan = program.plan(tuple(ctx.needs_input_grad[2:]), first_order=True, moving=moves)
        point = program.forward(request.values, x, plan)
        request.values = []
        sink = Sink(program, point, leaves, x if wants_x else None, moves)
        squared = report(request, add_penalty(request, point, sink))
        assert sink.scale is not None
        # Saved like any operator's tensors: let go of by backward, and refused if changed in place before it.
        residuals, ctx.layout = pytree.tree_flatten(point.residuals)
        ctx.tensors = [isinstance(leaf, torch.Tensor) for leaf in residuals]
        ctx.others = [leaf for leaf in residuals if not isinstance(leaf, torch.Tensor)]
        ctx.count, ctx.wants_x, ctx.program = 1 + len(leaves), wants_x, program
        grads = sink.unscaled()
        kept_tensors = [leaf for leaf in residuals if isinstance(leaf, torch.Tensor)]
        ctx.save_for_backward(x, *leaves, 2 * factor * sink.scale, *grads, *kept_tensors)
        logits, point.logits, point.residuals = point.logits, torch.empty(0), []
        ctx.point = point
        ctx.set_materialize_grads(False)
        return logits, squared.sum() * factor

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        to_logits, to_penalty = cotangents
        count = ctx.count
        saved = ctx.saved_tensors
        inputs, scale, of_penalty, kept = (
            saved[:count],
            saved[count],
            saved[count + 1 : 2 * count + 1],
            saved[2 * count + 1 :],
        )
        totals: list[torch.Tensor | None] = [None] * count
        if to_penalty is not None:
            factor = scale * to_penalty
            totals = [None if grad is None else wide(grad) * factor for grad in of_penalty]
        if to_logits is not None:
            tensors, others = iter(kept), iter(ctx.others)
            leaves = [next(tensors) if is_tensor else next(others) for is_tensor in ctx.tensors]
            ctx.point.residuals = pytree.tree_unflatten(leaves, ctx.layout)
            del leaves, tensors
            grads, x_grad = ctx.program.gradient(ctx.point, to_logits, ctx.wants_x)
            ctx.point.residuals = []
            for place, grad in enumerate([x_grad, *grads]):
                held = totals[place]
                if grad is not None:
                    totals[place] = grad.view(inputs[place].shape) if held is None else held + grad.view(held.shape)
        results = [
            None if total is None else total.to(tensor.dtype) for total, tensor in zip(totals, inputs, strict=True)
        ]
        if torch.is_grad_enabled():
            results = differentiable_once(PENALTY, results, [t for t in inputs if t.requires_grad])
        return (None, *results)

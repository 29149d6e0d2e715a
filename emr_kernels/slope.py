"""How steeply cross-entropy rises along given directions, differentiable in the parameters without double backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from emr_kernels.checks import check_input, check_labels, check_model
from emr_kernels.engine import find_engine
from emr_kernels.function import Request, deferred_passes, square_norms, wide
from emr_kernels.linearize.verify import live_evaluation, untouched_forward
from emr_kernels.linearize.wrappers import ordinary, unwrap
from emr_kernels.once import differentiable_once
from emr_kernels.options import PenaltyOptions

_OPTIONS = PenaltyOptions(direction="cross_entropy", reduction="none")


class _Slopes(torch.autograd.Function):
    """x, leaves -> ⟨d_i, w_i⟩ with w the input gradient: its own gradient is the penalty's, with d in w's place."""

    @staticmethod
    def forward(
        ctx: Any, request: Request, directions: torch.Tensor, x: torch.Tensor, *leaves: torch.Tensor
    ) -> torch.Tensor:
        wanted, wants_x = tuple(ctx.needs_input_grad[3:]), bool(ctx.needs_input_grad[2])
        ctx.sink, (found,), _ = deferred_passes(request, x, leaves, wanted, wants_x)
        ctx.kept = found.kept
        ctx.save_for_backward(directions, x, *leaves)
        (gradient,) = found.weights
        if gradient is None:
            return torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        return (wide(gradient) * wide(directions)).flatten(1).sum(1)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (cotangent,) = cotangents
        directions, *inputs = ctx.saved_tensors
        ctx.sink.clear()
        ctx.sink.add([directions], list(ctx.kept), square_norms([directions], cotangent), cotangent)
        grads = [
            None if grad is None else (wide(grad) * ctx.sink.scale).to(tensor.dtype)
            for grad, tensor in zip(ctx.sink.unscaled(), inputs, strict=True)
        ]
        if torch.is_grad_enabled():
            grads = differentiable_once("the slope of the loss", grads, [t for t in inputs if t.requires_grad])
        return (None, None, *grads)


@torch.compiler.disable
def loss_slopes(model: nn.Module, x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """d/dh CE(f(x_i + h d_i), y_i) at h = 0, that is ⟨d_i, ∇ CE(f(x_i), y_i)⟩, with f the evaluation-mode classifier.

    Without double backward where the model can be exported exactly: a forward and a vjp give the slopes, a jvp along
    the directions and a backward their gradient. Otherwise by double backward.

    Args:
        model: classifier `[N, ...]` -> logits `[N, C]`; wrappers are looked through. It is left as it was found.
        x: images `[N, ...]`.
        y: class indices `[N]`.
        directions: d `[N, ...]`, like x; held constant.

    Returns:
        `[N]`, float32 (float64 for a float64 model). Differentiable once, in the parameters and in x.

    Raises:
        TypeError, ValueError: naming the argument, its value and what was expected, before any work.
    """
    check_model(model)
    bare = unwrap(model)
    check_input(bare, x)
    if not isinstance(directions, torch.Tensor) or directions.shape != x.shape or directions.dtype != x.dtype:
        found = f"{list(directions.shape)}, {directions.dtype}" if isinstance(directions, torch.Tensor) else directions
        raise ValueError(f"directions is {found}; expected a tensor like x: {list(x.shape)}, {x.dtype}")
    engine = find_engine(bare, x, _OPTIONS.layers)
    check_labels(y, x, engine.num_classes)
    x, directions = ordinary(x), ordinary(directions).detach()
    if engine.program is None:
        return _by_double_backward(bare, x, y, directions)
    values = engine.program.bind(bare, x.shape[0])
    request = Request(engine.program, values, _OPTIONS, y, None)
    slopes: torch.Tensor = _Slopes.apply(request, directions, x, *engine.program.leaves(values))  # type: ignore[no-untyped-call]
    return slopes


def _by_double_backward(model: nn.Module, x: torch.Tensor, y: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    wants_gradient = torch.is_grad_enabled()
    with live_evaluation(model):
        source = x if x.requires_grad else x.detach().requires_grad_()
        loss = F.cross_entropy(wide(untouched_forward(model, source)), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, source, create_graph=wants_gradient)
        return (wide(gradient) * wide(directions)).flatten(1).sum(1)

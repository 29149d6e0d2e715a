"""The penalty as one `torch.autograd.Function`: its gradient is computed by linear passes, never twice backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from emr_kernels.directions import seed_derivative, seeds
from emr_kernels.linearize.chain import find_chain
from emr_kernels.linearize.point import Point
from emr_kernels.linearize.program import Program
from emr_kernels.once import differentiable_once
from emr_kernels.ops import sq_norms
from emr_kernels.options import PenaltyOptions

if TYPE_CHECKING:
    from emr_kernels.graphed import GraphCache

#: What its gradient is called where it is refused.
PENALTY = "the effective weight penalty"


@dataclass
class Request:
    """One evaluation of the penalty, and what it leaves behind beside its value.

    Attributes:
        program: the exported classifier.
        values: from `program.bind`; used up by the forward.
        y: class indices `[N]`, where the direction needs them.
        factor: what multiplies the sum of the squared norms; None leaves them unreduced.
        graphs: where passes are captured as CUDA graphs; None runs them one by one.
        norms: per-sample effective weight norms `[N]` by layer, for the caller.
    """

    program: Program
    values: list[Any]
    options: PenaltyOptions
    y: torch.Tensor | None
    factor: float | None
    graphs: GraphCache | None = None
    norms: dict[str, torch.Tensor] = field(default_factory=dict)


class _Pass:
    """The vjp pass of one class mix."""

    def __init__(self, weights: list[torch.Tensor | None], kept: list[Any]) -> None:
        self.weights = weights
        self.kept = kept


def square_norms(weights: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor:
    """Per-sample ‖·‖² of each tensor: `[layers, N]`, in float32 (float64 for float64)."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    batch = like.shape[0]
    present = [w if w.shape[0] == batch else w.reshape(batch, -1) for w in weights if w is not None]
    found = sq_norms(present).to(dtype) if present else like.new_empty((0, batch), dtype=dtype)
    if len(present) == len(weights):
        return found
    rows = iter(found.unbind())
    return torch.stack([like.new_zeros(batch, dtype=dtype) if w is None else next(rows) for w in weights])


def evaluate(request: Request, x: torch.Tensor) -> torch.Tensor:
    """Per-sample ‖w‖², summed over layers and class mixes, without any gradient: `[N]`."""
    program = request.program
    point = program.forward(request.values, x, program.plan((False,) * len(program.graph.leaves)))
    total = _all_classes(request, point, x)
    if total is not None:
        return report(request, total)
    for seed in request_seeds(request, point):
        weights, _ = program.vjp(point, seed, keep=False)
        squares = square_norms(weights, point.logits)
        total = squares if total is None else total + squares
    assert total is not None
    return report(request, total)


def _all_classes(request: Request, point: Point, x: torch.Tensor) -> torch.Tensor | None:
    """Σ_c ‖w_c‖² of a multilayer perceptron at its input, `[1, N]`, all classes at once; None for other requests."""
    options, program = request.options, request.program
    if options.direction != "all" or program.taps != (program.graph.input,):
        return None
    chain = find_chain(program, point, x.shape)
    if chain is None:
        return None
    return chain.norms(chain.centered_head() if options.center else chain.head).square().sum(1)[None]


def request_seeds(request: Request, point: Point) -> Any:
    options = request.options
    return seeds(point.logits, request.y, options.direction, options.temperature, options.center)


def report(request: Request, squares: torch.Tensor) -> torch.Tensor:
    request.norms.update(zip(request.options.layers, squares.sqrt(), strict=True))
    return squares.sum(0)


def passes(
    request: Request, x: torch.Tensor, wanted: tuple[bool, ...], wants_x: bool
) -> tuple[torch.Tensor | None, ...]:
    """Every pass of the penalty: squared norms `[layers, N]`, a scale, and gradients of x and of each leaf.

    The gradients (None where there is none) are those of half the sum of squares, divided by the scale.
    """
    program = request.program
    leaves = program.leaves(request.values)
    point = program.forward(request.values, x, program.plan(wanted, moving=request.options.moves))
    sink = Sink(program, point, leaves, x if wants_x else None, request.options.moves)
    squares = add_penalty(request, point, sink)
    return squares, sink.scale, *sink.unscaled()


def add_penalty(request: Request, point: Point, sink: Sink) -> torch.Tensor:
    """The passes after the forward; returns the squared norms `[layers, N]`, summed over class mixes."""
    total: torch.Tensor | None = None
    for seed in request_seeds(request, point):
        weights, kept = request.program.vjp(point, seed, keep=True)
        squares = square_norms(weights, point.logits)
        total = squares if total is None else total + squares
        sink.add(weights, kept, squares)
    assert total is not None
    return total


def deferred_passes(
    request: Request, x: torch.Tensor, leaves: Sequence[torch.Tensor], wanted: tuple[bool, ...], wants_x: bool
) -> tuple[Sink, list[_Pass], torch.Tensor]:
    """Forward and vjp alone, for a result `[N]`: the tangents wait for its cotangent."""
    program = request.program
    point = program.forward(request.values, x, program.plan(wanted, moving=request.options.moves))
    request.values = []
    found: list[_Pass] = []
    total: torch.Tensor | None = None
    for seed in request_seeds(request, point):
        weights, kept = program.vjp(point, seed, keep=True)
        squares = square_norms(weights, point.logits)
        total = squares if total is None else total + squares
        found.append(_Pass(weights, kept))
    assert total is not None
    return Sink(program, point, leaves, x if wants_x else None, request.options.moves), found, total


class PenaltyFunction(torch.autograd.Function):
    """x, leaves -> the sum of squared norms times the request's factor, or `[N]` squared norms without one.

    With a scalar result the gradient is computed in the forward already: nothing but gradients outlives the call.
    """

    @staticmethod
    def forward(ctx: Any, request: Request, x: torch.Tensor, *leaves: torch.Tensor) -> torch.Tensor:
        factor, wanted, wants_x = request.factor, tuple(ctx.needs_input_grad[2:]), bool(ctx.needs_input_grad[1])
        if factor is None:
            sink, deferred, unreduced = deferred_passes(request, x, leaves, wanted, wants_x)
            ctx.deferred = (sink, deferred)
            ctx.save_for_backward(x, *leaves)
            return report(request, unreduced)
        run = passes if request.graphs is None else request.graphs.run
        squares, scale, *grads = run(request, x, wanted, wants_x)
        assert squares is not None and scale is not None
        request.values = []
        ctx.deferred = None
        ctx.save_for_backward(x, *leaves, 2 * factor * scale, *grads)
        return report(request, squares).sum() * factor

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        (cotangent,) = cotangents
        count = len(ctx.needs_input_grad) - 1
        inputs, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if ctx.deferred is None:
            scale, *grads = saved
            scale = scale * cotangent
        else:
            sink, passes = ctx.deferred
            sink.clear()
            for one in passes:
                squares = square_norms(one.weights, cotangent)
                sink.add(one.weights, list(one.kept), squares, cotangent)
            scale, grads = 2 * sink.scale, sink.unscaled()
        scaled = [
            None if grad is None else (wide(grad) * scale).to(tensor.dtype)
            for grad, tensor in zip(grads, inputs, strict=True)
        ]
        if torch.is_grad_enabled():
            scaled = differentiable_once(PENALTY, scaled, [t for t in inputs if t.requires_grad])
        return (None, *scaled)


class Sink:
    """Adds up ∂⟨u, w⟩/∂θ over class mixes, with tangents scaled to order one.

    In float16 the factor 1/N² of the paper's reduction would push every product below the smallest number; so the
    tangent is divided by the largest norm in the batch, and the factor comes back in float32 at the very end.
    """

    def __init__(
        self, program: Program, point: Point, leaves: Sequence[torch.Tensor], x: torch.Tensor | None, moves: bool
    ) -> None:
        self.program = program
        self.seed_derivative = seed_derivative if moves else None
        self.point = point
        self.leaves = leaves
        self.x = x
        self.clear()

    def clear(self) -> None:
        """Start again from zero."""
        self.sums: list[torch.Tensor | None] = [None] * (len(self.leaves) + 1)
        self.scale: torch.Tensor | None = None

    def add(
        self,
        weights: list[torch.Tensor | None],
        kept: list[Any],
        squares: torch.Tensor,
        factors: torch.Tensor | None = None,
    ) -> None:
        """One class mix's contribution; `factors` `[N]` weigh the samples."""
        largest = squares.max().sqrt()
        largest = torch.where(largest > 0, largest, 1.0)
        tangents = [None if w is None else self._tangent(w, largest, factors) for w in weights]
        del weights
        grads, x_grad = self.program.pull_back(self.point, kept, tangents, self.x is not None, self.seed_derivative)
        found = [x_grad, *grads]
        if self.scale is None:
            self.sums, self.scale = found, largest
            return
        relative = largest / self.scale
        for place, grad in enumerate(found):
            if grad is not None:
                held = self.sums[place]
                scaled = wide(grad) * relative
                self.sums[place] = scaled if held is None else held + scaled

    def _tangent(self, weight: torch.Tensor, largest: torch.Tensor, factors: torch.Tensor | None) -> torch.Tensor:
        wide = weight.to(largest.dtype) / largest
        if factors is not None:
            wide = wide * factors.to(wide.dtype).view(-1, *[1] * (wide.dim() - 1))
        return wide.to(weight.dtype)

    def unscaled(self) -> list[torch.Tensor | None]:
        """For x and each leaf the sum, still to be multiplied by `scale`."""
        if self.x is not None and self.sums[0] is None:
            # A piecewise-linear classifier: the effective weight does not move with x.
            self.sums[0] = torch.zeros_like(self.x)
        return [
            None if total is None or target is None else total.view(target.shape)
            for total, target in zip(self.sums, [self.x, *self.leaves], strict=True)
        ]


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """At least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

"""The rule for every operator without one of its own: autograd on that operator alone.

The second-order term is reverse over reverse. jvp followed by vjp would lose terms through operators with
outputs that autograd does not differentiate (`native_layer_norm`'s mean and rstd).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node, Ref, flatten
from emr_kernels.linearize.rules.base import Rule, SecondOrder, Tensors

aten = torch.ops.aten

# Operators whose derivative does not change with their activations (almost everywhere).
_PIECEWISE_LINEAR = {
    aten.abs.default,
    aten.amax.default,
    aten.amin.default,
    aten.clamp.default,
    aten.clamp.Tensor,
    aten.clamp_max.default,
    aten.clamp_min.default,
    aten.hardshrink.default,
    aten.max.dim,
    aten.max.other,
    aten.maximum.default,
    aten.min.dim,
    aten.min.other,
    aten.minimum.default,
    aten.relu6.default,
    aten.rrelu.default,
    aten.sign.default,
    aten.softshrink.default,
    aten.sort.default,
    aten.threshold.default,
    aten.topk.default,
    aten.where.self,
}


class _Residual(NamedTuple):
    """The operator's inputs by value number, and the autocast state that it ran under."""

    values: dict[int, Any]
    device: str
    autocast: bool
    dtype: torch.dtype


class GenericRule(Rule):
    """Autograd on one operator."""

    curved = True
    bilinear = True
    compares = True

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        # The modulus of a complex number is curved.
        self.curved = node.target not in _PIECEWISE_LINEAR or node.is_complex  # type: ignore[misc]
        self._inputs = frozenset(node.active) | frozenset(node.weights)
        order = [ref for ref in node.refs() if ref in self._inputs]
        self._active_at = [i for i, ref in enumerate(order) if ref in node.active]
        self._weight_at = [i for i, ref in enumerate(order) if ref in node.weights]
        self._order = order

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return True

    def run(self, *args: Any) -> Any:
        """The operator itself."""
        return self.node.call(*args)

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        pairs = zip(flatten(self.node.args), flatten(args), strict=True)
        values = {leaf.index: value for leaf, value in pairs if isinstance(leaf, Ref)}
        device = next(v.device.type for v in values.values() if isinstance(v, torch.Tensor))
        residual = _Residual(values, device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        return self.run(*args), residual

    def vjp(self, residual: _Residual, cotangent: Any) -> Tensors:
        inputs, outputs = self._replay(residual, self._active_at)
        grads = self._pull(outputs, inputs, cotangent, create_graph=False)
        return tuple(grads)

    def param_vjp(self, residual: _Residual, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        # The activations' gradients are asked for too: GroupNorm's backward on the CPU crashes without them.
        at = self._active_at + [i for i, w in zip(self._weight_at, wanted, strict=True) if w]
        inputs, outputs = self._replay(residual, at)
        grads = iter(self._pull(outputs, inputs, cotangent, create_graph=False)[len(self._active_at) :])
        return tuple(next(grads) if w else None for w in wanted)

    def jvp(self, residual: _Residual, tangents: Tensors) -> Any:
        """J u as the derivative of ⟨Jᵀδ, u⟩ in δ, at δ = 0."""
        _, outputs = self._replay(residual, [])
        cotangent = [torch.zeros_like(o) if _differentiable(o) else None for o in _as_tuple(outputs)]
        given = tuple(cotangent) if isinstance(outputs, (tuple, list)) else cotangent[0]
        return self.second_order(residual, given, tangents, (False,) * len(self.node.weights), True).tangent

    def second_order(
        self, residual: _Residual, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        weight_at = [i for i, w in zip(self._weight_at, wanted, strict=True) if w]
        at = self._active_at + weight_at
        inputs, outputs = self._replay(residual, at)
        many = isinstance(outputs, (tuple, list))
        deltas = [
            (torch.zeros_like(o) if d is None else d.to(o.dtype).detach()).requires_grad_()
            if _differentiable(o)
            else None
            for o, d in zip(_as_tuple(outputs), _as_tuple(cotangent), strict=True)
        ]
        seeds = [d for d in deltas if d is not None]
        activations = inputs[: len(self._active_at)]
        pulled = self._pull(outputs, activations, tuple(deltas), create_graph=True)
        with torch.enable_grad():
            terms = [_inner(g, u) for g, u in zip(pulled, tangents, strict=True) if g is not None and u is not None]
            total = sum(terms) if terms else None
        targets = inputs + seeds
        if not isinstance(total, torch.Tensor) or not total.requires_grad:
            grads: list[torch.Tensor | None] = [None] * len(targets)
        else:
            grads = list(torch.autograd.grad(total, targets, allow_unused=True))
        found = iter(grads[len(inputs) :])
        out = [None if d is None else _or_zeros(next(found), d) for d in deltas]
        weight_grads = iter(grads[len(activations) : len(inputs)])
        return SecondOrder(
            tangent=(tuple(out) if many else out[0]) if needs_tangent else None,
            param_grads=tuple(next(weight_grads) if w else None for w in wanted),
            adjoint=tuple(grads[: len(activations)]),
        )

    def _replay(self, residual: _Residual, at: list[int]) -> tuple[list[torch.Tensor], Any]:
        """Run the operator again under autograd; the differentiable inputs at these places are its leaves."""
        chosen = set(at)
        leaves = [residual.values[ref].detach() for ref in self._order]
        for place in chosen:
            leaves[place].requires_grad_()
        supply = iter(leaves)

        def fill(arg: Any) -> Any:
            if isinstance(arg, Ref):
                return next(supply) if arg.index in self._inputs else residual.values[arg.index]
            return type(arg)(fill(item) for item in arg) if isinstance(arg, (list, tuple)) else arg

        args = fill(self.node.args)
        with (
            torch.enable_grad(),
            torch.autocast(residual.device, dtype=residual.dtype, enabled=residual.autocast, cache_enabled=False),
        ):
            outputs = self.run(*args)
        return [leaves[place] for place in at], outputs

    def _pull(
        self, outputs: Any, inputs: list[torch.Tensor], cotangent: Any, create_graph: bool
    ) -> list[torch.Tensor | None]:
        pairs = [
            (o, d.to(o.dtype) if d.dtype != o.dtype else d)
            for o, d in zip(_as_tuple(outputs), _as_tuple(cotangent), strict=True)
            if d is not None and isinstance(o, torch.Tensor) and o.requires_grad
        ]
        if not pairs or not inputs:
            return [None] * len(inputs)
        with torch.enable_grad():
            return list(
                torch.autograd.grad(
                    [o for o, _ in pairs],
                    inputs,
                    [d for _, d in pairs],
                    create_graph=create_graph,
                    allow_unused=True,
                )
            )


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _or_zeros(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Real inner product, of complex tensors as pairs of reals."""
    if a.is_complex():
        a, b = torch.view_as_real(a), torch.view_as_real(b)
    return (a * b).sum()

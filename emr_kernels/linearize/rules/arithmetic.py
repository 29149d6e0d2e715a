"""Sums, differences, products and quotients, with broadcasting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, Tensors, rule_for, sum_to

aten = torch.ops.aten


class _Shapes(NamedTuple):
    left: torch.Size
    right: torch.Size
    output: torch.Size


def _shape(value: Any) -> torch.Size:
    return value.shape if isinstance(value, torch.Tensor) else torch.Size(())


@rule_for(aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor)
class SumOfTwoRule(Rule):
    """a ± α b."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return bool(node.active)

    def _signs(self) -> tuple[float, float]:
        """The factors of the two arguments."""
        alpha = self.node.args[2]
        name = self.node.target._schema.name  # type: ignore[attr-defined]
        if name == "aten::rsub":
            return -alpha, 1
        return 1, alpha if name == "aten::add" else -alpha

    def _places(self) -> list[int]:
        return [place for place in (0, 1) if self.node.is_active(place)]

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        shapes = _shape(args[0]), _shape(args[1])
        output = self._in_place(args) if any(self.free) else None
        if output is None:
            output = self.node.call(*args)
        return output, _Shapes(*shapes, output.shape)

    def _in_place(self, args: tuple[Any, ...]) -> torch.Tensor | None:
        """The sum written over a free argument, where it has the sum's shape and dtype."""
        for place, free in zip(self._places(), self.free, strict=True):
            mine, other = args[place], args[1 - place]
            signs = self._signs()
            if free and signs[place] == 1 and _same_kind(mine, other):
                return mine.add_(other, alpha=signs[1 - place])
        return None

    def _pull(self, residual: _Shapes, cotangent: torch.Tensor, place: int) -> torch.Tensor:
        grad = sum_to(cotangent, residual[place])
        sign = self._signs()[place]
        return grad if sign == 1 else grad * sign

    def vjp(self, residual: _Shapes, cotangent: Any) -> Tensors:
        return tuple(self._pull(residual, cotangent, place) for place in self._places())

    def param_vjp(self, residual: _Shapes, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        places = [place for place in (0, 1) if self.node.is_weight(place)]
        return tuple(
            self._pull(residual, cotangent, place) if want else None for place, want in zip(places, wanted, strict=True)
        )

    def jvp(self, residual: _Shapes, tangents: Tensors) -> Any:
        both: list[Any] = [None, None]
        for place, tangent in zip(self._places(), tangents, strict=True):
            both[place] = tangent
        left, right = both
        signs = self._signs()
        if left is None or right is None:
            only, sign = (right, signs[1]) if left is None else (left, signs[0])
            total = only if sign == 1 else only * sign
        else:
            total = self._in_place((left, right)) if any(self.free) else None
            if total is None:
                total = torch.add(left if signs[0] == 1 else left * signs[0], right, alpha=signs[1])
        return total.expand(residual.output) if total.shape != residual.output else total


def _same_kind(a: Any, b: Any) -> bool:
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return tensors and a.shape == b.shape and a.dtype == b.dtype


class _Factors(NamedTuple):
    left: Any  # an activation's value is kept only where a derivative needs it
    right: Any
    shapes: _Shapes

    def factor(self, place: int) -> Any:
        """The left (0) or right (1) factor's value."""
        return self.right if place else self.left


@rule_for(aten.mul.Tensor, aten.mul.Scalar)
class ProductRule(Rule):
    """a · b, of an activation with a constant, a leaf or another activation."""

    bilinear = True

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.curved = len(node.active) == 2  # type: ignore[misc]

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return bool(node.active)

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        output = self.node.call(*args)
        left, right = args[:2]
        keep_left = not self.node.is_active(0) or self.curved or (primal and self.node.is_weight(1))
        keep_right = not self.node.is_active(1) or self.curved or (primal and self.node.is_weight(0))
        shapes = _Shapes(_shape(left), _shape(right), output.shape)
        return output, _Factors(left if keep_left else None, right if keep_right else None, shapes)

    def _active_places(self) -> list[int]:
        return [place for place in (0, 1) if self.node.is_active(place)]

    def vjp(self, residual: _Factors, cotangent: Any) -> Tensors:
        return tuple(
            sum_to(cotangent * residual.factor(1 - place), residual.shapes[place]) for place in self._active_places()
        )

    def jvp(self, residual: _Factors, tangents: Tensors) -> Any:
        terms = [
            tangent * residual.factor(1 - place)
            for place, tangent in zip(self._active_places(), tangents, strict=True)
            if tangent is not None
        ]
        total = terms[0] if len(terms) == 1 else terms[0] + terms[1]
        shape = residual.shapes.output
        return total.expand(shape) if total.shape != shape else total

    def adjoint(self, residual: _Factors, cotangent: Any, tangents: Tensors) -> Tensors:
        """⟨δ, u_a b + a u_b⟩ has the derivative δ u_b in a, and δ u_a in b."""
        if not self.curved:
            return (None,)
        left, right = tangents
        return (
            None if right is None else sum_to(cotangent * right, residual.shapes.left),
            None if left is None else sum_to(cotangent * left, residual.shapes.right),
        )

    def param_grads(self, residual: _Factors, cotangent: Any, tangents: Tensors, wanted: Sequence[bool]) -> Tensors:
        (tangent,) = tangents
        return self._weight_grad(residual, cotangent, tangent, wanted)

    def param_vjp(self, residual: _Factors, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        operand = residual.factor(self._active_places()[0])
        return self._weight_grad(residual, cotangent, operand, wanted)

    def _weight_grad(
        self, residual: _Factors, cotangent: torch.Tensor, operand: Any, wanted: Sequence[bool]
    ) -> Tensors:
        place = 1 - self._active_places()[0]
        return tuple(sum_to(cotangent * operand, residual.shapes[place]) if want else None for want in wanted)


@rule_for(aten.div.Tensor, aten.div.Scalar)
class QuotientRule(Rule):
    """a / b for a constant b."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return len(node.active) == 1 and node.is_active(0) and not node.weights

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        output = self.node.call(*args)
        return output, (args[0].shape, args[1])

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        shape, divisor = residual
        return (sum_to(cotangent / divisor, shape),)

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        return tangents[0] / residual[1]


@rule_for(aten.neg.default)
class NegationRule(Rule):
    """−a."""

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        return -args[0], None

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        return (-cotangent,)

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return -tangents[0]

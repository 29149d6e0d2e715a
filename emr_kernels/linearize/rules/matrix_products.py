"""Matrix products of two values: activations, parameters, constants; and the softmax between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, SecondOrder, Tensors, rule_for, sum_to

aten = torch.ops.aten


class _Product(NamedTuple):
    """The factors as (batches of) matrices, None where no derivative needs one; and the shapes of all three."""

    left: torch.Tensor | None
    right: torch.Tensor | None
    shapes: tuple[torch.Size, torch.Size, torch.Size]

    def factor(self, place: int) -> torch.Tensor:
        """The left (0) or right (1) one."""
        tensor = self.right if place else self.left
        assert tensor is not None
        return tensor

    @property
    def matrices(self) -> tuple[torch.Size, torch.Size]:
        """The factors' shapes, a vector as one row on the left and one column on the right."""
        left, right, _ = self.shapes
        row = torch.Size((1, *left)) if len(left) == 1 else left
        return row, torch.Size((*right, 1)) if len(right) == 1 else right

    def as_matrix(self, tensor: torch.Tensor, place: int) -> torch.Tensor:
        """A tensor of the left (0) or right (1) factor's shape, or of the product's (2), without vectors."""
        left, right = self.matrices
        if place < 2:
            return tensor.reshape((left, right)[place])
        return tensor.reshape(*torch.broadcast_shapes(left[:-2], right[:-2]), left[-2], right[-1])

    def times(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """The product of two tensors of the factors' shapes."""
        return (self.as_matrix(left, 0) @ self.as_matrix(right, 1)).reshape(self.shapes[2])

    def pulled(self, cotangent: torch.Tensor, place: int, other: torch.Tensor) -> torch.Tensor:
        """The cotangent of one factor, `other` in the place of the other one."""
        delta, other = self.as_matrix(cotangent, 2), self.as_matrix(other, 1 - place)
        if place == 0:
            grad = delta @ other.transpose(-2, -1)
        elif len(self.shapes[1]) <= 2 and other.dim() > 2:
            # One matrix for the whole batch: a single product sums over it.
            grad = other.flatten(0, -2).T @ delta.flatten(0, -2)
        else:
            grad = other.transpose(-2, -1) @ delta
        return sum_to(grad, self.matrices[place]).reshape(self.shapes[place])


@rule_for(aten.matmul.default, aten.bmm.default, aten.mm.default)
class MatrixProductRule(Rule):
    """A B, with vectors and broadcasting as `torch.matmul` has them."""

    bilinear = True
    matmul = True

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.curved = len(node.active) == 2  # type: ignore[misc]
        self._active = [place for place in (0, 1) if node.is_active(place)]
        arguments = {arg.index: place for place, arg in enumerate(node.args[:2]) if node.is_weight(place)}
        self._leaves = [arguments[ref] for ref in node.weights]

    @classmethod
    def accepts(cls, node: Node) -> bool:
        # Not a value by itself, which is two places and one activation.
        places = sum(node.is_active(place) for place in (0, 1))
        leaves = sum(node.is_weight(place) for place in (0, 1))
        return 0 < places == len(node.active) and leaves == len(node.weights)

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        left, right = args
        output = self.node.call(*args)
        keep_left = self.curved or 1 in self._active or primal
        keep_right = self.curved or 0 in self._active or primal
        shapes = (left.shape, right.shape, output.shape)
        return output, _Product(left if keep_left else None, right if keep_right else None, shapes)

    def vjp(self, residual: _Product, cotangent: Any) -> Tensors:
        return tuple(residual.pulled(cotangent, place, residual.factor(1 - place)) for place in self._active)

    def jvp(self, residual: _Product, tangents: Tensors) -> Any:
        total: torch.Tensor | None = None
        for place, tangent in zip(self._active, tangents, strict=True):
            if tangent is not None:
                other = residual.factor(1 - place)
                term = residual.times(other, tangent) if place else residual.times(tangent, other)
                total = term if total is None else total.add_(term)
        return total

    def adjoint(self, residual: _Product, cotangent: Any, tangents: Tensors) -> Tensors:
        """⟨δ, U B + A V⟩ has the derivative δ Vᵀ in A, and Uᵀ δ in B."""
        if not self.curved:
            return (None,)
        left, right = tangents
        return (
            None if right is None else residual.pulled(cotangent, 0, right),
            None if left is None else residual.pulled(cotangent, 1, left),
        )

    def param_grads(self, residual: _Product, cotangent: Any, tangents: Tensors, wanted: Sequence[bool]) -> Tensors:
        return self._leaf_grads(residual, cotangent, tangents[0], wanted)

    def param_vjp(self, residual: _Product, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        return self._leaf_grads(residual, cotangent, residual.factor(self._active[0]), wanted)

    def _leaf_grads(self, residual: _Product, cotangent: Any, operand: Any, wanted: Sequence[bool]) -> Tensors:
        """Of the factor that is a leaf, `operand` in the place of the other."""
        return tuple(
            residual.pulled(cotangent, place, operand) if want else None
            for place, want in zip(self._leaves, wanted, strict=True)
        )


class _Probabilities(NamedTuple):
    values: torch.Tensor
    dim: int

    def through(self, vector: torch.Tensor) -> torch.Tensor:
        """Π v = P ∘ (v − Σ P v), the Jacobian, which is its own transpose."""
        p = self.values
        result: torch.Tensor = aten._softmax_backward_data.default(vector.to(p.dtype), p, self.dim, p.dtype)
        return result


@rule_for(aten.softmax.int, aten._softmax.default)
class SoftmaxRule(Rule):
    """P = softmax(x) along one extent."""

    curved = True
    full_precision = True

    @classmethod
    def accepts(cls, node: Node) -> bool:
        # Neither another dtype of the result nor half of it to float.
        return super().accepts(node) and (len(node.args) < 3 or not node.args[2])

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        output = self.node.call(*args)
        return output, _Probabilities(output, args[1])

    def vjp(self, residual: _Probabilities, cotangent: Any) -> Tensors:
        return (residual.through(cotangent),)

    def jvp(self, residual: _Probabilities, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return residual.through(tangents[0])

    def second_order(
        self, residual: _Probabilities, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        """⟨δ, Π u⟩ has in P, up to a constant that Π takes away, the derivative δ ∘ (u − Σ P u) − u Σ P δ."""
        (tangent,) = tangents
        assert tangent is not None
        p, dim = residual
        mean = (p * tangent).sum(dim, keepdim=True)
        bent = (tangent - mean).mul_(cotangent).addcmul_(tangent, (p * cotangent).sum(dim, keepdim=True), value=-1)
        out = residual.through(tangent) if needs_tangent else None
        return SecondOrder(out, (None,) * len(wanted), (residual.through(bent),))

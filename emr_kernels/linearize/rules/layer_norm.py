"""LayerNorm: its Jacobian and the derivative of that in closed form.

Over one normalised row of D elements, with x̂ = (x − mean) r and Π u = u − mean(u) − x̂ mean(x̂ u),

    y = w ∘ x̂ + b        J u = w ∘ r Π u,    Jᵀδ = r Π g  with g = w ∘ δ

    ∂⟨δ, J u⟩/∂x = −r (x̂ mean(g ∘ r Π u) + mean(x̂ u) r Π g + mean(x̂ g) r Π u),    ∂⟨δ, J u⟩/∂w = δ ∘ r Π u

PyTorch's own backward computes r Π of anything in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, SecondOrder, Tensors, rule_for, sum_to
from emr_kernels.ops._format import compute_dtype

aten = torch.ops.aten


class _Norm(NamedTuple):
    input: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    mean: torch.Tensor
    rstd: torch.Tensor
    shape: Sequence[int]
    eps: float

    def pulled(self, rows: torch.Tensor, weight: torch.Tensor | None, mask: tuple[bool, bool, bool]) -> Any:
        """r Π (weight ∘ rows), and what an ordinary backward pass gives the weight and the bias."""
        return aten.native_layer_norm_backward.default(
            rows.to(self.input.dtype), self.input, self.shape, self.mean, self.rstd, weight, self.bias, list(mask)
        )


@rule_for(aten.layer_norm.default)
class LayerNormRule(Rule):
    """layer_norm of an activation; its weight and bias are parameters, constants or absent."""

    curved = True
    bilinear = True
    full_precision = True
    fresh = True
    light = True

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return node.is_active(0) and len(node.active) == 1

    def _places(self) -> list[int]:
        """For each of `node.weights`, 2 for the weight and 3 for the bias."""
        places = {arg.index: i for i, arg in enumerate(self.node.args[:4]) if self.node.is_weight(i)}
        return [places[ref] for ref in self.node.weights]

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input, shape, weight, bias, eps = (*args, *(None, None, 1e-5)[len(args) - 2 :])[:5]
        output, mean, rstd = aten.native_layer_norm.default(input, shape, weight, bias, eps)
        return output, _Norm(input, weight, bias, mean, rstd, shape, eps)

    def remake(self, residual: _Norm) -> torch.Tensor:
        input, weight, bias, _, _, shape, eps = residual
        output: torch.Tensor = aten.native_layer_norm.default(input, shape, weight, bias, eps)[0]
        return output

    def vjp(self, residual: _Norm, cotangent: Any) -> Tensors:
        return (residual.pulled(cotangent, residual.weight, (True, False, False))[0],)

    def jvp(self, residual: _Norm, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return _times(self._through(residual, tangents[0]), residual.weight)

    @staticmethod
    def _through(residual: _Norm, tangent: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = residual.pulled(tangent, None, (True, False, False))[0]
        return result

    def param_vjp(self, residual: _Norm, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        return self.backward(residual, cotangent, wanted, False, False)[0]

    def backward(
        self, residual: _Norm, cotangent: Any, wanted: Sequence[bool], needs_input: bool, free: bool
    ) -> tuple[Tensors, Tensors]:
        wants = {place for place, want in zip(self._places(), wanted, strict=True) if want}
        grad, *others = residual.pulled(cotangent, residual.weight, (needs_input, 2 in wants, 3 in wants))
        grads = tuple(others[p - 2] if want else None for p, want in zip(self._places(), wanted, strict=True))
        return grads, (grad if needs_input else None,)

    def second_order(
        self, residual: _Norm, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        (tangent,) = tangents
        assert tangent is not None
        input, weight = residual.input, residual.weight
        through = self._through(residual, tangent)
        space = tuple(range(-len(residual.shape), 0))
        grads = tuple(
            sum_to(cotangent * through, residual.shape) if want and place == 2 else None
            for place, want in zip(self._places(), wanted, strict=True)
        )
        dtype = compute_dtype(input)
        rstd = residual.rstd.to(dtype)
        unit = (input.to(dtype) - residual.mean).mul_(rstd)
        seed = _times(cotangent, weight).to(dtype)
        back = self.vjp(residual, cotangent)[0]
        assert back is not None
        adjoint = back.to(dtype).mul_((unit * tangent).mean(space, keepdim=True))
        adjoint = adjoint.addcmul_(through, (unit * seed).mean(space, keepdim=True))
        adjoint = adjoint.addcmul_(unit, (seed * through).mean(space, keepdim=True)).mul_(-rstd)
        out = _times(through, weight) if needs_tangent else None
        return SecondOrder(out, grads, (adjoint.to(input.dtype),))


def _times(tensor: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    return tensor if weight is None else tensor * weight.to(tensor.dtype)

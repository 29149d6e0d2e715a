"""Activation functions, element by element: J is a diagonal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from emr_kernels import ops
from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, SecondOrder, Tensors, reusable, rule_for

aten = torch.ops.aten


class _Bits(NamedTuple):
    """One bit for each unit: 1 where it is in its identity branch. Packed in the order of `memory_format`."""

    bits: torch.Tensor
    memory_format: torch.memory_format


class _MaskRule(Rule):
    """Two-piece activations with slope 1 or `slope`: one bit for each unit is all that is kept."""

    fresh = True
    slope = 0.0

    def _masked(self, residual: _Bits, vector: torch.Tensor, overwrite: bool) -> torch.Tensor:
        return ops.affine_relu_vjp(
            vector,
            residual.bits,
            negative_slope=self.slope,
            memory_format=residual.memory_format,
            out=reusable(vector, residual.memory_format, overwrite),
        )

    def vjp(self, residual: _Bits, cotangent: Any) -> Tensors:
        return (self._masked(residual, cotangent, False),)

    def vjp_into(self, residual: _Bits, cotangent: Any) -> Tensors:
        return (self._masked(residual, cotangent, True),)

    def jvp(self, residual: _Bits, tangents: Tensors) -> Any:
        # The Jacobian is diagonal, so it is its own transpose.
        assert tangents[0] is not None
        return self._masked(residual, tangents[0], self.free[0])


@rule_for(aten.relu.default, aten.leaky_relu.default)
class ReluRule(_MaskRule):
    """relu and leaky_relu."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self.slope = float(node.args[1]) if len(node.args) > 1 else 0.0

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        place = reusable(args[0], ops.dense_format(args[0]), self.free[0])
        output, bits = ops.affine_relu(args[0], negative_slope=self.slope, out=place)
        return output, _Bits(bits, ops.dense_format(output))


@rule_for(aten.hardtanh.default, aten.relu6.default)
class HardtanhRule(_MaskRule):
    """hardtanh and relu6: the identity strictly inside their limits."""

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        low, high = args[1:] if len(args) > 1 else (0.0, 6.0)
        input = args[0].contiguous(memory_format=ops.dense_format(args[0]))
        inside = (input > low) & (input < high)
        return aten.hardtanh.default(input, low, high), _Bits(ops.pack_bits(inside), ops.dense_format(input))


class _PreluResidual(NamedTuple):
    positive: torch.Tensor
    weight: torch.Tensor
    input: torch.Tensor | None


@rule_for(aten.prelu.default)
class PreluRule(Rule):
    """x where positive, else weight * x, the weight single or one for each channel."""

    bilinear = True

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return node.is_active(0) and len(node.active) == 1 and len(node.weights) <= 1

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input, weight = args[0], args[1].to(args[0].dtype)
        return aten.prelu.default(input, weight), _PreluResidual(input > 0, weight, input if primal else None)

    def _scaled(self, residual: _PreluResidual, vector: torch.Tensor) -> torch.Tensor:
        weight = residual.weight
        if weight.numel() > 1:
            weight = weight.view(-1, *[1] * (vector.dim() - 2))
        return torch.where(residual.positive, vector, vector * weight)

    def vjp(self, residual: _PreluResidual, cotangent: Any) -> Tensors:
        return (self._scaled(residual, cotangent),)

    def jvp(self, residual: _PreluResidual, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return self._scaled(residual, tangents[0])

    def _weight_grad(self, residual: _PreluResidual, cotangent: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        product = (cotangent * operand).masked_fill_(residual.positive, 0)
        if residual.weight.numel() > 1:
            return product.sum((0, *range(2, product.dim())))
        return product.sum().view_as(residual.weight)

    def param_grads(self, residual: Any, cotangent: Any, tangents: Tensors, wanted: Sequence[bool]) -> Tensors:
        assert tangents[0] is not None
        return tuple(self._weight_grad(residual, cotangent, tangents[0]) if w else None for w in wanted)

    def param_vjp(self, residual: Any, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        return tuple(self._weight_grad(residual, cotangent, residual.input) if w else None for w in wanted)


class _SmoothRule(Rule):
    """A smooth function of each element: keeps its input, knows f' and f''."""

    curved = True
    fresh = True
    light = True

    @property
    def options(self) -> tuple[Any, ...]:
        return self.node.args[1:]

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        return self.node.call(*args), args[0]

    def remake(self, residual: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.node.call(residual, *self.options)
        return output

    def slope_times(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """f'(x) * vector."""
        raise NotImplementedError

    def curvature(self, x: torch.Tensor) -> torch.Tensor:
        """f''(x)."""
        raise NotImplementedError

    def vjp(self, residual: torch.Tensor, cotangent: Any) -> Tensors:
        return (self.slope_times(residual, cotangent),)

    def jvp(self, residual: torch.Tensor, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return self.slope_times(residual, tangents[0])

    def adjoint(self, residual: torch.Tensor, cotangent: Any, tangents: Tensors) -> Tensors:
        assert tangents[0] is not None
        return (self.curvature(residual).mul_(cotangent).mul_(tangents[0]),)


@rule_for(aten.gelu.default, aten.silu.default)
class FusedSmoothRule(_SmoothRule):
    """gelu, exact or by tanh, and silu: each derivative is one pass over memory."""

    @property
    def kind(self) -> str:
        """As `ops.smooth_vjp` calls it."""
        if self.node.target is aten.silu.default:
            return "silu"
        return "gelu" if self.options[0] == "none" else "gelu_tanh"

    def slope_times(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return ops.smooth_vjp(vector, x, self.kind)

    def vjp_into(self, residual: torch.Tensor, cotangent: Any) -> Tensors:
        return (ops.smooth_vjp(cotangent, residual, self.kind, out=_place(cotangent, residual, True)),)

    def second_order(
        self, residual: torch.Tensor, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        (tangent,) = tangents
        assert tangent is not None
        place = _place(tangent, residual, self.free[0])
        out, bend = ops.smooth_jvp(tangent, residual, cotangent, self.kind, out=place)
        return SecondOrder(out if needs_tangent else None, (), (bend,))


def _place(vector: torch.Tensor, like: torch.Tensor, allowed: bool) -> torch.Tensor | None:
    return reusable(vector, ops.dense_format(like), allowed)


@rule_for(aten.softplus.default)
class SoftplusRule(_SmoothRule):
    """log(1 + exp(βx))/β, the identity where βx exceeds the threshold."""

    full_precision = True

    def slope_times(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        beta, threshold = self.options
        return aten.softplus_backward.default(vector, x, beta, threshold)

    def curvature(self, x: torch.Tensor) -> torch.Tensor:
        beta, threshold = self.options
        s = torch.sigmoid(beta * x)
        return torch.where(x * beta > threshold, 0.0, beta * s * (1 - s))


@rule_for(aten.elu.default)
class EluRule(_SmoothRule):
    """scale · x where positive, else scale · α(exp(input_scale · x) − 1)."""

    def slope_times(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        alpha, scale, input_scale = self.options
        return aten.elu_backward.default(vector, alpha, scale, input_scale, False, x)

    def curvature(self, x: torch.Tensor) -> torch.Tensor:
        alpha, scale, input_scale = self.options
        bent = (alpha * scale * input_scale**2) * torch.exp(input_scale * x)
        return torch.where(x > 0, 0.0, bent)


@rule_for(aten.sigmoid.default)
class SigmoidRule(_SmoothRule):
    """σ(x);  f'' = σ(1 − σ)(1 − 2σ)."""

    def slope_times(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return aten.sigmoid_backward.default(vector, torch.sigmoid(x))

    def curvature(self, x: torch.Tensor) -> torch.Tensor:
        s = torch.sigmoid(x)
        return s * (1 - s) * (1 - 2 * s)


@rule_for(aten.tanh.default)
class TanhRule(_SmoothRule):
    """tanh x;  f'' = −2t(1 − t²)."""

    def slope_times(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        return aten.tanh_backward.default(vector, torch.tanh(x))

    def curvature(self, x: torch.Tensor) -> torch.Tensor:
        t = F.tanh(x)
        return -2 * t * (1 - t * t)


@rule_for(aten.hardsigmoid.default)
class HardsigmoidRule(_SmoothRule):
    """Slope 1/6 between −3 and 3, else 0."""

    curved = False

    def slope_times(self, x: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        # The operator's own backward rounds 1/6 to float32 whatever the dtype.
        return torch.where((x > -3) & (x < 3), vector / 6, 0.0)

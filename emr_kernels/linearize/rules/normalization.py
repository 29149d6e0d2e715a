"""BatchNorm with evaluation statistics: one scale and one shift for each channel."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels import ops
from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, SecondOrder, Tensors, reusable, rule_for

aten = torch.ops.aten


class Affine(NamedTuple):
    """y = scale * a + shift with scale = γ/σ, shift = β − scale * mean; all [C]. No scale: a neighbour applies it."""

    scale: torch.Tensor | None
    shift: torch.Tensor
    mean: torch.Tensor
    inverse_std: torch.Tensor

    @classmethod
    def of(
        cls,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        mean: torch.Tensor,
        variance: torch.Tensor,
        eps: float,
    ) -> Affine:
        """From BatchNorm's parameters and running statistics."""
        inverse_std = torch.rsqrt(variance + eps)
        scale = inverse_std if weight is None else weight * inverse_std
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        return cls(scale, shift, mean, inverse_std)


class BatchNormCall(NamedTuple):
    """Where a BatchNorm operator keeps its arguments; None where it uses the batch's own statistics."""

    weight: int
    bias: int
    mean: int
    variance: int
    eps: int

    @classmethod
    def of(cls, node: Node) -> BatchNormCall | None:
        """The places for a node with evaluation statistics that depend on neither x nor a leaf."""
        if node.target is aten.batch_norm.default:
            if node.args[5] is not False or node.args[3] is None:
                return None
            call = cls(1, 2, 3, 4, 7)
        elif node.target is aten._native_batch_norm_legit_no_training.default:
            call = cls(1, 2, 3, 4, 6)
        else:
            return None
        return call if node.is_active(0) and len(node.active) == 1 else None

    def affine(self, args: tuple[Any, ...]) -> Affine:
        """The map of these argument values."""
        return Affine.of(args[self.weight], args[self.bias], args[self.mean], args[self.variance], args[self.eps])


def channelwise(vector: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[C] to a shape that broadcasts over `like` [N, C, ...], in its dtype."""
    return vector.to(like.dtype).view(1, -1, *[1] * (like.dim() - 2))


def channel_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over everything but the channels, at least in float32."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.sum((0, *range(2, tensor.dim())), dtype=dtype)


class Residual(NamedTuple):
    """What BatchNorm's rules keep: no bits without a ReLU, an input only where its own gradient will be asked for."""

    affine: Affine
    bits: torch.Tensor | None
    memory_format: torch.memory_format
    input: torch.Tensor | None


class AffineReluRule(Rule):
    """BatchNorm with evaluation statistics, alone or with the (leaky) ReLU after it as one operator.

    The leaves are BatchNorm's weight and bias; running statistics that require grad are not supported here.
    """

    bilinear = True
    fresh = True

    def __init__(self, node: Node, slope: float | None = None, call: BatchNormCall | None = None) -> None:
        super().__init__(node)
        call = call or BatchNormCall.of(node)
        assert call is not None
        self.call = call
        self.slope = slope
        self._fixed: Affine | None = None

    def frozen(self, args: tuple[Any, ...]) -> Rule:
        rule = copy.copy(self)
        rule._fixed = self.call.affine(args)
        return rule

    def _affine(self, args: tuple[Any, ...]) -> Affine:
        return self.call.affine(args) if self._fixed is None else self._fixed

    @property
    def scale_place(self) -> int | None:
        """Which of `node.weights` is BatchNorm's weight; None if it is a constant."""
        places = self._places()
        return places.index(self.call.weight) if self.call.weight in places else None

    def _places(self) -> list[int]:
        places = {arg.index: i for i, arg in enumerate(self.node.args[:5]) if self.node.is_weight(i)}
        return [places[ref] for ref in self.node.weights]

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input = args[0]
        affine = self._affine(args)
        bits, memory_format = None, torch.contiguous_format
        if self.slope is None:
            assert affine.scale is not None
            output = torch.addcmul(channelwise(affine.shift, input), input, channelwise(affine.scale, input))
        else:
            output, bits = ops.affine_relu(
                input,
                affine.scale,
                affine.shift,
                negative_slope=self.slope,
                out=reusable(input, ops.dense_format(input), self.free[0] and not primal),
            )
            memory_format = ops.dense_format(output)
        residual = Residual(affine, bits, memory_format, input if primal else None)
        return output, residual

    @staticmethod
    def unscaled(residual: Residual) -> Residual:
        """The linear map without its scale, for a scale that the neighbouring layers apply; see `scales`."""
        return residual._replace(affine=residual.affine._replace(scale=None))

    def _scaled(self, residual: Residual, vector: torch.Tensor, overwrite: bool) -> torch.Tensor:
        scale = residual.affine.scale
        if residual.bits is None:
            return vector if scale is None else vector * channelwise(scale, vector)
        return ops.affine_relu_vjp(
            vector,
            residual.bits,
            scale,
            negative_slope=self.slope or 0.0,
            memory_format=residual.memory_format,
            out=reusable(vector, residual.memory_format, overwrite),
        )

    def vjp(self, residual: Residual, cotangent: Any) -> Tensors:
        return (self._scaled(residual, cotangent, False),)

    def vjp_into(self, residual: Residual, cotangent: Any) -> Tensors:
        return (self._scaled(residual, cotangent, True),)

    def vjp_onto(self, residual: Residual, cotangent: Any, held: torch.Tensor, free: bool) -> torch.Tensor | None:
        if residual.bits is None or held.dtype != cotangent.dtype:
            return None
        return ops.affine_relu_vjp(
            cotangent,
            residual.bits,
            residual.affine.scale,
            negative_slope=self.slope or 0.0,
            skip=held,
            memory_format=residual.memory_format,
            out=reusable(cotangent, residual.memory_format, free),
        )

    def jvp(self, residual: Residual, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return self._scaled(residual, tangents[0], self.free[0])

    def second_order(
        self, residual: Any, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        (tangent,) = tangents
        assert tangent is not None
        places = self._places()
        wants_scale = any(want and place == self.call.weight for place, want in zip(places, wanted, strict=True))
        if not wants_scale:
            out = self.jvp(residual, tangents) if needs_tangent else None
            return SecondOrder(out, (None,) * len(wanted), (None,))
        if residual.bits is None:
            out = self.jvp(residual, tangents) if needs_tangent else None
            product = channel_sum(cotangent * tangent)
        else:
            out, scale_product = ops.affine_relu_jvp(
                tangent,
                residual.bits,
                residual.affine.scale,
                negative_slope=self.slope or 0.0,
                delta=cotangent,
                memory_format=residual.memory_format,
                out=reusable(tangent, residual.memory_format, self.free[0]),
            )
            assert scale_product is not None
            product = scale_product
        grad = product * residual.affine.inverse_std
        grads = tuple(
            grad if want and place == self.call.weight else None for place, want in zip(places, wanted, strict=True)
        )
        return SecondOrder(out, grads, (None,))

    def backward(
        self, residual: Any, cotangent: Any, wanted: Sequence[bool], needs_input: bool, free: bool
    ) -> tuple[Tensors, Tensors]:
        if not any(wanted):
            return super().backward(residual, cotangent, wanted, needs_input, free)
        if residual.bits is not None:
            cotangent = ops.affine_relu_vjp(
                cotangent,
                residual.bits,
                negative_slope=self.slope or 0.0,
                memory_format=residual.memory_format,
                out=reusable(cotangent, residual.memory_format, free),
            )
            free = True
        affine, grads = residual.affine, self._sums(residual, cotangent, wanted)
        if not needs_input:
            return grads, (None,)
        assert affine.scale is not None
        scale = channelwise(affine.scale, cotangent)
        return grads, (cotangent.mul_(scale) if free else cotangent * scale,)

    def _sums(self, residual: Residual, cotangent: torch.Tensor, wanted: Sequence[bool]) -> Tensors:
        """dγ = Σ δ (a − mean)/σ and dβ = Σ δ for the cotangent δ of the affine map."""
        wants = {place for place, want in zip(self._places(), wanted, strict=True) if want}
        if self.call.weight not in wants:
            return tuple(channel_sum(cotangent) if want else None for want in wanted)
        assert residual.input is not None
        affine = residual.affine
        # One fused pass; an eps of zero, as the variance here is 1/inverse_std² itself.
        _, scale_grad, shift_grad = aten.native_batch_norm_backward.default(
            cotangent,
            residual.input,
            None,
            affine.mean,
            affine.inverse_std.square().reciprocal(),
            None,
            None,
            False,
            0.0,
            [False, True, True],
        )
        return tuple(
            (scale_grad if place == self.call.weight else shift_grad) if want else None
            for place, want in zip(self._places(), wanted, strict=True)
        )


@rule_for(aten.batch_norm.default)
class BatchNormRule(AffineReluRule):
    """BatchNorm alone."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return BatchNormCall.of(node) is not None


@rule_for(aten._native_batch_norm_legit_no_training.default)
class FunctionalBatchNormRule(AffineReluRule):
    """BatchNorm as functionalisation writes it: its output is the first of three."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return BatchNormCall.of(node) is not None

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        output, residual = super().forward(args, primal)
        return (output, None, None), residual

    def vjp(self, residual: Residual, cotangent: Any) -> Tensors:
        return super().vjp(residual, cotangent[0])

    def vjp_into(self, residual: Residual, cotangent: Any) -> Tensors:
        return super().vjp(residual, cotangent[0])

    def jvp(self, residual: Residual, tangents: Tensors) -> Any:
        return super().jvp(residual, tangents), None, None

    def second_order(
        self, residual: Any, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        return super().second_order(residual, cotangent[0], tangents, wanted, needs_tangent)

    def backward(
        self, residual: Any, cotangent: Any, wanted: Sequence[bool], needs_input: bool, free: bool
    ) -> tuple[Tensors, Tensors]:
        if not any(wanted):
            return (None,) * len(wanted), super().vjp(residual, cotangent[0]) if needs_input else (None,)
        return super().backward(residual, cotangent[0], wanted, needs_input, False)

"""Convolutions and linear layers: bilinear in weight and activation, so J does not depend on the activation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels import ops
from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules import folded, winograd
from emr_kernels.linearize.rules.base import Rule, Tensors, rule_for
from emr_kernels.linearize.rules.packed import PackedConvolution, linear

aten = torch.ops.aten


class _ConvResidual(NamedTuple):
    input_like: torch.Tensor
    weight: torch.Tensor
    options: tuple[Any, ...]
    input: torch.Tensor | None


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same shape, strides and dtype that holds no memory of its own kind.

    `convolution_backward` picks its memory format from the strides of its input argument, so an expanded dummy
    (stride 0) would lose channels_last.
    """
    return torch.empty_like(tensor, device="meta")


class BilinearRule(Rule):
    """Shared by all layers y = W * a + b: `_weight_grad(δ, a)` serves both ⟨δ, W u⟩ and the primal."""

    bilinear = True
    matmul = True
    fresh = True
    weight_dims = 0
    """Dimensions of the weight where the rule knows them (2: a linear layer)."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return node.active == (node.args[0].index,) if node.is_active(0) else False

    @property
    def weight_place(self) -> int | None:
        """Which of `node.weights` is the weight; None if it is a constant."""
        positions = self._positions()
        return positions.index(1) if 1 in positions else None

    def spread(self, residual: Any, scale: torch.Tensor, reads: bool) -> torch.Tensor:
        """One factor for each input channel (or output channel), in a shape that broadcasts over the weight."""
        raise NotImplementedError

    def channel_sums(self, residual: Any, products: torch.Tensor, reads: bool) -> torch.Tensor:
        """The sum over the weights that read each input channel (or write each output channel)."""
        raise NotImplementedError

    def scaled(self, residual: Any, scales: Sequence[tuple[torch.Tensor, bool]]) -> Any:
        """The residual with its weight times the scales of the BatchNorms around the layer; see `scales`."""
        weight = residual.weight
        for scale, reads in scales:
            weight = weight * self.spread(residual, scale, reads)
        return residual._replace(weight=weight.to(residual.weight.dtype))

    def _positions(self) -> list[int]:
        """For each of `node.weights`, 1 for the weight and 2 for the bias."""
        arguments = {arg.index: place for place, arg in enumerate(self.node.args[:3]) if self.node.is_weight(place)}
        return [arguments[ref] for ref in self.node.weights]

    def _weight_grad(self, residual: Any, cotangent: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def param_grads(self, residual: Any, cotangent: Any, tangents: Tensors, wanted: Sequence[bool]) -> Tensors:
        (tangent,) = tangents
        assert tangent is not None
        return tuple(
            self._weight_grad(residual, cotangent, tangent) if place == 1 and want else None
            for place, want in zip(self._positions(), wanted, strict=True)
        )

    def param_vjp(self, residual: Any, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        grads: list[torch.Tensor | None] = []
        for place, want in zip(self._positions(), wanted, strict=True):
            if not want:
                grads.append(None)
            elif place == 1:
                grads.append(self._weight_grad(residual, cotangent, residual.input))
            else:
                grads.append(self._bias_grad(cotangent))
        return tuple(grads)

    def _bias_grad(self, cotangent: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@rule_for(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)
class ConvolutionRule(BilinearRule):
    """Every convolution, plain or transposed."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        self._packed: PackedConvolution | None = None

    def frozen(self, args: tuple[Any, ...]) -> Rule:
        input, weight, bias = args[:3]
        rule = copy.copy(self)
        rule._packed = PackedConvolution.of(input, weight, bias, self._options(weight))
        return rule

    def _options(self, weight: torch.Tensor) -> tuple[Any, ...]:
        """(stride, padding, dilation, transposed, output_padding, groups), each extent written out."""
        name = self.node.target._schema.name.split("::")[1]  # type: ignore[attr-defined]
        dims = weight.dim() - 2
        rest = self.node.args[3:]
        if name == "convolution":
            stride, padding, dilation, transposed, output_padding, groups = rest
        elif name.startswith("conv_transpose"):
            stride, padding, output_padding, groups, dilation = rest
            transposed = True
        else:
            stride, padding, dilation, groups = rest
            transposed, output_padding = False, 0
        dilation = _extents(dilation, dims)
        if padding == "valid":
            padding = 0
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
            padding = [t // 2 for t in total]
        return (
            _extents(stride, dims),
            _extents(padding, dims),
            dilation,
            transposed,
            _extents(output_padding, dims),
            groups,
        )

    @classmethod
    def accepts(cls, node: Node) -> bool:
        # "same" with an even kernel pads one side more: not a plain convolution, left to the generic rule.
        if len(node.args) > 4 and node.args[4] == "same":
            return False
        return super().accepts(node)

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input, weight, bias = args[:3]
        options = self._options(weight)
        if self._packed is not None and self._packed.takes(input):
            output = self._packed.forward(input, plain=self.compared)
        elif not self.compared and winograd.serves(input, weight, options, once=True):
            output = winograd.convolution(input, ops.winograd_weight(weight), len(weight), bias, options[1])
        else:
            output = aten.convolution.default(input, weight, bias, *options)
        return output, _ConvResidual(_shape_of(input), weight, options, input if primal else None)

    def vjp(self, residual: _ConvResidual, cotangent: Any) -> Tensors:
        if folded.serves(cotangent, residual.weight, residual.options):
            like = residual.input_like
            grad = folded.vjp(cotangent, residual.weight, residual.options, like.shape)
            return (grad.contiguous(memory_format=ops.dense_format(like)),)
        if self._packed is not None and self._packed.weight is residual.weight and self._packed.takes(cotangent):
            return (self._packed.vjp(cotangent, residual.input_like.shape),)
        if winograd.serves(cotangent, residual.weight, residual.options, once=True):
            padding = [2 - pad for pad in residual.options[1]]
            turned = ops.winograd_weight(residual.weight, True)
            return (winograd.convolution(cotangent, turned, residual.weight.shape[1], None, padding),)
        dummy = torch.empty_like(residual.input_like, device=cotangent.device)
        grad, _, _ = aten.convolution_backward.default(
            cotangent, dummy, residual.weight, None, *residual.options, [True, False, False]
        )
        return (grad,)

    def jvp(self, residual: _ConvResidual, tangents: Tensors) -> Any:
        (tangent,) = tangents
        assert tangent is not None
        weight, options = residual.weight, residual.options
        if winograd.serves(tangent, weight, options, once=True):
            return winograd.convolution(tangent, ops.winograd_weight(weight), len(weight), None, options[1])
        return aten.convolution.default(tangent, weight, None, *options)

    def _weight_grad(self, residual: _ConvResidual, cotangent: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        if all(winograd.serves(t, residual.weight, residual.options, once=True) for t in (operand, cotangent)):
            images, rows = (t.permute(0, 2, 3, 1) for t in (operand, cotangent))
            return ops.winograd_weight_grad(images, rows, residual.options[1])
        grad: torch.Tensor = aten.convolution_backward.default(
            cotangent, operand, residual.weight, None, *residual.options, [False, True, False]
        )[1]
        return grad

    def _bias_grad(self, cotangent: torch.Tensor) -> torch.Tensor:
        return cotangent.sum((0, *range(2, cotangent.dim())))

    def spread(self, residual: _ConvResidual, scale: torch.Tensor, reads: bool) -> torch.Tensor:
        weight = residual.weight
        _, _, _, transposed, _, groups = residual.options
        kernel = [1] * (weight.dim() - 2)
        if bool(transposed) == reads:
            return scale.view(-1, 1, *kernel)
        # The second extent counts the channels of one group.
        rows = scale.view(groups, 1, weight.shape[1]).expand(-1, weight.shape[0] // groups, -1)
        return scale.view(1, -1, *kernel) if groups == 1 else rows.reshape(*weight.shape[:2], *kernel)

    def channel_sums(self, residual: _ConvResidual, products: torch.Tensor, reads: bool) -> torch.Tensor:
        _, _, _, transposed, _, groups = residual.options
        # [groups, first extent in a group, second extent in a group, kernel]
        grouped = products.reshape(groups, products.shape[0] // groups, products.shape[1], -1)
        first = bool(transposed) == reads
        return grouped.sum((2, 3) if first else (1, 3)).flatten()


class _LinearResidual(NamedTuple):
    weight: torch.Tensor
    input: torch.Tensor | None


@rule_for(aten.linear.default)
class LinearRule(BilinearRule):
    """y = a Wᵀ + b over the last extent."""

    weight_dims = 2

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input, weight, bias = args
        return linear(input, weight, bias), _LinearResidual(weight, input if primal else None)

    def vjp(self, residual: _LinearResidual, cotangent: Any) -> Tensors:
        return (linear(cotangent, residual.weight.T, None),)

    def jvp(self, residual: _LinearResidual, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return linear(tangents[0], residual.weight, None)

    def _weight_grad(self, residual: _LinearResidual, cotangent: torch.Tensor, operand: torch.Tensor) -> torch.Tensor:
        return cotangent.flatten(0, -2).T @ operand.flatten(0, -2)

    def _bias_grad(self, cotangent: torch.Tensor) -> torch.Tensor:
        return cotangent.flatten(0, -2).sum(0)

    def spread(self, residual: _LinearResidual, scale: torch.Tensor, reads: bool) -> torch.Tensor:
        return scale.view(1, -1) if reads else scale.view(-1, 1)

    def channel_sums(self, residual: _LinearResidual, products: torch.Tensor, reads: bool) -> torch.Tensor:
        return products.sum(0 if reads else 1)


def _extents(value: Any, dims: int) -> list[int]:
    if isinstance(value, int):
        return [value] * dims
    return list(value) * dims if len(value) == 1 else list(value)

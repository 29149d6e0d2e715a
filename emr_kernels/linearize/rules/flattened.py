"""A linear layer on flattened images, for images whose channels lie side by side (channels_last)."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.rules.base import Rule, Tensors
from emr_kernels.linearize.rules.packed import linear

_FORMAT = torch.channels_last


def by_pixels(weight: torch.Tensor, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """The weight [D, C·H·W] of a layer that reads flattened images of this shape [C, H, W], for images [H, W, C]."""
    return weight.view(len(weight), *shape).permute(0, 2, 3, 1).reshape(len(weight), -1)


class _Residual(NamedTuple):
    weight: torch.Tensor
    shape: torch.Size
    ordered: bool  # whether the weight is that of `by_pixels`


class FlattenedLinearRule(Rule):
    """flatten, then y = a Wᵀ + b, of a program whose parameters stay as they are: forward, vjp and jvp.

    Flattening copies images whose channels lie side by side, and so does its vjp. The weight in the images' own order
    spares both; it is made once, where the rule is frozen.
    """

    matmul = True
    fresh = True

    def __init__(self, node: Any) -> None:
        super().__init__(node)
        self._ordered: torch.Tensor | None = None

    def frozen(self, args: tuple[Any, ...]) -> Rule:
        input, weight = args[:2]
        rule = copy.copy(self)
        if input.is_contiguous(memory_format=_FORMAT) and not input.is_contiguous():
            rule._ordered = by_pixels(weight, input.shape[1:])
        return rule

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input, weight, bias = args
        ordered = self._ordered
        if ordered is not None and ordered.dtype is weight.dtype and input.is_contiguous(memory_format=_FORMAT):
            residual = _Residual(ordered, input.shape, True)
        else:
            residual = _Residual(weight, input.shape, False)
        return linear(_rows(residual, input), residual.weight, bias), residual

    def vjp(self, residual: _Residual, cotangent: Any) -> Tensors:
        rows = linear(cotangent, residual.weight.T, None)
        if not residual.ordered:
            return (rows.view(residual.shape),)
        samples, channels, height, width = residual.shape
        return (rows.view(samples, height, width, channels).permute(0, 3, 1, 2),)

    def jvp(self, residual: _Residual, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return linear(_rows(residual, tangents[0]), residual.weight, None)


def _rows(residual: _Residual, images: torch.Tensor) -> torch.Tensor:
    """The images as rows of numbers, in the order that the weight reads them."""
    return (images.permute(0, 2, 3, 1) if residual.ordered else images).flatten(1)

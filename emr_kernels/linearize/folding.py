"""What `scales` means for the linear passes: residuals with BatchNorm scales moved, and gradients moved back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.plan import Planner
from emr_kernels.linearize.point import Point
from emr_kernels.linearize.rules import Rule
from emr_kernels.linearize.rules.convolution import BilinearRule
from emr_kernels.linearize.rules.normalization import AffineReluRule


def linear_residual(rules: Sequence[Rule], planner: Planner, point: Point, place: int) -> Any:
    """A call's residual as the linear passes use it: BatchNorm scales moved into the layers around them."""
    residual, plan = point.residuals[place], point.plan
    rule = rules[place]
    if place in plan.folded:
        assert isinstance(rule, AffineReluRule)
        return rule.unscaled(residual)
    if place in plan.folding:
        assert isinstance(rule, BilinearRule)
        return rule.scaled(residual, _scales(planner, point, place))
    return residual


def _scales(planner: Planner, point: Point, place: int) -> list[tuple[torch.Tensor, bool]]:
    """The BatchNorm scales that a layer applies, and whether it reads that BatchNorm (else: feeds it)."""
    norms = point.plan.folding[place]
    return [(point.residuals[norm].affine.scale, planner.scale_sources[norm].reads) for norm in norms]


class Unfolded(NamedTuple):
    """A layer's gradients without the scales folded into it, and those of the scales, by leaf."""

    layer: Sequence[torch.Tensor | None]
    norms: list[tuple[int, torch.Tensor]]


def unfolded(
    rules: Sequence[Rule], planner: Planner, point: Point, place: int, found: Sequence[torch.Tensor | None]
) -> Unfolded:
    """From the gradients that a layer with folded scales found, its own and those of the BatchNorms' scales."""
    norms = point.plan.folding.get(place)
    if norms is None:
        return Unfolded(found, [])
    layer = rules[place]
    assert isinstance(layer, BilinearRule) and layer.weight_place is not None
    residual = point.residuals[place]
    weight_grad = found[layer.weight_place]
    assert weight_grad is not None
    factors = [(layer.spread(residual, scale, reads), reads) for scale, reads in _scales(planner, point, place)]
    products = residual.weight.to(torch.promote_types(residual.weight.dtype, torch.float32)) * weight_grad
    of_norms = []
    for norm, (_, reads) in zip(norms, factors, strict=True):
        others = [factor for factor, side in factors if side != reads]
        weighted = products * others[0] if others else products
        inverse_std = point.residuals[norm].affine.inverse_std
        of_norms.append((point.plan.folded[norm], layer.channel_sums(residual, weighted, reads) * inverse_std))
    for factor, _ in factors:
        weight_grad = weight_grad * factor
    return Unfolded([weight_grad if i == layer.weight_place else grad for i, grad in enumerate(found)], of_norms)

"""One of several outputs, and slices of a tensor as several."""

from __future__ import annotations

import operator
from typing import Any

import torch

from emr_kernels.linearize.rules.base import Rule, Tensors, rule_for
from emr_kernels.linearize.rules.linear_maps import Spec

aten = torch.ops.aten


@rule_for(aten.unbind.int)
class UnbindRule(Rule):
    """Slices along one extent."""

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        return self.node.call(*args), Spec.of(args[0])

    def vjp(self, residual: Spec, cotangent: Any) -> Tensors:
        # Laid out like the input, so that a permutation before it costs no copy.
        grad = residual.empty()
        for place, part in zip(grad.unbind(self.node.args[1]), cotangent, strict=True):
            if part is None:
                place.zero_()
            else:
                place.copy_(part)
        return (grad,)

    def jvp(self, residual: Spec, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return tangents[0].unbind(self.node.args[1])


@rule_for(operator.getitem)
class PickRule(Rule):
    """One output of an operator that has several."""

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        outputs, place = args
        return outputs[place], len(outputs)

    def vjp(self, residual: int, cotangent: Any) -> Tensors:
        outputs: list[Any] = [None] * residual
        outputs[self.node.args[1]] = cotangent
        return (tuple(outputs),)  # type: ignore[return-value]

    def jvp(self, residual: int, tangents: Tensors) -> Any:
        outputs: Any = tangents[0]
        return outputs[self.node.args[1]]

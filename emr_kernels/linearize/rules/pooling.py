"""Max-pooling: the winners' places are what is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, Tensors, rule_for

aten = torch.ops.aten


class _Residual(NamedTuple):
    winners: torch.Tensor
    like: torch.Tensor
    options: tuple[Any, ...]


@rule_for(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
class MaxPoolRule(Rule):
    """Largest value of each window; the tangent is gathered from the winners' places."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        name = node.target._schema.name  # type: ignore[attr-defined]
        self.dims = int(name[-2])
        # A window over one extent is one over two of which the first is 1.
        self.lifted = self.dims == 1

    def _options(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        window, stride, padding, dilation, ceil_mode = args
        stride = stride or window
        if self.lifted:
            one = [1, 1, 0, 1]
            window, stride, padding, dilation = (
                [first, *value] for first, value in zip(one, (window, stride, padding, dilation), strict=True)
            )
        return window, stride, padding, dilation, ceil_mode

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input = args[0].unsqueeze(-2) if self.lifted else args[0]
        options = self._options(args[1:])
        operator = aten.max_pool3d_with_indices if self.dims == 3 else aten.max_pool2d_with_indices
        output, winners = operator.default(input, *options)
        residual = _Residual(winners, torch.empty_like(input, device="meta"), options)
        return output.squeeze(-2) if self.lifted else output, residual

    def vjp(self, residual: _Residual, cotangent: Any) -> Tensors:
        delta = cotangent.unsqueeze(-2) if self.lifted else cotangent
        operator = aten.max_pool3d_with_indices_backward if self.dims == 3 else aten.max_pool2d_with_indices_backward
        dummy = torch.empty_like(residual.like, device=delta.device)
        grad = operator.default(delta, dummy, *residual.options, residual.winners)
        return (grad.squeeze(-2) if self.lifted else grad,)

    def jvp(self, residual: _Residual, tangents: Tensors) -> Any:
        (tangent,) = tangents
        assert tangent is not None
        spatial = 3 if self.dims == 3 else 2
        places = residual.winners
        flat = tangent.reshape(*tangent.shape[: tangent.dim() - self.dims], -1)
        out = flat.gather(-1, places.flatten(-spatial)).view(places.shape)
        return out.squeeze(-2) if self.lifted else out

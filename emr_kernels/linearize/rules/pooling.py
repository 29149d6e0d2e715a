"""Max-pooling: the winners' places are what is kept."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node
from emr_kernels.linearize.rules.base import Rule, Tensors, rule_for
from emr_kernels.linearize.rules.linear_maps import LinearMapRule

aten = torch.ops.aten


class _Residual(NamedTuple):
    winners: torch.Tensor
    like: torch.Tensor
    options: tuple[Any, ...]


@rule_for(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
class MaxPoolRule(Rule):
    """Largest value of each window; the tangent is gathered from the winners' places."""

    compares = True

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


@rule_for(
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.adaptive_avg_pool3d.default,
    aten.avg_pool1d.default,
    aten.avg_pool2d.default,
    aten.avg_pool3d.default,
)
class AveragePoolRule(LinearMapRule):
    """Averages over windows; over the whole image it is a mean, whose vjp copies nothing and so has no layout."""

    def _spans(self, input: torch.Tensor, output: torch.Tensor) -> bool:
        """Whether the one window of each channel is the whole image."""
        dims = output.dim() - 2
        if dims < 1 or any(extent != 1 for extent in output.shape[2:]):
            return False
        if "adaptive" in str(self.node.target):
            return True
        kernel, padding = self.node.args[1], self.node.args[3]
        kernel = tuple(kernel) if isinstance(kernel, (list, tuple)) else (kernel,)
        padding = tuple(padding) if isinstance(padding, (list, tuple)) else (padding,)
        divisor = self.node.args[6] if len(self.node.args) > 6 else None
        whole = (kernel * dims if len(kernel) == 1 else kernel) == tuple(input.shape[2:])
        return whole and not any(padding) and divisor is None

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        output, residual = super().forward(args, primal)
        return output, (residual, self._spans(args[0], output))

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        inner, spans = residual
        if not spans:
            return super().vjp(inner, cotangent)
        shape = inner.specs[0].shape
        return ((cotangent / torch.Size(shape[2:]).numel()).expand(shape),)

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        return super().jvp(residual[0], tangents)

"""Operators that are linear in all their activations (and leaves) at once: shapes, sums, pools, padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from emr_kernels.linearize.graph import Node, Ref, flatten
from emr_kernels.linearize.rules.base import Rule, Tensors, rule_for, sum_to

aten = torch.ops.aten


class Spec(NamedTuple):
    """Enough of a tensor to make an empty one like it."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Spec:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)

    def empty(self) -> torch.Tensor:
        if 0 in self.stride:
            return torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class LinearMapResidual(NamedTuple):
    """What an operator that is linear in its tensors keeps."""

    values: dict[int, Any]  # inputs that are not differentiated
    specs: list[Spec]  # the differentiated ones, an entry an occurrence


@rule_for(
    aten.cat.default,
    aten.chunk.default,
    aten.constant_pad_nd.default,
    aten.cumsum.default,
    aten.diagonal.default,
    aten.expand_as.default,
    aten.flip.default,
    aten.gather.default,
    aten.index_select.default,
    aten.masked_fill.Scalar,
    aten.movedim.int,
    aten.narrow.default,
    aten.pad.default,
    aten.pixel_shuffle.default,
    aten.reflection_pad1d.default,
    aten.reflection_pad2d.default,
    aten.reflection_pad3d.default,
    aten.repeat.default,
    aten.replication_pad1d.default,
    aten.replication_pad2d.default,
    aten.replication_pad3d.default,
    aten.roll.default,
    aten.select.int,
    aten.select_scatter.default,
    aten.slice.Tensor,
    aten.slice_scatter.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.stack.default,
    aten.tril.default,
    aten.triu.default,
    aten.upsample_bicubic2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_linear1d.vec,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten.upsample_trilinear3d.vec,
)
class LinearMapRule(Rule):
    """jvp applies the operator to the tangents; vjp is autograd on an input of no particular value."""

    def __init__(self, node: Node) -> None:
        super().__init__(node)
        name = node.target._schema.name  # type: ignore[attr-defined]
        # Autocast keeps sums, and what has no low-precision kernel everywhere, in float32.
        self.full_precision = any(part in name for part in ("pool", "cumsum", "upsample", "_pad"))
        self._inputs = frozenset(node.active) | frozenset(node.weights)
        self._order = [ref for ref in node.refs() if ref in self._inputs]
        self._active_at = [i for i, ref in enumerate(self._order) if ref in node.active]
        self._weight_at = [i for i, ref in enumerate(self._order) if ref in node.weights]

    @classmethod
    def accepts(cls, node: Node) -> bool:
        # pad with a mode is composite; every mode is linear up to a constant.
        return True

    def apply(self, values: dict[int, Any], inputs: Sequence[torch.Tensor]) -> Any:
        """The operator with these tensors in the differentiated places."""
        supply = iter(inputs)

        def fill(arg: Any) -> Any:
            if isinstance(arg, Ref):
                return next(supply) if arg.index in self._inputs else values[arg.index]
            return type(arg)(fill(item) for item in arg) if isinstance(arg, (list, tuple)) else arg

        return self.node.call(*fill(self.linear_args()))

    def linear_args(self) -> tuple[Any, ...]:
        """The arguments of the linear part: a constant that the operator fills in is left out."""
        args = self.node.args
        if self.node.target is aten.constant_pad_nd.default:
            return (*args[:2], 0)
        if self.node.target is aten.pad.default and args[2] == "constant":
            return (*args[:3], 0.0)
        if self.node.target is aten.masked_fill.Scalar:
            return (*args[:2], 0)
        return args

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        values: dict[int, Any] = {}
        specs: list[Spec] = []
        for leaf, value in zip(flatten(self.node.args), flatten(args), strict=True):
            if isinstance(leaf, Ref):
                if leaf.index in self._inputs:
                    specs.append(Spec.of(value))
                else:
                    values[leaf.index] = value
        return self.node.call(*args), LinearMapResidual(values, specs)

    def _pull(self, residual: LinearMapResidual, cotangent: Any, at: list[int]) -> Tensors:
        with torch.enable_grad():
            inputs = [spec.empty() for spec in residual.specs]
            for place in at:
                inputs[place].requires_grad_()
            outputs = self.apply(residual.values, inputs)
            many = isinstance(outputs, (tuple, list))
            pairs = [
                (o, d)
                for o, d in zip(outputs if many else (outputs,), cotangent if many else (cotangent,), strict=True)
                if d is not None
            ]
            return torch.autograd.grad(
                [o for o, _ in pairs], [inputs[i] for i in at], [d for _, d in pairs], allow_unused=True
            )

    def vjp(self, residual: LinearMapResidual, cotangent: Any) -> Tensors:
        return self._pull(residual, cotangent, self._active_at) if self._active_at else ()

    def jvp(self, residual: LinearMapResidual, tangents: Tensors) -> Any:
        given = iter(tangents)
        inputs: list[torch.Tensor] = []
        for place, spec in enumerate(residual.specs):
            tangent = next(given) if place in self._active_at else None
            inputs.append(spec.zeros() if tangent is None else tangent)
        return self.apply(residual.values, inputs)

    def param_vjp(self, residual: LinearMapResidual, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        at = [i for i, w in zip(self._weight_at, wanted, strict=True) if w]
        grads = iter(self._pull(residual, cotangent, at) if at else ())
        return tuple(next(grads) if w else None for w in wanted)


@rule_for(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
)
class ReshapeRule(Rule):
    """The same elements in another shape."""

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input = args[0]
        # The engine's own memory format may differ from the exported one, where a view was possible.
        if self.node.target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
            output = input.reshape(args[1])
        elif self.node.target is aten.unflatten.int:
            axis = args[1] % input.dim()
            output = input.reshape(*input.shape[:axis], *args[2], *input.shape[axis + 1 :])
        else:
            output = self.node.call(*args)
        return output, (input.shape, output.shape)

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        return (cotangent.reshape(residual[0]),)

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return tangents[0].reshape(residual[1])


@rule_for(aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default, aten.numpy_T.default)
class PermuteRule(Rule):
    """The same elements in another order of extents."""

    def _order(self, dims: int) -> list[int]:
        if self.node.target is aten.permute.default:
            return [d % dims for d in self.node.args[1]]
        order = list(range(dims))
        if self.node.target in (aten.transpose.int, aten.mT.default):
            a, b = self.node.args[1:] or (-2, -1)
            order[a], order[b] = order[b], order[a]
            return order
        return order[::-1]

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        order = self._order(args[0].dim())
        return args[0].permute(order), order

    def vjp(self, residual: list[int], cotangent: Any) -> Tensors:
        return (cotangent.permute([residual.index(d) for d in range(len(residual))]),)

    def jvp(self, residual: list[int], tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return tangents[0].permute(residual)


@rule_for(aten.mean.dim, aten.mean.default, aten.sum.dim_IntList, aten.sum.default)
class SumRule(Rule):
    """Sums and means over some extents."""

    full_precision = True

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input = args[0]
        dims = args[1] if self.node.target in (aten.mean.dim, aten.sum.dim_IntList) else None
        axes = [d % input.dim() for d in dims] if dims else list(range(input.dim()))
        return self.node.call(*args), (input.shape, axes)

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        shape, axes = residual
        kept = [1 if d in axes else n for d, n in enumerate(shape)]
        grad = cotangent.reshape(kept)
        if self.node.target in (aten.mean.dim, aten.mean.default):
            grad = grad / max(1, torch.Size(shape[d] for d in axes).numel())
        return (grad.expand(shape),)

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        return self.node.call(tangents[0], *self.node.args[1:])


@rule_for(aten.expand.default)
class ExpandRule(Rule):
    """Broadcasting made explicit."""

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        output = self.node.call(*args)
        return output, (args[0].shape, output.shape)

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        return (sum_to(cotangent, residual[0]),)

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        assert tangents[0] is not None
        return tangents[0].expand(residual[1])


@rule_for(
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
)
class IdentityRule(Rule):
    """Dropout in evaluation mode, and copies."""

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        return args[0], None

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        return (cotangent,)

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        return tangents[0]


@rule_for(aten.copy.default)
class CopyRule(Rule):
    """The second argument in the shape and dtype of the first, whose values are overwritten."""

    @classmethod
    def accepts(cls, node: Node) -> bool:
        return True

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        target, source = args[:2]
        return source.to(target.dtype).expand(target.shape), (source.shape, target.shape)

    def _active_places(self) -> list[int]:
        return [place for place in (0, 1) if self.node.is_active(place)]

    def vjp(self, residual: Any, cotangent: Any) -> Tensors:
        return tuple(sum_to(cotangent, residual[0]) if p == 1 else None for p in self._active_places())

    def jvp(self, residual: Any, tangents: Tensors) -> Any:
        for place, tangent in zip(self._active_places(), tangents, strict=True):
            if place == 1 and tangent is not None:
                return tangent.expand(residual[1])
        return None

    def param_vjp(self, residual: Any, cotangent: Any, wanted: Sequence[bool]) -> Tensors:
        places = [place for place in (0, 1) if self.node.is_weight(place)]
        return tuple(
            sum_to(cotangent, residual[0]) if want and place == 1 else None
            for place, want in zip(places, wanted, strict=True)
        )

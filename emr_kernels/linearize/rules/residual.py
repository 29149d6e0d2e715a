"""The end of a post-activation residual block: BatchNorm, the addition of the shortcut and (leaky) ReLU as one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from emr_kernels import ops
from emr_kernels.linearize.rules.base import SecondOrder, Tensors, reusable
from emr_kernels.linearize.rules.normalization import AffineReluRule, Residual, channelwise


class AffineAddReluRule(AffineReluRule):
    """relu(scale * a + shift + skip); the second activation is the skip, the last of the node's arguments."""

    # Without a scale of its own the cotangents of both activations are one tensor.
    fresh = False

    def forward(self, args: tuple[Any, ...], primal: bool) -> tuple[Any, Any]:
        input, skip = args[0], args[-1]
        affine = self._affine(args)
        dtype = torch.promote_types(input.dtype, skip.dtype)
        wide = input.to(dtype)
        output, bits = ops.affine_relu(
            wide,
            affine.scale,
            affine.shift,
            skip.to(dtype),
            negative_slope=self.slope or 0.0,
            out=reusable(wide, ops.dense_format(wide), self.free[0] and not primal),
        )
        return output, Residual(affine, bits, ops.dense_format(output), input if primal else None)

    def _masked(self, residual: Residual, vector: torch.Tensor, overwrite: bool) -> torch.Tensor:
        assert residual.bits is not None
        return ops.affine_relu_vjp(
            vector,
            residual.bits,
            negative_slope=self.slope or 0.0,
            memory_format=residual.memory_format,
            out=reusable(vector, residual.memory_format, overwrite),
        )

    def _both(self, residual: Residual, cotangent: torch.Tensor, overwrite: bool) -> Tensors:
        masked = self._masked(residual, cotangent, overwrite)
        scale = residual.affine.scale
        return (masked if scale is None else masked * channelwise(scale, masked)), masked

    def vjp(self, residual: Residual, cotangent: Any) -> Tensors:
        return self._both(residual, cotangent, False)

    def vjp_into(self, residual: Residual, cotangent: Any) -> Tensors:
        return self._both(residual, cotangent, True)

    def vjp_onto(self, residual: Residual, cotangent: Any, held: torch.Tensor, free: bool) -> torch.Tensor | None:
        return None

    def jvp(self, residual: Residual, tangents: Tensors) -> Any:
        (tangent, skip), scale = tangents, residual.affine.scale
        if tangent is None:
            assert skip is not None
            return self._masked(residual, skip, self.free[1])
        scaled = tangent if scale is None else tangent * channelwise(scale, tangent)
        owned = scale is not None or self.free[0]
        if skip is not None:
            same = owned and scaled.dtype == torch.promote_types(scaled.dtype, skip.dtype)
            scaled, owned = scaled.add_(skip) if same else scaled + skip, True
        return self._masked(residual, scaled, owned)

    def second_order(
        self, residual: Any, cotangent: Any, tangents: Tensors, wanted: Sequence[bool], needs_tangent: bool
    ) -> SecondOrder:
        tangent, places = tangents[0], self._places()
        wants = [want and place == self.call.weight for place, want in zip(places, wanted, strict=True)]
        grad = None
        if any(wants) and tangent is not None:
            _, product = ops.affine_relu_jvp(
                tangent.to(cotangent.dtype),
                residual.bits,
                negative_slope=self.slope or 0.0,
                delta=cotangent,
                memory_format=residual.memory_format,
            )
            assert product is not None
            grad = product * residual.affine.inverse_std
        out = self.jvp(residual, tangents) if needs_tangent else None
        return SecondOrder(out, tuple(grad if want else None for want in wants), (None, None))

    def backward(
        self, residual: Any, cotangent: Any, wanted: Sequence[bool], needs_input: bool, free: bool
    ) -> tuple[Tensors, Tensors]:
        masked = self._masked(residual, cotangent, free)
        grads: Tensors = (None,) * len(wanted)
        if any(wanted):
            like = residual.input
            grads = self._sums(residual, masked if like is None else masked.to(like.dtype), wanted)
        if not needs_input:
            return grads, (None, None)
        assert residual.affine.scale is not None
        return grads, (masked * channelwise(residual.affine.scale, masked), masked)

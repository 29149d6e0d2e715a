"""Layers by a weight that stays what it is, in float32 on the CPU by oneDNN.

Convolutions keep the weight in the layout that oneDNN works in. `aten::convolution` brings it there at every call, on
one thread for the small ones and between two waits for all threads; for wide layers at small batches that is a tenth
and more of the call. The weight of a linear layer needs no packing; between many features and few classes oneDNN's
products run at up to three times the speed of the library that `aten::linear` calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

mkldnn = torch.ops.mkldnn
#: Products of fewer multiplications are done before oneDNN has found its kernel.
_LEAST_PRODUCT = 1 << 20


def _serves(*tensors: torch.Tensor) -> bool:
    enabled = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return enabled and all(t.device.type == "cpu" and t.dtype is torch.float32 for t in tensors)


class PackedConvolution:
    """One 2d convolution, forward and vjp, on channels_last float32 tensors on the CPU.

    Attributes:
        weight: as it was before packing.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, options: tuple[Any, ...]) -> None:
        self.weight = weight
        self._bias = bias
        self._stride, self._padding, self._dilation, _, _, self._groups = options
        self._forward_weight: torch.Tensor | None = None
        self._vjp_weights: dict[tuple[int, ...], torch.Tensor] = {}

    @classmethod
    def of(
        cls, input: Any, weight: torch.Tensor, bias: torch.Tensor | None, options: tuple[Any, ...]
    ) -> PackedConvolution | None:
        """The packed convolution; None where oneDNN would not run it, or packing does not pay."""
        _, _, _, transposed, _, groups = options
        if transposed or groups != 1 or weight.dim() != 4 or not _serves(input, weight):
            return None
        return cls(weight, bias, options)

    @staticmethod
    def takes(tensor: torch.Tensor) -> bool:
        """Whether an input or a cotangent is laid out for it."""
        return tensor.dtype is torch.float32 and tensor.is_contiguous(memory_format=torch.channels_last)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The convolution of the input, [N, C, H, W], and its bias."""
        geometry = (self._padding, self._stride, self._dilation, self._groups)
        if self._forward_weight is None:
            self._forward_weight = mkldnn._reorder_convolution_weight(self.weight, *geometry, list(input.shape))
        output: torch.Tensor = mkldnn._convolution_pointwise(
            input, self._forward_weight, self._bias, *geometry, "none", [], ""
        )
        return output

    def vjp(self, cotangent: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The cotangent of an input of this shape, by the transposed convolution."""
        # What the strides leave over at the end of each extent.
        rest = tuple(
            extent - ((out - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
            for extent, out, stride, padding, dilation, kernel in zip(
                shape[2:],
                cotangent.shape[2:],
                self._stride,
                self._padding,
                self._dilation,
                self.weight.shape[2:],
                strict=True,
            )
        )
        geometry = (self._padding, list(rest), self._stride, self._dilation, self._groups)
        if rest not in self._vjp_weights:
            self._vjp_weights[rest] = mkldnn._reorder_convolution_transpose_weight(
                self.weight, *geometry, list(cotangent.shape)
            )
        result: torch.Tensor = mkldnn._convolution_transpose_pointwise(
            cotangent, self._vjp_weights[rest], None, *geometry, "none", [], ""
        )
        return result


class PackedLinear:
    """One linear layer, forward and vjp.

    Attributes:
        weight: `[D, H]`.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self._bias = bias

    @classmethod
    def of(cls, input: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> PackedLinear | None:
        """The layer; None where oneDNN would not run it."""
        return cls(weight, bias) if _serves(input, weight) and weight.dim() == 2 else None

    def takes(self, tensor: torch.Tensor) -> bool:
        """Whether the product with an input or a cotangent is large enough."""
        rows = tensor.numel() // max(1, tensor.shape[-1])
        return tensor.dtype is torch.float32 and rows * self.weight.numel() >= _LEAST_PRODUCT

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The product of the input, [..., H], and the bias."""
        output: torch.Tensor = mkldnn._linear_pointwise(input, self.weight, self._bias, "none", [], "")
        return output

    def vjp(self, cotangent: torch.Tensor) -> torch.Tensor:
        """The cotangent of the input."""
        result: torch.Tensor = mkldnn._linear_pointwise(cotangent, self.weight.t(), None, "none", [], "")
        return result

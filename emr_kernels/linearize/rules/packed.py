"""What oneDNN computes faster than the operators of `aten`, in float32 on the CPU.

Convolutions by a weight that stays what it is keep it in the layout that oneDNN works in: `aten::convolution` brings it
there at every call, on one thread for the small ones and between two waits for all threads; for wide layers at small
batches that is a tenth and more of the call. (Where `winograd` serves, what is kept is the weight of that.) Products
with a linear layer's weight need no packing; they run at up to three times the speed of the library that
`aten::linear` calls where few classes come out of many features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from emr_kernels import ops
from emr_kernels.linearize.rules import winograd

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
        self._options = options
        self._stride, self._padding, self._dilation, _, _, self._groups = options
        self._winograd_weights: dict[bool, torch.Tensor] = {}
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

    def forward(self, input: torch.Tensor, plain: bool = False) -> torch.Tensor:
        """The convolution of the input, [N, C, H, W], and its bias; plain: the same for equal neighbourhoods."""
        if not plain and winograd.serves(input, self.weight, self._options, once=False):
            return winograd.convolution(
                input, self._winograd_weight(False), len(self.weight), self._bias, self._padding
            )
        geometry = (self._padding, self._stride, self._dilation, self._groups)
        if self._forward_weight is None:
            self._forward_weight = mkldnn._reorder_convolution_weight(self.weight, *geometry, list(input.shape))
        output: torch.Tensor = mkldnn._convolution_pointwise(
            input, self._forward_weight, self._bias, *geometry, "none", [], ""
        )
        return output

    def vjp(self, cotangent: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The cotangent of an input of this shape, by the transposed convolution."""
        if winograd.serves(cotangent, self.weight, self._options, once=False):
            padding = [2 - pad for pad in self._padding]
            return winograd.convolution(cotangent, self._winograd_weight(True), self.weight.shape[1], None, padding)
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

    def _winograd_weight(self, transposed: bool) -> torch.Tensor:
        if transposed not in self._winograd_weights:
            self._winograd_weights[transposed] = ops.winograd_weight(self.weight, transposed)
        return self._winograd_weights[transposed]


def linear(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """input Wᵀ + bias: [..., H] and [D, H] to [..., D]."""
    rows = input.numel() // max(1, input.shape[-1])
    if not _serves(input, weight) or rows * weight.numel() < _LEAST_PRODUCT:
        return F.linear(input, weight, bias)
    output: torch.Tensor = mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return output

"""What is measured of convolutions with few multiplications, beside the library's own; and of FAB's projection."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.micro.entry import Entry, Inputs, Make, shape_name
from emr_kernels import ops
from emr_kernels.ops.to_hyperplane import to_hyperplane_reference
from emr_kernels.ops.winograd import TO_WEIGHT

#: Images, height and width, channels in and out: stages of wide residual networks.
_LAYERS = (((16, 8, 32, 32), 0), ((16, 32, 64, 64), 1), ((16, 8, 256, 256), 1), ((64, 16, 128, 128), 2))
_ONLY = (torch.float32,)


def _images(tensor: torch.Tensor) -> torch.Tensor:
    """Rows as the library's convolutions take them: channels_last."""
    return tensor.permute(0, 3, 1, 2)


def _kernels(make: Make, channels: int, outputs: int) -> torch.Tensor:
    kernels = make.normal(outputs, channels, 3, 3) / (3 * channels**0.5)
    return kernels.contiguous(memory_format=torch.channels_last)


def _first(_: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    return (arguments[0],)


def _winograd_convolution(layer: tuple[int, int, int, int], size: int) -> Entry:
    n, extent, channels, outputs = layer

    def make(make: Make) -> Inputs:
        x, kernels = make.normal(n, extent, extent, channels), _kernels(make, channels, outputs)
        y = x.new_empty((n, extent, extent, outputs))
        return Inputs((y, x, ops.winograd_weight(kernels), None, 1, 1), (x, kernels), x)

    def eager(x: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        return F.conv2d(_images(x), kernels, padding=1).permute(0, 2, 3, 1)

    matmul = (n * extent**2, 9 * channels, outputs)
    return Entry(
        "winograd_convolution", "", shape_name(*layer), make, eager, _first, size=size, dtypes=_ONLY, matmul=matmul
    )


def _winograd_weight_grad(layer: tuple[int, int, int, int], size: int) -> Entry:
    n, extent, channels, outputs = layer

    def make(make: Make) -> Inputs:
        x, cotangent = make.normal(n, extent, extent, channels), make.normal(n, extent, extent, outputs)
        # Sums around 1, whose rounding is what one of a product is.
        cotangent = cotangent / (n**0.5 * extent)
        kernels = _kernels(make, channels, outputs)
        return Inputs((torch.empty_like(kernels), x, cotangent, 1, 1), (x, cotangent, kernels), x)

    def eager(x: torch.Tensor, cotangent: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
        operator = torch.ops.aten.convolution_backward.default
        options = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        grad: torch.Tensor = operator(_images(cotangent), _images(x), kernels, None, *options)[1]
        return grad

    matmul = (9 * channels, n * extent**2, outputs)
    return Entry(
        "winograd_weight_grad", "", shape_name(*layer), make, eager, _first, size=size, dtypes=_ONLY, matmul=matmul
    )


def _winograd_weight(channels: int, outputs: int, size: int) -> Entry:
    def make(make: Make) -> Inputs:
        kernels = _kernels(make, channels, outputs)
        return Inputs((ops.winograd_weight(kernels), kernels, False), (kernels,), kernels)

    def eager(kernels: torch.Tensor) -> torch.Tensor:
        line = kernels.new_tensor(TO_WEIGHT)
        products = torch.einsum("ai,bj,kcij->abck", line, line, kernels)
        return products.reshape(36, channels, -1, 32).transpose(1, 2).contiguous()

    name = shape_name(channels, outputs)
    return Entry("winograd_weight", "", name, make, eager, _first, size=size, dtypes=_ONLY)


def _to_hyperplane(rows: int, pixels: int, size: int, norm: str) -> Entry:
    def make(make: Make) -> Inputs:
        x, w = make.uniform(rows, pixels), make.normal(rows, pixels)
        gap = make.uniform(rows, low=-0.4, high=0.4) * w.abs().sum(1)
        return Inputs((x, w, gap, norm), (x, w, gap, norm), x)

    name = shape_name(rows, pixels)
    return Entry("to_hyperplane", norm, name, make, to_hyperplane_reference, size=size, dtypes=_ONLY)


CONVOLUTIONS: tuple[Entry, ...] = (
    *(_winograd_convolution(*layer) for layer in _LAYERS),
    *(_winograd_weight_grad(*layer) for layer in _LAYERS),
    *(_winograd_weight(*layer) for layer in ((32, 32, 0), (256, 256, 1), (512, 512, 2))),
    *(_to_hyperplane(*rows, norm) for norm in ("linf", "l2") for rows in ((16, 784, 0), (473, 784, 1), (473, 3072, 2))),
)

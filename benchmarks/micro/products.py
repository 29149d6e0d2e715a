"""What is measured of the operators for multilayer perceptrons: products of class cotangents, and margins from them."""

from __future__ import annotations

import torch

from benchmarks.micro.entry import Entry, Inputs, Make, shape_name
from emr_kernels import ops

#: Batch, classes, units behind the ReLU, units before the layer.
_LAYERS = (((16, 10, 128, 100), 0), ((256, 10, 1024, 784), 1), ((256, 100, 1024, 1024), 2))
_HIDDEN = 2


def _masked(grad: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
    return grad * on[:, None]


def _link(make: Make, batch: int, units: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A ReLU's units that are on, their bits, and a layer's weight."""
    on = make.normal(batch, units, dtype=torch.float32) > 0
    return on, ops.pack_bits(on), make.normal(units, columns) / columns**0.5


def _masked_gemm(sizes: tuple[int, int, int, int], size: int, norms: bool) -> Entry:
    n, k, h, d = sizes

    def make(make: Make) -> Inputs:
        grad = make.normal(n, k, h)
        on, bits, weight = _link(make, n, h, d)
        return Inputs((grad, bits, weight, 0.0, "ieee"), (grad, on, weight), grad)

    def eager(grad: torch.Tensor, on: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        product = _masked(grad, on) @ weight
        return product.float().square().sum(2) if norms else product

    name = "masked_gemm_sq_norms" if norms else "masked_gemm"
    return Entry(name, "", shape_name(*sizes), make, eager, size=size, matmul=(n * k, h, d))


def _masked_chain(sizes: tuple[int, int, int, int], size: int, norms: bool) -> Entry:
    """Behind ReLUs of the same width, all samples starting from the rows of one weight."""
    n, k, h, d = sizes

    def make(make: Make) -> Inputs:
        head = make.normal(k, h)
        links = [_link(make, n, h, h if place < _HIDDEN else d) for place in range(_HIDDEN + 1)]
        on, bits, weights = (list(parts) for parts in zip(*links, strict=True))
        grad = head.expand(n, k, h)
        return Inputs((grad, bits, weights, [0.0] * len(links), "ieee"), (grad, on, weights), grad)

    def eager(grad: torch.Tensor, on: list[torch.Tensor], weights: list[torch.Tensor]) -> torch.Tensor:
        for mask, weight in zip(on, weights, strict=True):
            grad = _masked(grad, mask) @ weight
        return grad.float().square().sum(2) if norms else grad

    name = "masked_chain_sq_norms" if norms else "masked_chain"
    # The products are of one height, so that their widths add up.
    matmul = (n * k, h, _HIDDEN * h + d)
    return Entry(name, f"{_HIDDEN + 1} links", shape_name(*sizes), make, eager, size=size, matmul=matmul)


def _pairwise_margins(shape: tuple[int, int, int], size: int, order: float) -> Entry:
    def make(make: Make) -> Inputs:
        weights, logits = make.normal(*shape), make.normal(*shape[:2], dtype=torch.float32)
        y = make.integers(shape[1], shape[0])
        return Inputs((weights, logits, y, order), (weights, logits, y), weights)

    def eager(weights: torch.Tensor, logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        sample = torch.arange(len(y), device=y.device)
        norms = torch.linalg.vector_norm(weights[sample, y][:, None].float() - weights.float(), order, dim=2)
        gaps = logits[sample, y][:, None] - logits
        return (gaps / norms).scatter(1, y[:, None], torch.inf)

    return Entry("pairwise_margins", f"ord {order:g}", shape_name(*shape), make, eager, size=size)


PRODUCTS: tuple[Entry, ...] = (
    *(_masked_gemm(*layer, norms) for norms in (False, True) for layer in _LAYERS),
    *(_masked_chain(*layer, norms) for norms in (False, True) for layer in _LAYERS),
    *(
        _pairwise_margins(*jacobian, order)
        for order in (1, 2)
        for jacobian in (((16, 10, 784), 0), ((256, 10, 3072), 1), ((64, 100, 3072), 2), ((256, 100, 3072), 3))
    ),
)

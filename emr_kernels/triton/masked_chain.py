"""Chains of masked products, a few samples at a time: intermediate cotangents exist for those alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from emr_kernels.triton import common
from emr_kernels.triton.masked_gemm import masked_gemm, masked_gemm_out, masked_gemm_sq_norms

_Tensors = list[torch.Tensor]

#: Bytes of one intermediate cotangent: so many that a GPU is busy.
_INTERMEDIATE = 1 << 26


def _parts(grad: torch.Tensor, weights: _Tensors) -> Iterator[tuple[int, int]]:
    """Ranges of samples; rows of bits start with a byte where a range does."""
    n, k, _ = grad.shape
    widest = max((weight.shape[0] for weight in weights[1:]), default=1)
    size = n if len(weights) == 1 else max(8, _INTERMEDIATE // max(1, k * widest * grad.element_size()) // 8 * 8)
    for begin in range(0, n, max(1, size)):
        yield begin, min(begin + size, n)


def _last_link(
    grad: torch.Tensor,
    bits: _Tensors,
    weights: _Tensors,
    slopes: list[float],
    precision: str,
    begin: int,
    end: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The cotangents before the last link, and every link's bits, for a range of samples."""
    part = grad[begin:end]
    masks = [
        mask[begin * weight.shape[0] // 8 : common.cdiv(end * weight.shape[0], 8)]
        for mask, weight in zip(bits, weights, strict=True)
    ]
    for mask, weight, slope in zip(masks[:-1], weights[:-1], slopes[:-1], strict=True):
        part = masked_gemm(part, mask, weight, slope, precision)
    return part, masks


def masked_chain(
    grad: torch.Tensor, bits: _Tensors, weights: _Tensors, negative_slopes: list[float], precision: str
) -> torch.Tensor:
    """`emr::masked_chain`."""
    out = grad.new_empty((*grad.shape[:2], weights[-1].shape[1]))
    for begin, end in _parts(grad, weights):
        part, masks = _last_link(grad, bits, weights, negative_slopes, precision, begin, end)
        masked_gemm_out(part, masks[-1], weights[-1], negative_slopes[-1], precision, out[begin:end])
    return out


def masked_chain_sq_norms(
    grad: torch.Tensor, bits: _Tensors, weights: _Tensors, negative_slopes: list[float], precision: str
) -> torch.Tensor:
    """`emr::masked_chain_sq_norms`."""
    squares = grad.new_empty(grad.shape[:2], dtype=torch.float32)
    for begin, end in _parts(grad, weights):
        part, masks = _last_link(grad, bits, weights, negative_slopes, precision, begin, end)
        squares[begin:end] = masked_gemm_sq_norms(part, masks[-1], weights[-1], negative_slopes[-1], precision)
    return squares

"""Class cotangents carried back through a whole chain of (leaky) ReLUs and linear layers: `masked_gemm` over and over.

As one operator the intermediate cotangents of a few samples at a time are all that exists, and on the CPU only those
of units that are on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emr_kernels.ops import _dispatch
from emr_kernels.ops._format import compute_dtype
from emr_kernels.ops.masked_gemm import check_grad, check_link, wide_product

_Tensors = list[torch.Tensor]


def _wide_chain(grad: torch.Tensor, bits: _Tensors, weights: _Tensors, negative_slopes: list[float]) -> torch.Tensor:
    wide = grad.to(compute_dtype(grad))
    for mask, weight, slope in zip(bits, weights, negative_slopes, strict=True):
        wide = wide_product(wide, mask, weight, slope)
    return wide


def masked_chain_reference(
    grad: torch.Tensor, bits: _Tensors, weights: _Tensors, negative_slopes: list[float], precision: str
) -> torch.Tensor:
    """`masked_chain` in plain PyTorch."""
    return _wide_chain(grad, bits, weights, negative_slopes).to(grad.dtype)


def masked_chain_sq_norms_reference(
    grad: torch.Tensor, bits: _Tensors, weights: _Tensors, negative_slopes: list[float], precision: str
) -> torch.Tensor:
    """`masked_chain_sq_norms` in plain PyTorch."""
    return _wide_chain(grad, bits, weights, negative_slopes).square().sum(2)


def _masked_chain_fake(
    grad: torch.Tensor, bits: _Tensors, weights: _Tensors, negative_slopes: list[float], precision: str
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:2], weights[-1].shape[1]))


def _masked_chain_sq_norms_fake(
    grad: torch.Tensor, bits: _Tensors, weights: _Tensors, negative_slopes: list[float], precision: str
) -> torch.Tensor:
    return grad.new_empty(grad.shape[:2], dtype=compute_dtype(grad))


_ARGUMENTS = "Tensor grad, Tensor[] bits, Tensor[] weights, float[] negative_slopes, str precision"
_masked_chain = _dispatch.define(f"masked_chain({_ARGUMENTS}) -> Tensor", masked_chain_reference, _masked_chain_fake)
_masked_chain_sq_norms = _dispatch.define(
    f"masked_chain_sq_norms({_ARGUMENTS}) -> Tensor", masked_chain_sq_norms_reference, _masked_chain_sq_norms_fake
)


def _checked(
    operator: str,
    grad: torch.Tensor,
    bits: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    negative_slopes: Sequence[float],
    precision: str,
) -> tuple[torch.Tensor, _Tensors, _Tensors, list[float], str]:
    grad = check_grad(operator, grad, precision)
    if not weights or len(bits) != len(weights) or len(negative_slopes) != len(weights):
        raise ValueError(
            f"there are {len(bits)} bits, {len(weights)} weights and {len(negative_slopes)} negative_slopes; "
            "expected as many of each, one at least"
        )
    units, dense = grad.shape[2], []
    for place, (mask, weight) in enumerate(zip(bits, weights, strict=True)):
        names = (f"bits[{place}]", f"weights[{place}]")
        dense.append(check_link(operator, names, grad, mask, weight, units))
        units = weight.shape[1]
    return grad, list(bits), dense, list(negative_slopes), precision


def masked_chain(
    grad: torch.Tensor,
    bits: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    negative_slopes: Sequence[float],
    *,
    precision: str = "ieee",
) -> torch.Tensor:
    """`masked_gemm` with the first bits, weight and slope, then of its result with the second, and so on.

    For a multilayer perceptron, from the logits' side on, that is the effective weights of K classes.

    Args:
        grad: `[N, K, H]`, as in `masked_gemm`; it may be expanded along N.
        bits: for each link, uint8 `[ceil(N * H / 8)]` as in `masked_gemm`.
        weights: for each link `[H, D]`; its D is the H of the next.
        negative_slopes: for each link.
        precision: as in `masked_gemm`.

    Returns:
        `[N, K, D]` of the last link, in the dtype of grad. Intermediate cotangents are rounded at most to that dtype.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device, layout or number of links, or an unknown precision.
        RuntimeError: if an argument requires grad in grad mode (the operator has no derivative of its own).
    """
    return _masked_chain(grad, *_checked("masked_chain", grad, bits, weights, negative_slopes, precision))


def masked_chain_sq_norms(
    grad: torch.Tensor,
    bits: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    negative_slopes: Sequence[float],
    *,
    precision: str = "ieee",
) -> torch.Tensor:
    """Squared 2-norms of the rows of `masked_chain`'s result, which is never written: `[N, K]`.

    The same number comes out at every call. Arguments and errors as of `masked_chain`.

    Returns:
        `[N, K]`, float32 (float64 for float64).
    """
    arguments = _checked("masked_chain_sq_norms", grad, bits, weights, negative_slopes, precision)
    return _masked_chain_sq_norms(grad, *arguments)

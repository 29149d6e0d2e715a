"""The product of class cotangents with a layer's weight, behind the layer's (leaky) ReLU, for all classes at once.

All K rows of a sample pass the same mask, so its bits are read once for all of them (see `bits`).
"""

from __future__ import annotations

import torch

from emr_kernels.ops import _checks, _dispatch
from emr_kernels.ops._format import compute_dtype
from emr_kernels.ops.bits import unpack_bits_reference

PRECISIONS = ("ieee", "tf32", "bf16")


def wide_product(grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, negative_slope: float) -> torch.Tensor:
    """The product in plain PyTorch, in the dtype of the arithmetic: `[N, K, D]`."""
    n, k, h = grad.shape
    wide = grad.to(compute_dtype(grad))
    on = unpack_bits_reference(bits, grad.new_empty((n, h), device="meta"))[:, None]
    other = wide * negative_slope if negative_slope != 0 else wide.new_zeros(())
    return (torch.where(on, wide, other).reshape(n * k, h) @ weight.to(wide.dtype)).view(n, k, weight.shape[1])


def masked_gemm_reference(
    grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, negative_slope: float, precision: str
) -> torch.Tensor:
    """`masked_gemm` in plain PyTorch."""
    return wide_product(grad, bits, weight, negative_slope).to(grad.dtype)


def _masked_gemm_out_reference(
    grad: torch.Tensor,
    bits: torch.Tensor,
    weight: torch.Tensor,
    negative_slope: float,
    precision: str,
    out: torch.Tensor,
) -> None:
    out.copy_(wide_product(grad, bits, weight, negative_slope))


def masked_gemm_sq_norms_reference(
    grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, negative_slope: float, precision: str
) -> torch.Tensor:
    """`masked_gemm_sq_norms` in plain PyTorch."""
    return wide_product(grad, bits, weight, negative_slope).square().sum(2)


def _masked_gemm_fake(
    grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, negative_slope: float, precision: str
) -> torch.Tensor:
    return grad.new_empty((*grad.shape[:2], weight.shape[1]))


def _masked_gemm_out_fake(
    grad: torch.Tensor,
    bits: torch.Tensor,
    weight: torch.Tensor,
    negative_slope: float,
    precision: str,
    out: torch.Tensor,
) -> None:
    return None


def _masked_gemm_sq_norms_fake(
    grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, negative_slope: float, precision: str
) -> torch.Tensor:
    return grad.new_empty(grad.shape[:2], dtype=compute_dtype(grad))


_ARGUMENTS = "Tensor grad, Tensor bits, Tensor weight, float negative_slope, str precision"
_masked_gemm = _dispatch.define(f"masked_gemm({_ARGUMENTS}) -> Tensor", masked_gemm_reference, _masked_gemm_fake)
_masked_gemm_out = _dispatch.define(
    f"masked_gemm_out({_ARGUMENTS}, Tensor(a!) out) -> ()", _masked_gemm_out_reference, _masked_gemm_out_fake
)
_masked_gemm_sq_norms = _dispatch.define(
    f"masked_gemm_sq_norms({_ARGUMENTS}) -> Tensor", masked_gemm_sq_norms_reference, _masked_gemm_sq_norms_fake
)


def check_grad(operator: str, grad: torch.Tensor, precision: str) -> torch.Tensor:
    """grad, checked, with dense samples."""
    _checks.check_floating("grad", grad)
    _checks.check_not_differentiated(operator, grad=grad)
    if grad.dim() != 3:
        raise ValueError(f"grad has shape {tuple(grad.shape)}; expected [N, K, H]")
    _checks.check_one_of("precision", precision, PRECISIONS)
    k, h = grad.shape[1:]
    dense = (h == 1 or grad.stride(2) == 1) and (k == 1 or grad.stride(1) == h)
    return grad if dense else grad.contiguous()


def check_link(
    operator: str, names: tuple[str, str], grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, units: int
) -> torch.Tensor:
    """The weight, checked like its bits, row-major; `names` are those of bits and weight in messages."""
    bits_name, name = names
    _checks.check_floating(name, weight)
    _checks.check_not_differentiated(operator, **{name: weight})
    if weight.dim() != 2 or weight.shape[0] != units:
        raise ValueError(f"{name} has shape {tuple(weight.shape)}; expected [{units}, D]")
    if weight.dtype != grad.dtype:
        raise TypeError(f"{name} has dtype {weight.dtype}; expected {grad.dtype}, that of grad")
    if weight.device != grad.device:
        raise ValueError(f"{name} is on device {weight.device}; expected {grad.device}, that of grad")
    _checks.check_bits(bits_name, bits, "the units [N, H]", grad.new_empty(()).expand(grad.shape[0], units))
    return weight.contiguous()


def masked_gemm(
    grad: torch.Tensor,
    bits: torch.Tensor,
    weight: torch.Tensor,
    negative_slope: float = 0.0,
    *,
    precision: str = "ieee",
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(grad * slope(bits)) @ weight: K cotangents of each sample, carried back through a ReLU and a linear layer.

    slope is 1 where a unit's bit is 1, else negative_slope; a slope of 0 gives 0, also for an infinite grad. Sums are
    float32 (float64 for float64). Weights are taken to be finite: whether an infinite one counts where its unit is
    off is left open. Rounding errors are of the order of those of grad @ weight without the mask.

    Args:
        grad: `[N, K, H]`, the cotangents of the ReLU's output; float32, bfloat16, float16 or float64. It may be
            expanded along N: cotangents that all samples share are read, and on the CPU multiplied, once.
        bits: uint8 `[ceil(N * H / 8)]`, packed in row-major order of the ReLU's units `[N, H]`, as `affine_relu`
            returns them for a row-major input; shared by a sample's K rows.
        weight: `[H, D]`, the dtype of grad; that of the linear layer before the ReLU.
        negative_slope: slope where the bit is 0.
        precision: of float32 products on a GPU's tensor cores: "ieee" (exact products), "tf32" or "bf16" (rounded
            operands). The CPU is always exact.
        out: where to write the result: row-major, `[N, K, D]`, like grad; not overlapping it.

    Returns:
        `[N, K, D]` in the dtype of grad.

    Raises:
        TypeError, ValueError: for a wrong dtype, shape, device or layout, or an unknown precision.
        RuntimeError: if an argument requires grad in grad mode (the operator has no derivative of its own).
    """
    grad = check_grad("masked_gemm", grad, precision)
    weight = check_link("masked_gemm", ("bits", "weight"), grad, bits, weight, grad.shape[2])
    if out is None:
        return _masked_gemm(grad, grad, bits, weight, negative_slope, precision)
    shape = (*grad.shape[:2], weight.shape[1])
    _checks.check_floating("out", out)
    if out.shape != shape or not out.is_contiguous():
        raise ValueError(f"out has shape {tuple(out.shape)} and strides {out.stride()}; expected a row-major {shape}")
    if out.dtype != grad.dtype:
        raise TypeError(f"out has dtype {out.dtype}; expected {grad.dtype}, that of grad")
    if out.device != grad.device:
        raise ValueError(f"out is on device {out.device}; expected {grad.device}, that of grad")
    _masked_gemm_out(grad, grad, bits, weight, negative_slope, precision, out)
    return out


def masked_gemm_sq_norms(
    grad: torch.Tensor,
    bits: torch.Tensor,
    weight: torch.Tensor,
    negative_slope: float = 0.0,
    *,
    precision: str = "ieee",
) -> torch.Tensor:
    """Squared 2-norms of the rows of `masked_gemm`'s result, which is never written: `[N, K]`.

    The same number comes out at every call. Arguments and errors as of `masked_gemm`.

    Returns:
        `[N, K]`, float32 (float64 for float64).
    """
    grad = check_grad("masked_gemm_sq_norms", grad, precision)
    weight = check_link("masked_gemm_sq_norms", ("bits", "weight"), grad, bits, weight, grad.shape[2])
    return _masked_gemm_sq_norms(grad, grad, bits, weight, negative_slope, precision)

"""Products of masked class cotangents with a weight: a matrix product whose left factor is masked as it is loaded.

The N * K rows of grad are the rows of one product; the bits of a row are those of its sample. What writes no product
adds up squares of each tile's rows instead: one number for each row and block of columns, summed in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common

_COUNTS = ["rows", "per_sample", "size_bits"]
_NORM_COLUMNS = 64


@triton.jit
def _tile(
    grad,
    stride,
    bits,
    weight,
    slope,
    row,
    rows,
    per_sample,
    units,
    column,
    columns,
    LEAKY: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The product's rows `row` and columns `column`, in float32."""
    # Rows and columns beyond the end read the first ones, and are not stored.
    row = tl.where(row < rows, row, 0)
    column = tl.where(column < columns, column, 0)
    sample = row // per_sample
    line = grad + sample * stride + (row - sample * per_sample) * units
    first_bit = sample * units
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, units, BLOCK_K):
        unit = start + tl.arange(0, BLOCK_K)
        if WHOLE:
            # Rows of bits start with a byte: each byte is read once, and spread over the eight units it is for.
            byte = start // 8 + tl.arange(0, BLOCK_K // 8)
            packed = tl.load(
                bits + (first_bit // 8)[:, None] + byte[None, :], mask=(byte * 8 < units)[None, :], other=0
            )
            lane = tl.arange(0, 8)[None, None, :]
            alive = tl.reshape((packed.to(tl.int32)[:, :, None] >> lane) & 1, [BLOCK_M, BLOCK_K])
        else:
            place = (first_bit % 8).to(tl.int32)[:, None] + unit[None, :]
            first = (bits + first_bit // 8)[:, None]
            packed = tl.load(first + (place >> 3), mask=(unit < units)[None, :], other=0)
            alive = (packed.to(tl.int32) >> (place & 7)) & 1
        value = tl.load(line[:, None] + unit[None, :], mask=(unit < units)[None, :], other=0)
        other = tl.load(
            weight + unit.to(tl.int64)[:, None] * columns + column[None, :], mask=(unit < units)[:, None], other=0
        )
        wide = value.to(tl.float32)
        wide = tl.where(alive != 0, wide, wide * slope if LEAKY else 0.0)
        if PRECISION == "wide":
            total += tl.dot(wide, other.to(tl.float32), input_precision="ieee")
        elif PRECISION == "narrow":
            total += tl.dot(wide.to(value.dtype), other)
        elif PRECISION == "bf16":
            total += tl.dot(wide.to(tl.bfloat16), other.to(tl.bfloat16))
        else:
            total += tl.dot(wide, other, input_precision=PRECISION)
    return total


@triton.jit
def _place(rows, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of this program: programs that run together share columns of the weight."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(columns, BLOCK_N)
    row = (pid // blocks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = (pid % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return row, column, pid % blocks, blocks


def _config(m: int, n: int, k: int, warps: int) -> triton.Config:
    return triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=3)


_CONFIGS = [_config(64, 64, 32, 8), _config(64, 64, 32, 4), _config(128, 64, 32, 8), _config(128, 128, 32, 8)]
_NORM_CONFIGS = [
    _config(64, _NORM_COLUMNS, 32, 8),
    _config(64, _NORM_COLUMNS, 32, 4),
    _config(128, _NORM_COLUMNS, 32, 8),
]
_KEY = ["size_bits", "units", "columns", "PRECISION"]


def _worthwhile(configs: list[triton.Config], arguments: dict[str, Any], **constants: Any) -> list[triton.Config]:
    """Without those whose tiles would be mostly empty, or whose sums do not fit in registers without tensor cores."""
    rows, columns = arguments["rows"], arguments["columns"]
    precision = constants["PRECISION"]

    def fits(config: triton.Config) -> bool:
        m, n = config.kwargs["BLOCK_M"], config.kwargs["BLOCK_N"]
        in_registers = precision != "ieee" or (m * n <= 8192 and config.num_warps == 8)
        return m < 2 * rows and n < 2 * columns and in_registers

    return [config for config in configs if fits(config)] or configs[:1]


def _tuned(configs: list[triton.Config]) -> Any:
    chosen = configs[:1] if common.interpreted() else configs
    return triton.autotune(chosen, key=_KEY, prune_configs_by={"early_config_prune": _worthwhile})


@_tuned(_CONFIGS)
@triton.jit(do_not_specialize=_COUNTS)
def masked_gemm_kernel(
    grad,
    stride,
    bits,
    weight,
    out,
    slope,
    rows,
    per_sample,
    units,
    columns,
    size_bits,
    LEAKY: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column, _, _ = _place(rows, columns, BLOCK_M, BLOCK_N)
    total = _tile(
        grad, stride, bits, weight, slope, row, rows, per_sample, units, column, columns,
        LEAKY, WHOLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], total.to(out.dtype.element_ty), mask=inside)


@_tuned(_NORM_CONFIGS)
@triton.jit(do_not_specialize=_COUNTS)
def masked_gemm_sq_norms_kernel(
    grad,
    stride,
    bits,
    weight,
    partial,
    slope,
    rows,
    per_sample,
    units,
    columns,
    size_bits,
    LEAKY: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, column, block, blocks = _place(rows, columns, BLOCK_M, BLOCK_N)
    total = _tile(
        grad, stride, bits, weight, slope, row, rows, per_sample, units, column, columns,
        LEAKY, WHOLE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    total = tl.where((column < columns)[None, :], total, 0.0)
    tl.store(partial + row * blocks + block, tl.sum(total * total, 1), mask=row < rows)


def _launch(
    kernel: Any,
    grad: torch.Tensor,
    bits: torch.Tensor,
    weight: torch.Tensor,
    slope: float,
    precision: str,
    result: torch.Tensor,
) -> None:
    n, k, units = grad.shape
    rows, columns = n * k, weight.shape[1]
    if rows == 0 or columns == 0:
        return
    if grad.dtype != torch.float32:
        precision = "narrow"
    if common.interpreted() and precision in ("narrow", "bf16"):
        # The interpreter multiplies no bfloat16.
        precision = "wide"

    def grid(constants: dict[str, Any]) -> tuple[int]:
        return (common.cdiv(rows, constants["BLOCK_M"]) * common.cdiv(columns, constants["BLOCK_N"]),)

    common.launch(
        kernel,
        grid,
        grad,
        grad,
        grad.stride(0),
        bits,
        weight,
        result,
        slope,
        rows,
        k,
        units,
        columns,
        rows.bit_length(),
        fp_fusion=True,
        LEAKY=slope != 0,
        WHOLE=units % 8 == 0,
        PRECISION=precision,
    )


def masked_gemm_out(
    grad: torch.Tensor,
    bits: torch.Tensor,
    weight: torch.Tensor,
    negative_slope: float,
    precision: str,
    out: torch.Tensor,
) -> None:
    """`emr::masked_gemm_out`."""
    _launch(masked_gemm_kernel, grad, bits, weight, negative_slope, precision, out)


def masked_gemm(
    grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, negative_slope: float, precision: str
) -> torch.Tensor:
    """`emr::masked_gemm`."""
    out = grad.new_empty((*grad.shape[:2], weight.shape[1]))
    masked_gemm_out(grad, bits, weight, negative_slope, precision, out)
    return out


def masked_gemm_sq_norms(
    grad: torch.Tensor, bits: torch.Tensor, weight: torch.Tensor, negative_slope: float, precision: str
) -> torch.Tensor:
    """`emr::masked_gemm_sq_norms`."""
    blocks = common.cdiv(weight.shape[1], _NORM_COLUMNS)
    partial = grad.new_empty((*grad.shape[:2], blocks), dtype=torch.float32)
    _launch(masked_gemm_sq_norms_kernel, grad, bits, weight, negative_slope, precision, partial)
    return partial.sum(2)


def examples() -> None:
    """Launches for `check`."""

    def product(shape: tuple[int, int, int], columns: int, dtype: torch.dtype, slope: float, precision: str) -> None:
        grad = torch.empty(shape, dtype=dtype, device="meta")
        weight = torch.empty(shape[2], columns, dtype=dtype, device="meta")
        bits = torch.empty((shape[0] * shape[2] + 7) // 8, dtype=torch.uint8, device="meta")
        masked_gemm(grad, bits, weight, slope, precision)
        if slope == 0:
            masked_gemm_sq_norms(grad, bits, weight, slope, precision)

    shape = (256, 10, 1024)
    for precision in ("ieee", "tf32"):
        product(shape, 784, torch.float32, 0.0, precision)
    product(shape, 784, torch.bfloat16, 0.0, "ieee")
    product((2**18, 10, 1001), 784, torch.float32, 0.1, "bf16")

"""Per-sample squared norms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common

_TILE = 8192


@triton.jit
def sq_norms_kernel(values, stride, size, result, batch, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    wide: tl.constexpr = tl.float64 if values.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([ROWS, BLOCK], wide)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = (n < batch)[:, None] & (i < size)[None, :]
        value = tl.load(values + n[:, None] * stride + i[None, :], mask=inside, other=0).to(wide)
        total += value * value
    tl.store(result + n, tl.sum(total, 1).to(result.dtype.element_ty), mask=n < batch)


def sq_norms(tensors: list[torch.Tensor]) -> torch.Tensor:
    """`emr::sq_norms`, with one launch for each tensor."""
    batch = tensors[0].shape[0]
    wide = any(t.dtype == torch.float64 for t in tensors)
    result = tensors[0].new_empty((len(tensors), batch), dtype=torch.float64 if wide else torch.float32)
    for row, tensor in zip(result, tensors, strict=True):
        size = tensor.numel() // max(batch, 1)
        block = min(max(triton.next_power_of_2(size), 16), _TILE)
        # Short samples share a program.
        rows = min(_TILE // block, 32)
        grid = common.cdiv(batch, rows)
        options = {"ROWS": rows, "BLOCK": block, "num_warps": 8}
        common.launch(sq_norms_kernel, grid, tensor, tensor, tensor.stride(0), size, row, batch, **options)
    return result


def examples() -> None:
    """Launches for `check`."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        sq_norms([torch.empty(128, 3072, dtype=dtype, device="meta"), torch.empty(128, 10, dtype=dtype, device="meta")])
    sq_norms([torch.empty(2, 2**31, device="meta")])

"""Packing a mask into bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common

_BLOCK = 8192


@triton.jit
def pack_bits_kernel(mask, bits, n, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    place = tl.arange(0, 8)[None, :]
    offset = tl.arange(0, BLOCK // 8)[:, None] * 8 + place
    value = tl.load(mask + start + offset, mask=start + offset < n, other=0)
    packed = tl.sum((value != 0).to(tl.int32) << place, 1)
    byte = tl.arange(0, BLOCK // 8)
    tl.store(bits + start // 8 + byte, packed.to(tl.uint8), mask=start + byte * 8 < n)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """`emr::pack_bits`."""
    n = mask.numel()
    bits = torch.empty((n + 7) // 8, dtype=torch.uint8, device=mask.device)
    common.launch(pack_bits_kernel, common.cdiv(n, _BLOCK), mask, mask.view(torch.uint8), bits, n, BLOCK=_BLOCK)
    return bits


def examples() -> None:
    """Launches for `check`."""
    pack_bits(torch.empty(2**20, dtype=torch.bool, device="meta"))
    pack_bits(torch.empty(2**32, dtype=torch.bool, device="meta"))

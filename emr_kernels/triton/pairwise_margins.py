"""Margins against every class: one program for each sample and class."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common

_MOST = 2048


@triton.jit
def pairwise_margins_kernel(
    weights, logits, y, result, classes, size, ORDER: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    pair = tl.program_id(0).to(tl.int64)
    sample = pair // classes
    label = tl.load(y + sample)
    own = sample * classes + label
    mine = weights + own * size
    other = weights + pair * size
    # Many sums, each of few terms.
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tl.cast(size, INDEX), BLOCK):
        i = start + tl.arange(0, BLOCK)
        a = tl.load(mine + i, mask=i < size, other=0).to(tl.float32)
        b = tl.load(other + i, mask=i < size, other=0).to(tl.float32)
        d = a - b
        if ORDER == 2:
            total += d * d
        elif ORDER == 1:
            total += tl.abs(d)
        else:
            # A NaN is kept.
            total = tl.where((tl.abs(d) <= total) | (total != total), total, tl.abs(d))
    if ORDER == 0:
        undefined = tl.max((total != total).to(tl.int32), 0) != 0
        norm = tl.where(undefined, float("nan"), tl.max(tl.where(total != total, 0.0, total), 0))
    else:
        norm = tl.sum(total, 0)
    if ORDER == 2:
        norm = tl.sqrt_rn(norm)
    gap = tl.load(logits + own) - tl.load(logits + pair)
    margin = tl.where((gap == 0) & (norm == 0), 0.0, tl.div_rn(gap, norm))
    tl.store(result + pair, tl.where(pair == own, float("inf"), margin))


def pairwise_margins(weights: torch.Tensor, logits: torch.Tensor, y: torch.Tensor, ord: float) -> torch.Tensor:
    """`emr::pairwise_margins`."""
    result = torch.empty_like(logits)
    classes, size = weights.shape[1:]
    block = min(max(triton.next_power_of_2(size), 16), _MOST)
    common.launch(
        pairwise_margins_kernel,
        logits.numel(),
        weights,
        weights,
        logits,
        y,
        result,
        classes,
        size,
        ORDER=0 if math.isinf(ord) else int(ord),
        INDEX=tl.int32 if common.fits_int32(size + block) else tl.int64,
        BLOCK=block,
        num_warps=4 if block <= 1024 else 8,
    )
    return result


def examples() -> None:
    """Launches for `check`."""
    for dtype, ord in ((torch.float32, 2.0), (torch.bfloat16, 1.0), (torch.float16, math.inf)):
        weights = torch.empty(256, 10, 3072, dtype=dtype, device="meta")
        pairwise_margins(
            weights, weights.new_empty((256, 10), dtype=torch.float32), weights.new_empty(256, dtype=torch.int64), ord
        )
    large = torch.empty(1, 2, 2**32, device="meta")
    pairwise_margins(large, large.new_empty((1, 2)), large.new_empty(1, dtype=torch.int64), 2.0)

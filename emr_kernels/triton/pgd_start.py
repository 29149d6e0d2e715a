"""Random starts in the ball."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common

_BLOCK = 1024
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


@triton.jit
def _words(seed, offset, block, STREAM: tl.constexpr):
    """Four words of Philox4x32-10 for each block."""
    block = block.to(tl.int64)
    offset = offset.to(tl.int64)
    high = ((offset >> 32) | (STREAM << 31)).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), (block >> 32).to(tl.uint32), offset.to(tl.uint32), high)


@triton.jit
def _in_order(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ..."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _high_bits(word):
    return (word >> 8).to(tl.int32).to(tl.float32)


@triton.jit
def _unit(word):
    """(0, 1], in steps of 2**-24."""
    return (_high_bits(word) + 1) * (1 / 16777216)


@triton.jit
def _gaussians(first, second):
    radius = tl.sqrt(-2 * tl.log(_unit(first)))
    angle = _high_bits(second) * (6.283185307179586 / 16777216)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _draws(seed, offset, block, GAUSSIAN: tl.constexpr):
    """Numbers of the normal or of Laplace's distribution, four for each block, in the order of their elements."""
    a, b, c, d = _words(seed, offset, block, 0)
    if GAUSSIAN:
        p, q = _gaussians(a, b)
        r, s = _gaussians(c, d)
        return _in_order(p, q, r, s)
    else:
        word = _in_order(a, b, c, d)
        e = -tl.log(_unit(word))
        return tl.where((word & 1) != 0, -e, e)


@triton.jit
def _store(origin, out, place, inside, noise, lower, upper):
    t = tl.load(origin + place, mask=inside, other=0).to(tl.float32) + noise
    t = tl.where(t < lower, lower, t)
    t = tl.where(t > upper, upper, t)
    tl.store(out + place, t.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "offset"])
def linf_start_kernel(origin, out, epsilon, seed, offset, lower, upper, numel, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    a, b, c, d = _words(seed, offset, first // 4 + tl.arange(0, BLOCK // 4), 0)
    noise = epsilon * (_high_bits(_in_order(a, b, c, d)) * (1 / 8388608) - 1)
    place = first + tl.arange(0, BLOCK)
    _store(origin, out, place, place < numel, noise, lower, upper)


@triton.jit(do_not_specialize=["seed", "offset"])
def ball_start_kernel(
    origin, out, epsilon, seed, offset, lower, upper, size, GAUSSIAN: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    begin = n * size
    # A sample may begin inside a block of four, whose other numbers belong to its neighbour.
    first = begin // 4 * 4
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size + 3, BLOCK):
        z = _draws(seed, offset, (first + start) // 4 + tl.arange(0, BLOCK // 4), GAUSSIAN)
        place = first + start + tl.arange(0, BLOCK)
        measure = z * z if GAUSSIAN else tl.abs(z)
        total += tl.where((place >= begin) & (place < begin + size), measure, 0.0)
    length = tl.sum(total, 0)
    a, _b, _c, _d = _words(seed, offset, n, 1)
    once = _unit(a)
    radius = epsilon
    if GAUSSIAN:
        length = tl.sqrt_rn(length)
        radius = epsilon * tl.exp2(tl.div_rn(tl.log2(once), size.to(tl.float32)))
    else:
        length = length - tl.log(once)
    scale = tl.div_rn(radius, tl.maximum(length, _TINY))
    for start in range(0, size + 3, BLOCK):
        z = _draws(seed, offset, (first + start) // 4 + tl.arange(0, BLOCK // 4), GAUSSIAN)
        place = first + start + tl.arange(0, BLOCK)
        _store(origin, out, place, (place >= begin) & (place < begin + size), z * scale, lower, upper)


def pgd_start(
    origin: torch.Tensor, epsilon: float, norm: str, seed: int, offset: int, lower: float, upper: float
) -> torch.Tensor:
    """`emr::pgd_start`."""
    out = torch.empty_like(origin)
    numel = origin.numel()
    if numel == 0:
        return out
    arguments = (origin, out, epsilon, seed, offset, lower, upper)
    if norm == "linf":
        common.launch(linf_start_kernel, common.cdiv(numel, _BLOCK), origin, *arguments, numel, BLOCK=_BLOCK)
    else:
        size, gaussian = numel // origin.shape[0], norm == "l2"
        common.launch(ball_start_kernel, origin.shape[0], origin, *arguments, size, GAUSSIAN=gaussian, BLOCK=_BLOCK)
    return out


def examples() -> None:
    """Launches for `check`."""
    for dtype in (torch.float32, torch.bfloat16):
        origin = torch.empty(128, 3072, dtype=dtype, device="meta")
        for norm in ("linf", "l2", "l1"):
            pgd_start(origin, 0.3, norm, 7, 2**40, 0.0, 1.0)

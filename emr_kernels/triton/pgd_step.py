"""A step of projected gradient descent."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common

_BLOCK = 1024
_TILE = 4096


# Comparisons are written so that a NaN in t stays one.
@triton.jit
def _clamped(t, low, high):
    t = tl.where(t < low, low, t)
    return tl.where(t > high, high, t)


@triton.jit
def _along_sign(g, a):
    """a * sign(g); g itself where it is zero or NaN."""
    return tl.where(g > 0, a, tl.where(g < 0, -a, g))


@triton.jit
def _magnitude(g):
    return tl.where(g < 0, -g, g)


@triton.jit
def _read(values, place, inside):
    return tl.load(values + place, mask=inside, other=0).to(tl.float32)


@triton.jit
def linf_kernel(
    x, origin, gradient, out, step_sizes, step_size, epsilon, lower, upper, size, blocks, BLOCK: tl.constexpr
):
    n = tl.program_id(0) // blocks
    i = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < size
    place = n.to(tl.int64) * size + i
    a = step_size
    if step_sizes is not None:
        a = tl.load(step_sizes + n)
    o = _read(origin, place, inside)
    t = _read(x, place, inside) + _along_sign(_read(gradient, place, inside), a)
    t = _clamped(_clamped(t, o - epsilon, o + epsilon), lower, upper)
    tl.store(out + place, tl.where(o == o, t, o).to(out.dtype.element_ty), mask=inside)


@triton.jit
def l2_kernel(x, origin, gradient, out, step_sizes, step_size, epsilon, lower, upper, size, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    a = step_size
    if step_sizes is not None:
        a = tl.load(step_sizes + n)
    first = n * size
    i = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        g = _read(gradient + first + start, i, i < size - start)
        total += g * g
    scale = tl.div_rn(a, tl.sqrt_rn(tl.sum(total, 0)) + 1e-12)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        place, inside = first + start, i < size - start
        t = _read(x + place, i, inside) + _read(gradient + place, i, inside) * scale
        delta = t - _read(origin + place, i, inside)
        total += delta * delta
    distance = tl.sqrt_rn(tl.sum(total, 0))
    within = distance <= epsilon
    shrink = tl.div_rn(epsilon, distance)
    for start in range(0, size, BLOCK):
        place, inside = first + start, i < size - start
        t = _read(x + place, i, inside) + _read(gradient + place, i, inside) * scale
        o = _read(origin + place, i, inside)
        t = tl.where(within, t, o + (t - o) * shrink)
        tl.store(out + place + i, _clamped(t, lower, upper).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _trials(last, place):
    """Sixteen numbers that differ from `last` in four bits from `place` on, as far as 31 bits hold them."""
    digits = tl.arange(0, 16).to(tl.int64) << place
    return tl.minimum(tl.maximum(last, 0) + digits, 0x7FFFFFFF)


@triton.jit
def _count_above(gradient, first, size, bits, BLOCK: tl.constexpr):
    """For each number, how many magnitudes exceed the one with these bits, which order magnitudes as values do."""
    count = tl.zeros(bits.shape, tl.int32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        magnitude = _magnitude(_read(gradient, first + i, i < size)).to(tl.int32, bitcast=True)
        count += tl.sum((magnitude[:, None] > bits.to(tl.int32)[None, :]).to(tl.int32), 0)
    return count


@triton.jit
def _l1_stepped(x, gradient, place, inside, a, least):
    g = _read(gradient, place, inside)
    t = _read(x, place, inside)
    return tl.where(_magnitude(g) >= least, t + _along_sign(g, a), t)


@triton.jit
def _l1_excess(t, o, cut, lower, upper):
    """How far a coordinate moves when its distance is cut and bounded by the way to the box."""
    delta = t - o
    room = tl.where(delta > 0, upper - o, o - lower)
    return _clamped(_magnitude(delta) - cut, 0.0, tl.where(room < 0, 0.0, room))


@triton.jit
def _l1_totals(x, origin, gradient, first, size, a, least, cuts, lower, upper, BLOCK: tl.constexpr):
    """The sum of the excesses under each cut."""
    total = tl.zeros(cuts.shape, tl.float32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = _l1_stepped(x, gradient, first + i, i < size, a, least)
        o = _read(origin, first + i, i < size)
        total += tl.sum(_l1_excess(t[:, None], o[:, None], cuts[None, :], lower, upper), 0)
    return total


@triton.jit
def l1_kernel(
    x,
    origin,
    gradient,
    out,
    step_sizes,
    step_size,
    epsilon,
    lower,
    upper,
    counts,
    count,
    size,
    ZEROS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    first = n * size
    a = step_size
    if step_sizes is not None:
        a = tl.load(step_sizes + n)
    wanted = count
    if counts is not None:
        wanted = tl.load(counts + n)

    # The wanted-th largest magnitude is the least one with fewer above it. Its bits are found four at a time: `last` is
    # the largest number found so far that is too small, if any.
    last = tl.full([], -1, tl.int64)
    for digit in range(8 - ZEROS // 4):
        trials = _trials(last, 28 - 4 * digit)
        found = _count_above(gradient, first, size, trials, BLOCK) >= wanted
        last = tl.maximum(last, tl.max(tl.where(found, trials, -1), 0))
    least_bits = tl.where(last < 0, 0, last + (1 << ZEROS))
    below = tl.maximum(least_bits - 1, 0) + tl.zeros([1], tl.int64)
    moved = tl.sum(_count_above(gradient, first, size, below, BLOCK), 0)
    least = least_bits.to(tl.int32).to(tl.float32, bitcast=True)
    a = tl.div_rn(a, tl.maximum(moved, 1).to(tl.float32))

    # The least cut that brings the sum down to epsilon, in the same way; any NaN makes the whole sample one.
    undefined = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        g = _read(gradient, first + i, i < size)
        delta = _l1_stepped(x, gradient, first + i, i < size, a, least) - _read(origin, first + i, i < size)
        undefined += ((g != g) | (delta != delta)).to(tl.int32)
    last = tl.full([], -1, tl.int64)
    for digit in range(8):
        trials = _trials(last, 28 - 4 * digit)
        cuts = trials.to(tl.int32).to(tl.float32, bitcast=True)
        totals = _l1_totals(x, origin, gradient, first, size, a, least, cuts, lower, upper, BLOCK)
        last = tl.maximum(last, tl.max(tl.where(totals > epsilon, trials, -1), 0))
    cut = tl.where(last < 0, 0, last + 1).to(tl.int32).to(tl.float32, bitcast=True)
    cut = tl.where(tl.sum(undefined, 0) > 0, float("nan"), cut)

    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = _l1_stepped(x, gradient, first + i, i < size, a, least)
        o = _read(origin, first + i, i < size)
        excess = _l1_excess(t, o, cut, lower, upper)
        moved_to = tl.where(t > o, o + excess, o - excess)
        t = _clamped(tl.where(cut == 0, t, moved_to), lower, upper)
        tl.store(out + first + i, t.to(out.dtype.element_ty), mask=i < size)


#: Bits of float32 that are 0 in every value of a dtype, in fours.
_ZEROS = {torch.bfloat16: 16, torch.float16: 12, torch.float32: 0}


def pgd_step_out(
    x: torch.Tensor,
    origin: torch.Tensor,
    gradient: torch.Tensor,
    step_size: float,
    step_sizes: torch.Tensor | None,
    epsilon: float,
    norm: str,
    lower: float,
    upper: float,
    count: int,
    counts: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    """`emr::pgd_step_out`."""
    if x.numel() == 0:
        return
    batch, numel = x.shape[0], x.numel()
    tensors = (x, origin, gradient, out, step_sizes, step_size, epsilon, lower, upper)
    if norm == "linf":
        samples = 1 if step_sizes is None else batch
        blocks = common.cdiv(numel // samples, _BLOCK)
        common.launch(linf_kernel, samples * blocks, x, *tensors, numel // samples, blocks, BLOCK=_BLOCK)
        return
    size = numel // batch
    block = max(triton.next_power_of_2(size), 128)
    if norm == "l2":
        common.launch(l2_kernel, batch, x, *tensors, size, BLOCK=min(block, _TILE), num_warps=8)
    else:
        options = {"ZEROS": _ZEROS[gradient.dtype], "BLOCK": min(block, _BLOCK), "num_warps": 8}
        common.launch(l1_kernel, batch, x, *tensors, counts, count, size, **options)


def pgd_step(
    x: torch.Tensor,
    origin: torch.Tensor,
    gradient: torch.Tensor,
    step_size: float,
    step_sizes: torch.Tensor | None,
    epsilon: float,
    norm: str,
    lower: float,
    upper: float,
    count: int,
    counts: torch.Tensor | None,
) -> torch.Tensor:
    """`emr::pgd_step`."""
    out = torch.empty_like(x)
    pgd_step_out(x, origin, gradient, step_size, step_sizes, epsilon, norm, lower, upper, count, counts, out)
    return out


def examples() -> None:
    """Launches for `check`."""

    def step(x: torch.Tensor, gradient: torch.Tensor, steps: torch.Tensor | None, counts: torch.Tensor | None) -> None:
        for norm in ("linf", "l2", "l1"):
            pgd_step(x, x, gradient, 0.1, steps, 0.3, norm, 0.0, 1.0, 30, counts)

    x, large = torch.empty(128, 3072, device="meta"), torch.empty(2, 2**31, device="meta")
    half = torch.empty_like(x, dtype=torch.bfloat16)
    step(x, x, torch.empty(128, device="meta"), torch.empty(128, dtype=torch.int64, device="meta"))
    step(x, half, None, None)
    step(half, half, None, None)
    step(large, large, None, None)

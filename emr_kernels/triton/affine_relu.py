"""The per-channel affine map with (leaky) ReLU, and its transpose: one pass over the elements in memory order.

A program handles a block as [BLOCK / 8, 8]: eight elements for each byte of bits. Where the tensor ends with a byte,
masks are for whole bytes, so that elements are read and written in vectors.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common

_BLOCK = 2048
_SIZES = ["n", "channels", "inner"]


@triton.jit
def _of_channels(
    vector, base, channels, inner, INNER: tl.constexpr, GROUPED: tl.constexpr, INDEX: tl.constexpr, BLOCK: tl.constexpr
):
    """The channels' values for a block: [BLOCK / 8, 8], or [BLOCK / 8, 1] where the elements of a byte share one."""
    period = tl.cast(channels, tl.int64) * inner
    # Counted from the start of a sample the elements' places are small enough for fast divisions.
    place = tl.cast(base % period, INDEX)
    count = tl.cast(channels, INDEX)
    group = tl.arange(0, BLOCK // 8).to(INDEX) * 8
    lane = tl.arange(0, 8)[None, :].to(INDEX)
    if GROUPED and INNER:
        channel = (place + group) // tl.cast(inner, INDEX) % count
        value = tl.load(vector + channel)[:, None]
    elif GROUPED:
        channel = (place + group[:, None]) % count
        value = tl.load(vector + tl.multiple_of(channel, [8, 8]) + lane)
    else:
        place += group[:, None] + lane
        if INNER:
            place = place // tl.cast(inner, INDEX)
        value = tl.load(vector + place % count)
    return value


@triton.jit(do_not_specialize=_SIZES)
def affine_relu_kernel(
    a,
    scale,
    shift,
    skip,
    y,
    bits,
    slope,
    n,
    channels,
    inner,
    LEAKY: tl.constexpr,
    WHOLE: tl.constexpr,
    INNER: tl.constexpr,
    GROUPED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(n - base, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK // 8)
    lane = tl.arange(0, 8)[None, :]
    offset = byte[:, None] * 8 + lane
    here = (byte[:, None] * 8 < left) if WHOLE else (offset < left)
    t = tl.load(a + base + offset, mask=here, other=0).to(tl.float32)
    if scale is not None:
        t = t * _of_channels(scale, base, channels, inner, INNER, GROUPED, INDEX, BLOCK)
    if shift is not None:
        t = t + _of_channels(shift, base, channels, inner, INNER, GROUPED, INDEX, BLOCK)
    if skip is not None:
        t = t + tl.load(skip + base + offset, mask=here, other=0).to(tl.float32)
    positive = t > 0
    # NaN is neither positive nor zeroed.
    value = tl.where(positive, t, t * slope) if LEAKY else tl.where(t <= 0, 0.0, t)
    tl.store(y + base + offset, value.to(y.dtype.element_ty), mask=here)
    # What lies beyond the tensor's end has no bit.
    packed = tl.sum((positive & here).to(tl.int32) << lane, 1)
    tl.store(bits + base // 8 + byte, packed.to(tl.uint8), mask=byte * 8 < left)


@triton.jit(do_not_specialize=_SIZES)
def affine_relu_vjp_kernel(
    delta,
    bits,
    scale,
    skip,
    out,
    slope,
    n,
    channels,
    inner,
    LEAKY: tl.constexpr,
    WHOLE: tl.constexpr,
    INNER: tl.constexpr,
    GROUPED: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK: tl.constexpr,
):
    base = tl.program_id(0).to(tl.int64) * BLOCK
    left = tl.minimum(n - base, BLOCK).to(tl.int32)
    byte = tl.arange(0, BLOCK // 8)[:, None]
    lane = tl.arange(0, 8)[None, :]
    offset = byte * 8 + lane
    here = (byte * 8 < left) if WHOLE else (offset < left)
    packed = tl.load(bits + base // 8 + byte, mask=byte * 8 < left, other=0).to(tl.int32)
    alive = ((packed >> lane) & 1) != 0
    d = tl.load(delta + base + offset, mask=here, other=0).to(tl.float32)
    value = tl.where(alive, d, d * slope if LEAKY else 0.0)
    if scale is not None:
        value = value * _of_channels(scale, base, channels, inner, INNER, GROUPED, INDEX, BLOCK)
    if skip is not None:
        value = value + tl.load(skip + base + offset, mask=here, other=0).to(tl.float32)
    tl.store(out + base + offset, value.to(out.dtype.element_ty), mask=here)


def channels_and_inner(tensor: torch.Tensor) -> tuple[int, int]:
    """The last two sizes of [outer, channels, inner], which the elements in memory order are."""
    if tensor.dim() < 2:
        return 1, 1
    return tensor.shape[1], math.prod(tensor.shape[2:]) if tensor.is_contiguous() else 1


def _launch_blocks(
    kernel: object, on: torch.Tensor, *arguments: object, channelwise: bool, negative_slope: float
) -> None:
    n = on.numel()
    # Without values for channels the layout does not matter: one specialisation for all.
    channels, inner = channels_and_inner(on) if channelwise else (1, 1)
    common.launch(
        kernel,
        common.cdiv(n, _BLOCK),
        on,
        *arguments,
        float(negative_slope),
        n,
        channels,
        inner,
        LEAKY=negative_slope != 0,
        WHOLE=n % 8 == 0,
        INNER=inner > 1,
        GROUPED=(inner if inner > 1 else channels) % 8 == 0,
        INDEX=tl.uint32 if common.fits_int32(channels * inner + _BLOCK) else tl.uint64,
        BLOCK=_BLOCK,
    )


def affine_relu_out(
    a: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    skip: torch.Tensor | None,
    negative_slope: float,
    out: torch.Tensor,
    bits: torch.Tensor,
) -> None:
    """`emr::affine_relu_out`; out may be a or skip."""
    channelwise = scale is not None or shift is not None
    arguments = (a, scale, shift, skip, out, bits)
    _launch_blocks(affine_relu_kernel, a, *arguments, channelwise=channelwise, negative_slope=negative_slope)


def affine_relu(
    a: torch.Tensor,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    skip: torch.Tensor | None,
    negative_slope: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`emr::affine_relu`."""
    y = torch.empty_like(a)
    bits = torch.empty((a.numel() + 7) // 8, dtype=torch.uint8, device=a.device)
    affine_relu_out(a, scale, shift, skip, negative_slope, y, bits)
    return y, bits


def affine_relu_vjp_out(
    delta: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None,
    skip: torch.Tensor | None,
    negative_slope: float,
    out: torch.Tensor,
) -> None:
    """`emr::affine_relu_vjp_out`; out may be delta or skip."""
    arguments = (delta, bits, scale, skip, out)
    channelwise = scale is not None
    _launch_blocks(affine_relu_vjp_kernel, delta, *arguments, channelwise=channelwise, negative_slope=negative_slope)


def affine_relu_vjp(
    delta: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None,
    skip: torch.Tensor | None,
    negative_slope: float,
) -> torch.Tensor:
    """`emr::affine_relu_vjp`."""
    out = torch.empty_like(delta)
    affine_relu_vjp_out(delta, bits, scale, skip, negative_slope, out)
    return out


def examples() -> None:
    """Launches for `check`: what the engine launches, and each way through the kernels."""
    image = torch.empty(8, 16, 32, 32, device="meta")
    odd = torch.empty(9, 13, 7, 7, device="meta")
    huge = torch.empty(2, 3, 2**15, 2**15, dtype=torch.bfloat16, device="meta")
    for a, slope, skip in (
        (image, 0.0, True),
        (image.bfloat16().contiguous(memory_format=torch.channels_last), 0.0, True),
        (odd.half().contiguous(memory_format=torch.channels_last), 0.1, True),
        (odd[1:], 0.1, False),
        (huge, 0.0, False),
    ):
        vector = torch.empty(a.shape[1], device="meta")
        bits = affine_relu(a, vector, vector, a if skip else None, slope)[1]
        affine_relu_vjp(a, bits, vector, a if skip else None, slope)
    bits = affine_relu(image, None, None, None, 0.0)[1]
    affine_relu_vjp(image, bits, None, None, 0.0)

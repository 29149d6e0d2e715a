"""The derivative of the affine map with (leaky) ReLU along a tangent, and with it the sums for the scale's gradient.

The elements in memory order are [outer, channels, inner]. Each program adds up tiles of one channel, or, where inner is
1, of neighbouring channels. Its sums are partial, and are added in a fixed order afterwards. There are no atomics: the
result is the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from emr_kernels.triton import common
from emr_kernels.triton.affine_relu import channels_and_inner

_TILE = 2048
#: Where rows do not start on bytes, each element has an address of its own in registers.
_TILE_OF_ODD_ROWS = 1024
#: Tiles that one program adds up at most, and programs that suffice to fill a GPU. They decide the order of the sums,
#: so they are no property of the device.
_TILES = 64
_PROGRAMS = 1024


@triton.jit(do_not_specialize=["outer", "channels", "inner", "slots", "row_tiles", "tiles", "tiles_each"])
def affine_relu_jvp_kernel(
    u,
    bits,
    scale,
    delta,
    out,
    partial,
    slope,
    outer,
    channels,
    inner,
    slots,
    row_tiles,
    tiles,
    tiles_each,
    LEAKY: tl.constexpr,
    INNER: tl.constexpr,
    GROUPED: tl.constexpr,
    IN_PLACE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    slot = tl.program_id(0) % slots
    chunk = tl.program_id(0) // slots
    row = tl.arange(0, ROWS)[:, None, None]
    lane = tl.arange(0, 8)[None, None, :]
    group = tl.arange(0, COLUMNS // 8)[None, :, None] * 8
    # Rows of the matrix that this program sums: the channel's in each sample, or all channels at each place.
    stride = tl.cast(channels, tl.int64) * inner
    columns = inner if INNER else channels
    if scale is not None and INNER:
        factor = tl.load(scale + slot)
    total = tl.zeros([ROWS, COLUMNS // 8, 8], tl.float32)
    first = chunk * tiles_each
    for tile in range(first, tl.minimum(first + tiles_each, tiles)):
        # Neighbouring tiles of a slot are neighbours in memory, if they can be.
        across = tl.cast(tile // row_tiles if INNER else slot, tl.int64) * COLUMNS
        down = tl.cast(tile % row_tiles if INNER else tile, tl.int64) * ROWS
        rows_left = tl.minimum(outer - down, ROWS).to(tl.int32)
        columns_left = tl.minimum(columns - across, COLUMNS).to(tl.int32)
        corner = down * stride + across
        if INNER:
            corner += tl.cast(slot, tl.int64) * inner
        here = (row < rows_left) & (group < columns_left)
        place = row * stride + group
        if GROUPED:
            # Whole bytes: each row starts and ends with one.
            place = tl.multiple_of(place, [8, 8, 8])
            corner = tl.multiple_of(corner, 8)
            packed = tl.load(bits + corner // 8 + place // 8, mask=here, other=0).to(tl.int32)
            alive = ((packed >> lane) & 1) != 0
            place = place + lane
        else:
            place = place + lane
            here = (row < rows_left) & (group + lane < columns_left)
            packed = tl.load(bits + (corner + place) // 8, mask=here, other=0).to(tl.int32)
            alive = ((packed >> ((corner + place) % 8).to(tl.int32)) & 1) != 0
        tangent = tl.load(u + corner + place, mask=here, other=0).to(tl.float32)
        cotangent = tl.load(delta + corner + place, mask=here, other=0).to(tl.float32)
        if IN_PLACE:
            # Another thread may read an element than writes it.
            tl.debug_barrier()
        product = tl.where(alive, tangent, tangent * slope if LEAKY else 0.0)
        total += product * cotangent
        if scale is not None:
            if INNER:
                product = product * factor
            else:
                channel = across + group + lane
                product = product * tl.load(scale + channel, mask=group + lane < columns_left)
        tl.store(out + corner + place, product.to(out.dtype.element_ty), mask=here)
    partial += tl.cast(chunk, tl.int64) * channels
    if INNER:
        tl.store(partial + slot, tl.sum(total))
    else:
        channel = slot * COLUMNS + tl.arange(0, COLUMNS // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        tl.store(partial + channel, tl.sum(total, 0), mask=channel < channels)


def _tile_width(columns: int, most: int) -> int:
    """A power of two of at least 8: the largest that wastes little of its last tile, else the one that wastes least."""
    widths = [width for width in (2048, 1024, 512, 256, 128, 64, 32) if width <= most]
    if columns <= widths[-1]:
        return max(8, triton.next_power_of_2(columns))
    waste = {width: common.cdiv(columns, width) * width / columns for width in widths}
    return next((width for width in widths if waste[width] <= 1.15), min(widths, key=lambda width: waste[width]))


def affine_relu_jvp_out(
    u: torch.Tensor,
    bits: torch.Tensor,
    scale: torch.Tensor | None,
    negative_slope: float,
    delta: torch.Tensor,
    out: torch.Tensor,
) -> torch.Tensor:
    """`emr::affine_relu_jvp_out`; out may be u or delta."""
    channels, inner = channels_and_inner(u)
    if u.numel() == 0:
        return torch.zeros(channels, dtype=torch.float32, device=u.device)
    outer = u.numel() // (channels * inner)
    columns = inner if inner > 1 else channels
    tile = _TILE if columns % 8 == 0 else _TILE_OF_ODD_ROWS
    width = _tile_width(columns, tile if inner > 1 else 256)
    rows = min(tile // width, triton.next_power_of_2(outer))
    row_tiles, column_tiles = common.cdiv(outer, rows), common.cdiv(columns, width)
    slots, tiles = (channels, row_tiles * column_tiles) if inner > 1 else (column_tiles, row_tiles)
    tiles_each = min(_TILES, max(1, slots * tiles // _PROGRAMS))
    chunks = common.cdiv(tiles, tiles_each)
    partial = torch.empty((chunks, channels), dtype=torch.float32, device=u.device)
    common.launch(
        affine_relu_jvp_kernel,
        slots * chunks,
        u,
        u,
        bits,
        scale,
        delta,
        out,
        partial,
        float(negative_slope),
        outer,
        channels,
        inner,
        slots,
        row_tiles,
        tiles,
        tiles_each,
        LEAKY=negative_slope != 0,
        INNER=inner > 1,
        GROUPED=columns % 8 == 0,
        IN_PLACE=out.data_ptr() in (u.data_ptr(), delta.data_ptr()),
        ROWS=rows,
        COLUMNS=width,
    )
    return partial[0] if chunks == 1 else partial.sum(0)


def affine_relu_jvp(
    u: torch.Tensor, bits: torch.Tensor, scale: torch.Tensor | None, negative_slope: float, delta: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`emr::affine_relu_jvp`."""
    out = torch.empty_like(u)
    return out, affine_relu_jvp_out(u, bits, scale, negative_slope, delta, out)


def examples() -> None:
    """Launches for `check`: what the engine launches, and each way through the kernel."""
    image = torch.empty(8, 16, 32, 32, device="meta")
    odd = torch.empty(64, 13, 7, 7, device="meta")
    huge = torch.empty(2, 3, 2**15, 2**15, dtype=torch.bfloat16, device="meta")
    for u, slope in (
        (image, 0.0),
        (image.bfloat16().contiguous(memory_format=torch.channels_last), 0.0),
        (odd.half().contiguous(memory_format=torch.channels_last), 0.1),
        (odd[1:], 0.1),
        (huge, 0.0),
    ):
        bits = torch.empty((u.numel() + 7) // 8, dtype=torch.uint8, device="meta")
        affine_relu_jvp(u, bits, torch.empty(u.shape[1], device="meta"), slope, u)

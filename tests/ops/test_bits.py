"""Packed bits: their order, their tail, and that packing and unpacking undo one another."""

from __future__ import annotations

import pytest
import torch

from backends import BACKENDS, Backend
from emr_kernels import ops
from emr_kernels.ops.bits import pack_bits_reference


def test_order_of_bits() -> None:
    mask = torch.tensor([1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=torch.bool)
    assert ops.pack_bits(mask).tolist() == [1, 6]


@pytest.mark.parametrize("shape", [(0,), (1,), (8,), (3, 5), (2, 3, 5, 7), (2, 3, 4, 5, 6), (40000,)], ids=str)
def test_round_trip(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    bits = ops.pack_bits(mask)
    assert bits.dtype == torch.uint8 and bits.shape == ((mask.numel() + 7) // 8,)
    assert torch.equal(ops.unpack_bits(bits, shape), mask)
    if mask.numel() % 8:
        assert int(bits[-1]) < 1 << mask.numel() % 8


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_backends_match_reference(backend: Backend) -> None:
    kernel = backend.kernel("pack_bits", torch.float32)
    flat = torch.rand(40001) > 0.5
    image = (torch.rand(3, 5, 7, 9) > 0.5).contiguous(memory_format=torch.channels_last)
    # Several blocks with a tail, an unaligned slice, another memory order, fewer than a byte, nothing.
    for mask in (flat, flat[3:30003], image, flat[:7], flat[:0]):
        assert torch.equal(kernel(mask.to(backend.device)).cpu(), pack_bits_reference(mask))


def test_channels_last_order() -> None:
    mask = torch.rand(2, 3, 5, 7) > 0.5
    last = mask.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.pack_bits(last), ops.pack_bits(mask.permute(0, 2, 3, 1).contiguous()))
    assert torch.equal(ops.unpack_bits(ops.pack_bits(last), mask.shape, torch.channels_last), mask)
    assert torch.equal(ops.pack_bits(mask.transpose(0, 1)), ops.pack_bits(mask.transpose(0, 1).contiguous()))


def test_dense_format() -> None:
    a = torch.zeros(2, 3, 5, 7)
    assert ops.dense_format(a) == torch.contiguous_format
    assert ops.dense_format(a.contiguous(memory_format=torch.channels_last)) == torch.channels_last
    assert ops.dense_format(a[..., ::2]) == torch.contiguous_format
    assert ops.dense_format(torch.zeros(2, 1, 5, 7).to(memory_format=torch.channels_last)) == torch.contiguous_format
    volume = torch.zeros(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d)
    assert ops.dense_format(volume) == torch.channels_last_3d


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"mask has dtype torch.float32; expected torch.bool"):
        ops.pack_bits(torch.zeros(3))
    with pytest.raises(TypeError, match="mask is list"):
        ops.pack_bits([True])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bits has shape \(1,\); expected \(2,\)"):
        ops.unpack_bits(torch.zeros(1, dtype=torch.uint8), (9,))
    with pytest.raises(TypeError, match=r"bits has dtype torch.int64"):
        ops.unpack_bits(torch.zeros(1, dtype=torch.int64), (8,))

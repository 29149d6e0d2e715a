"""Packed bits: bit i & 7 of byte i >> 3 belongs to element i of a tensor's dense memory order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from emr_kernels.ops import _dispatch
from emr_kernels.ops._format import dense_format, flatten_dense, to_format, unflatten_dense


def pack_bits_reference(mask: torch.Tensor) -> torch.Tensor:
    """`pack_bits` in plain PyTorch, for a dense mask."""
    flat = flatten_dense(mask)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -flat.numel() % 8)).view(-1, 8)
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded * weights).sum(1, dtype=torch.uint8)


def unpack_bits_reference(bits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The mask whose bits were packed in the dense memory order of `like`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits[:, None] >> shifts) & 1).view(-1)[: like.numel()]
    return unflatten_dense(flat.to(torch.bool), like)


def _pack_bits_fake(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


_pack_bits = _dispatch.define("pack_bits(Tensor mask) -> Tensor", pack_bits_reference, _pack_bits_fake)


def pack_bits(mask: torch.Tensor) -> torch.Tensor:
    """Pack a mask into one bit for each element, in the mask's dense memory order.

    Args:
        mask: bool, any shape. Row-major unless it is dense in channels-last order (see `dense_format`).

    Returns:
        uint8 `[ceil(numel / 8)]`; unused bits of the last byte are 0.

    Raises:
        TypeError: if mask is not a bool tensor.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask is {type(mask).__name__}; expected a tensor")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool")
    dense = to_format(mask, dense_format(mask))
    return _pack_bits(dense, dense)


def unpack_bits(
    bits: torch.Tensor, shape: Sequence[int], memory_format: torch.memory_format = torch.contiguous_format
) -> torch.Tensor:
    """Unpack bits into the mask they were packed from; for inspection, not for speed.

    Args:
        bits: uint8 `[ceil(numel / 8)]`.
        shape: the mask's shape.
        memory_format: the order in which the bits were packed.

    Returns:
        bool, of that shape and memory format.

    Raises:
        TypeError: if bits is not a uint8 tensor.
        ValueError: if it has another number of bytes than the shape needs.
    """
    if not isinstance(bits, torch.Tensor):
        raise TypeError(f"bits is {type(bits).__name__}; expected a tensor")
    if bits.dtype != torch.uint8:
        raise TypeError(f"bits has dtype {bits.dtype}; expected torch.uint8")
    like = torch.empty(tuple(shape), device="meta", memory_format=memory_format)
    size = (like.numel() + 7) // 8
    if bits.shape != (size,):
        raise ValueError(f"bits has shape {tuple(bits.shape)}; expected ({size},) for a mask of {tuple(shape)}")
    return unpack_bits_reference(bits, like)

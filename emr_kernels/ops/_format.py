"""Dense memory orders: in which order a tensor's elements lie, and back; and the dtype of arithmetic."""

from __future__ import annotations

import torch

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32: the arithmetic of every operator."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def dense_format(tensor: torch.Tensor) -> torch.memory_format:
    """The memory format whose order the bits of `tensor` are packed in.

    Channels-last (2d or 3d) for a tensor that is dense in that order and not also row-major, else row-major.
    """
    if tensor.is_contiguous():
        return torch.contiguous_format
    candidate = _CHANNELS_LAST.get(tensor.dim())
    if candidate is not None and tensor.is_contiguous(memory_format=candidate):
        return candidate
    return torch.contiguous_format


def to_format(tensor: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    """The tensor itself where it is already dense in that order, else a copy that is."""
    return tensor.contiguous(memory_format=memory_format)


def dense_samples(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where each sample's elements fill one stretch of memory, in any order, else a copy that does.

    The stretches of a batch may lie anywhere: a slice or an expansion along the batch stays as it is.
    """
    expected = 1
    inner = zip(tensor.stride()[1:], tensor.shape[1:], strict=True)
    for stride, size in sorted(pair for pair in inner if pair[1] != 1):
        if stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor


def flatten_dense(tensor: torch.Tensor) -> torch.Tensor:
    """A dense tensor's elements as a 1-d view, in memory order."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    return tensor.movedim(1, -1).reshape(-1)


def unflatten_dense(flat: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A 1-d tensor in the memory order of `like`, viewed in the shape of `like`."""
    if like.is_contiguous():
        return flat.view(like.shape)
    n, c, *space = like.shape
    return flat.view(n, *space, c).movedim(-1, 1)

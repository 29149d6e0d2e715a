"""Checks of operator arguments; each names the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_floating(name: str, tensor: object) -> None:
    """A tensor of one of the four floating dtypes."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected float32, bfloat16, float16 or float64")


def check_like(name: str, tensor: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """The same shape, dtype and device as another tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} is {type(tensor).__name__}; expected a tensor")
    if tensor.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(like.shape)}, that of {like_name}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {like.dtype}, that of {like_name}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on device {tensor.device}; expected {like.device}, that of {like_name}")


def check_channels(name: str, vector: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """A floating vector with one value for each channel (dimension 1) of another tensor."""
    check_floating(name, vector)
    if like.dim() < 2:
        raise ValueError(f"{like_name} has shape {tuple(like.shape)}; expected [N, C, ...] where {name} is given")
    if vector.shape != like.shape[1:2]:
        raise ValueError(f"{name} has shape {tuple(vector.shape)}; expected ({like.shape[1]},), one for each channel")
    if vector.device != like.device:
        raise ValueError(f"{name} is on device {vector.device}; expected {like.device}, that of {like_name}")


def check_bits(name: str, bits: torch.Tensor, like_name: str, like: torch.Tensor) -> None:
    """Packed bits of as many elements as another tensor has."""
    if not isinstance(bits, torch.Tensor):
        raise TypeError(f"{name} is {type(bits).__name__}; expected a tensor")
    if bits.dtype != torch.uint8:
        raise TypeError(f"{name} has dtype {bits.dtype}; expected torch.uint8")
    size = (like.numel() + 7) // 8
    if bits.dim() != 1 or bits.shape[0] != size or not bits.is_contiguous():
        raise ValueError(
            f"{name} has shape {tuple(bits.shape)} and strides {bits.stride()}; expected ({size},) and (1,), "
            f"one bit for each element of {like_name}"
        )
    if bits.device != like.device:
        raise ValueError(f"{name} is on device {bits.device}; expected {like.device}, that of {like_name}")


def check_out(out: torch.Tensor, like_name: str, like: torch.Tensor, memory_format: torch.memory_format) -> None:
    """A result buffer that is dense in the wanted order."""
    check_like("out", out, like_name, like)
    if not out.is_contiguous(memory_format=memory_format):
        raise ValueError(f"out has strides {out.stride()}; expected a dense tensor in {memory_format}")


def check_one_of(name: str, value: object, known: tuple[str, ...]) -> None:
    """One of a few names."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, known))}")


def check_rows(name: str, logits: torch.Tensor, least: int) -> None:
    """Floating rows `[N, C]` with at least so many classes."""
    check_floating(name, logits)
    if logits.dim() != 2 or logits.shape[1] < least:
        raise ValueError(f"{name} has shape {tuple(logits.shape)}; expected [N, C] with C >= {least}")


def check_classes(name: str, classes: torch.Tensor, like_name: str, logits: torch.Tensor) -> None:
    """One class index for each row of `logits` `[N, C]`; the indices are read on the CPU only, where nothing waits."""
    if not isinstance(classes, torch.Tensor):
        raise TypeError(f"{name} is {type(classes).__name__}; expected a tensor")
    if classes.dtype != torch.int64:
        raise TypeError(f"{name} has dtype {classes.dtype}; expected torch.int64 class indices")
    if classes.shape != logits.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(classes.shape)}; expected ({logits.shape[0]},), one for each row of {like_name}"
        )
    if classes.device != logits.device:
        raise ValueError(f"{name} is on device {classes.device}; expected {logits.device}, that of {like_name}")
    if classes.is_cpu and classes.numel() and not torch.compiler.is_compiling():
        low, high = (int(t) for t in classes.aminmax())
        if low < 0 or high >= logits.shape[1]:
            wrong = low if low < 0 else high
            raise ValueError(f"{name} holds {wrong}; expected class indices in [0, {logits.shape[1]})")


def check_not_differentiated(operator: str, **tensors: torch.Tensor | None) -> None:
    """The operators have no derivative of their own: refuse where one would be lost silently.

    Raises:
        RuntimeError: in grad mode with an argument that requires grad, or with a forward-mode dual number.
    """
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{operator} has no derivative, and {name} requires grad; expected torch.no_grad() around it"
                )
    if forward_ad._current_level >= 0:
        for name, tensor in tensors.items():
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise RuntimeError(f"{operator} has no derivative, and {name} carries a forward-mode tangent")

"""Checks of arguments: each names the argument, its value and what was expected."""

from __future__ import annotations

import torch
from torch import nn


def check_model(model: object) -> None:
    """A model is an `nn.Module`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected torch.nn.Module")


def check_input(model: nn.Module, x: object, *, values: bool = False) -> None:
    """x is a floating-point batch `[N, ...]` on the model's device and in one of its dtypes.

    Args:
        values: whether to check that every value is finite (reads the data; on a GPU that waits for it).

    Raises:
        TypeError: if x is not a floating-point tensor, or not in a dtype of the model's parameters (outside autocast).
        ValueError: for a wrong number of dimensions, an empty batch, another device, or a NaN or infinity.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is {type(x).__name__}; expected a tensor [N, ...]")
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; expected a floating-point dtype")
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected [N, ...] with at least two dimensions")
    if x.numel() == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected at least one sample")
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    devices = {t.device for t in tensors}
    if tensors and x.device not in devices:
        raise ValueError(f"x is on device {x.device}; expected the model's device {tensors[0].device}")
    dtypes = {t.dtype for t in tensors}
    if tensors and x.dtype not in dtypes and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x has dtype {x.dtype}; expected the model's dtype {tensors[0].dtype}")
    if values and not bool(torch.isfinite(x).all()):
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"x holds NaN or infinity (first in sample {bad}); expected finite values")


def check_labels(y: object, x: torch.Tensor, num_classes: int, *, values: bool = False) -> None:
    """y holds one class index for each sample.

    Raises:
        TypeError: if y is not a tensor of int64.
        ValueError: for a wrong shape or device, or a label outside [0, C).
    """
    if not isinstance(y, torch.Tensor):
        raise TypeError(f"y is {type(y).__name__}; expected a tensor [N] of class indices")
    if y.dtype != torch.int64:
        raise TypeError(f"y has dtype {y.dtype}; expected torch.int64 class indices")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y has shape {tuple(y.shape)}; expected {tuple(x.shape[:1])}, one label for each sample")
    if y.device != x.device:
        raise ValueError(f"y is on device {y.device}; expected {x.device}, the device of x")
    if values:
        low, high = int(y.min()), int(y.max())
        if low < 0 or high >= num_classes:
            wrong = low if low < 0 else high
            raise ValueError(f"y holds the label {wrong}; expected labels in [0, {num_classes})")


def check_logits(logits: object, batch: int) -> None:
    """The model returned one tensor `[N, C]`.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it has another shape.
    """
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"model returns {type(logits).__name__}; expected one tensor of logits [N, C]")
    if not logits.is_floating_point():
        raise TypeError(f"model returns dtype {logits.dtype}; expected floating-point logits")
    if logits.dim() != 2 or logits.shape[0] != batch or logits.shape[1] < 1:
        raise ValueError(f"model returns shape {tuple(logits.shape)}; expected logits [N, C] with N = {batch}")

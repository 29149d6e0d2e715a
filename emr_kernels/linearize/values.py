"""The values of a graph: looked up on the live model, cast, added."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from emr_kernels.linearize.graph import Binding

_AUTOCAST_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def look_up(model: nn.Module, binding: Binding, path: list[str]) -> torch.Tensor:
    value: Any = model
    for part in path:
        value = getattr(value, part, None)
    if isinstance(value, torch.Tensor):
        return value
    if binding.constant is None:
        raise AttributeError(f"the model no longer has {binding.name!r}; call refresh() after changing its structure")
    return binding.constant


def dtype_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    return tuple(dtype_of(v) for v in value) if isinstance(value, (tuple, list)) else None


def cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _AUTOCAST_DTYPES and value.dtype != dtype:
        return value.to(dtype)
    return value


def add(held: Any, new: Any, dtype: Any, fresh: bool) -> Any:
    """held + new in the value's dtype; for operators with several outputs, output by output."""
    if isinstance(new, (tuple, list)):
        olds = held or (None,) * len(new)
        dtypes = dtype if isinstance(dtype, tuple) else (dtype,) * len(new)
        return tuple(
            old if part is None else add(old, part, kind, False)
            for old, part, kind in zip(olds, new, dtypes, strict=True)
        )
    if new.dtype != dtype:
        new = new.to(dtype)
    if held is None:
        return new
    return new.add_(held) if fresh else held + new

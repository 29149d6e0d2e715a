"""Checks of arguments: each error names the argument, its value and what was expected."""

from __future__ import annotations

import math
from difflib import get_close_matches
from numbers import Real

import torch
from torch import Tensor


def nearest(name: str, valid: list[str]) -> str:
    """A hint that names the valid option closest to `name`, or all of them when none is close."""
    by_lower_case = {option.lower(): option for option in valid}
    close = get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    return f"did you mean {by_lower_case[close[0]]!r}?" if close else f"expected one of {', '.join(map(repr, valid))}"


def check_number(name: str, value: float, *, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise TypeError or ValueError unless `value` is a finite number in [low, high]."""
    expected = f"a number in [{low:g}, {high:g}]" if math.isfinite(high) else f"a finite number >= {low:g}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected {expected}")
    if not math.isfinite(value) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def check_count(name: str, value: int, *, low: int = 1) -> None:
    """Raise TypeError or ValueError unless `value` is an integer >= low."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; expected an integer >= {low}")
    if value < low:
        raise ValueError(f"{name} is {value}; expected an integer >= {low}")


def check_smoothing(value: float) -> None:
    """Raise ValueError unless label smoothing is in [0, 1)."""
    check_number("smoothing", value, low=0.0)
    if value >= 1:
        raise ValueError(f"smoothing is {value}; expected a number in [0, 1)")


def check_images(x: Tensor, y: Tensor) -> None:
    """Raise unless x is a floating-point batch [N, ...] in [0, 1] and y is int64 [N] on the same device.

    Labels above the number of classes can only be seen once logits are there: see `check_logits`.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is of type {got}; expected a floating-point tensor [N, ...] with values in [0, 1]")
    if x.dim() < 2:
        raise ValueError(f"x has shape {list(x.shape)}; expected a batch [N, ...] of at least 2 dimensions")
    if not isinstance(y, Tensor) or y.dtype != torch.int64:
        got = y.dtype if isinstance(y, Tensor) else type(y).__name__
        raise TypeError(f"y is of type {got}; expected class indices as a torch.int64 tensor [N]")
    if y.shape != x.shape[:1]:
        raise ValueError(f"y has shape {list(y.shape)}; expected [{x.shape[0]}], one label per row of x")
    if y.device != x.device:
        raise ValueError(f"y is on {y.device}; expected {x.device}, the device of x")
    if x.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(x.detach()))
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(
            # Nine digits tell the neighbours of 1 in float32 from 1.
            f"x has values in [{low:.9g}, {high:.9g}]; expected [0, 1] (put input normalisation inside the model)"
        )
    if int(y.min()) < 0:
        raise ValueError(f"y has the label {int(y.min())}; expected class indices >= 0")


def check_targets(target: Tensor, y: Tensor) -> None:
    """Raise unless target is int64 [N] on y's device, no target negative or equal to its label."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        got = target.dtype if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(f"target is of type {got}; expected class indices as a torch.int64 tensor [N]")
    if target.shape != y.shape or target.device != y.device:
        found = f"shape {list(target.shape)} on {target.device}"
        raise ValueError(f"target has {found}; expected {list(y.shape)} on {y.device}, one target for each label")
    if y.numel() and int(target.min()) < 0:
        raise ValueError(f"target has the class {int(target.min())}; expected class indices >= 0")
    same = int((target == y).sum())
    if same:
        raise ValueError(f"target is the label itself in {same} places; expected another class for each image")


def check_logits(logits: Tensor, y: Tensor, target: Tensor | None = None) -> None:
    """Raise unless `logits` is floating [N, C], C >= 2, without NaN, and labels and targets are below C."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != y.shape[0] or logits.shape[1] < 2:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model's output is {got}; expected logits [{y.shape[0]}, C] with C >= 2 classes")
    if not logits.is_floating_point():
        raise TypeError(f"the model's output is of {logits.dtype}; expected logits of a floating-point dtype")
    if bool(logits.isnan().any()):
        raise ValueError("the model's output has NaN; expected numbers, as NaN logits count for no class")
    classes = logits.shape[1]
    if y.numel() and int(y.max()) >= classes:
        raise ValueError(f"y has the label {int(y.max())}; expected labels below the model's {classes} classes")
    if target is not None and target.numel() and int(target.max()) >= classes:
        raise ValueError(f"target has the class {int(target.max())}; expected classes below the model's {classes}")

"""Contenders, and whether they compute what they should: asked before anything is timed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.micro.entries import Entry, Inputs, Make
from emr_kernels import _extension
from emr_kernels.ops import _dispatch

#: Relative error against the reference, by the result's dtype: a few roundings of a long sum, or one of a narrow dtype.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
#: Part of the bits or indices that may differ: units within a rounding of the kink.
FLIPS = 1e-4
BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def contender(entry: Entry, name: str) -> tuple[Callable[..., Any], bool]:
    """A contender's function, and whether it takes the eager formula's arguments.

    Raises:
        BackendUnavailableError: where there is none here.
    """
    if name == "eager":
        return entry.eager, True
    if name == "compile":
        torch._dynamo.reset()
        return torch.compile(entry.eager, dynamic=False), True
    _extension.prepare()
    return _dispatch.operators[entry.operator].kernel(name), False


def error_of(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """How far a result is from the reference's, 1 being what is allowed; inf for another dtype, shape or order."""
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        return math.inf
    if not actual.is_floating_point():
        return float((actual != expected).double().mean()) / FLIPS if actual.numel() else 0.0
    finite = expected.isfinite()
    if not torch.equal(torch.where(finite, 0, actual).nan_to_num(3), torch.where(finite, 0, expected).nan_to_num(3)):
        return math.inf
    a, e = (torch.where(finite, t, 0).double() for t in (actual, expected))
    norm, largest = float(e.norm()), float(e.abs().max()) if e.numel() else 0.0
    off, worst = float((a - e).norm()), float((a - e).abs().max()) if e.numel() else 0.0
    # One wrong element among millions hardly moves the norm.
    found = max(off / (tolerance * norm or 1), worst / (100 * tolerance * largest or 1))
    return found if found == found else math.inf


def deviation(entry: Entry, function: Callable[..., Any], is_eager: bool, inputs: Inputs, dtype: torch.dtype) -> float:
    """How far a contender's results are from right, 1 being what is allowed."""
    result = function(*(inputs.eager if is_eager else inputs.arguments))
    found = (
        (result if isinstance(result, tuple) else (result,)) if is_eager else entry.outputs(result, inputs.arguments)
    )
    if entry.deviation is not None:
        return entry.deviation(found, inputs)
    found = tuple(t.clone() for t in found)
    result = _dispatch.operators[entry.operator].reference(*inputs.arguments)
    expected = entry.outputs(result, inputs.arguments)
    pairs = zip(found, expected, strict=False)
    if not is_eager:
        return max(error_of(f, e, TOLERANCES.get(e.dtype, 0.0)) for f, e in pairs)
    # Eager PyTorch rounds to a narrow dtype between its operators, and keeps sums in it.
    return max(error_of(f.to(e.dtype), e, 4 * TOLERANCES[dtype]) for f, e in pairs)


def sets_of(entry: Entry, first: Inputs, moved: int, make: Make) -> list[Inputs]:
    """Several sets of arguments where one would stay in a GPU's cache."""
    if make.device.type != "cuda":
        return [first]
    cache = torch.cuda.get_device_properties(make.device).L2_cache_size
    return [first, *(entry.make(make) for _ in range(min(8, math.ceil(2 * cache / moved)) - 1))]


def moved_bytes(arguments: tuple[Any, ...], result: Any) -> int:
    """Bytes of all tensors that go in and come out, each counted once."""
    flat, rest = {}, [*arguments, result]
    while rest:
        item = rest.pop()
        if isinstance(item, torch.Tensor):
            flat[item.data_ptr()] = item.nbytes
        elif isinstance(item, (list, tuple)):
            rest.extend(item)
    return sum(flat.values())

"""What all launchers share: launching on a tensor's device, sizes of grids, and whether kernels are interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

#: Element types the kernels serve. Float64 is left to the references.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: the kernel, its arguments and the compiler's options."""

    kernel: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]


_recorded: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Note down launches instead of doing them; what they would be given may be meta tensors."""
    global _recorded
    _recorded, before = [], _recorded
    try:
        yield _recorded
    finally:
        _recorded = before


def interpreted() -> bool:
    """Whether kernels defined now run in Triton's interpreter, on the CPU: give autotuners one configuration then."""
    return bool(triton.knobs.runtime.interpret)


def cdiv(count: int, block: int) -> int:
    """Blocks needed for `count` elements; Python's integers, so never too large."""
    return -(-count // block)


def fits_int32(largest: int) -> bool:
    """Whether a kernel may compute an index of at most this size in 32 bits."""
    return largest <= _INT32_MAX


def launch(
    kernel: Any, grid: Any, on: torch.Tensor, /, *arguments: Any, fp_fusion: bool = False, **keywords: Any
) -> None:
    """Launch a kernel on the device of `on`, in its current stream; nothing for an empty grid.

    Args:
        grid: a number of programs (up to 2**31 - 1: let one dimension carry it, the others end at 65535), a tuple, or
            for an autotuned kernel a function of its constants.
        arguments: the kernel's, in order; None where a tensor is left out.
        fp_fusion: whether a * b + c may be contracted. Not by default: results round as the references' do.
        keywords: the kernel's constants, and options of the compiler such as num_warps.

    Raises:
        ValueError: if `on` is on the CPU and kernels are not interpreted.
    """
    keywords["enable_fp_fusion"] = fp_fusion
    if isinstance(grid, int):
        grid = (grid,)
    if isinstance(grid, tuple) and 0 in grid:
        return
    if _recorded is not None:
        _recorded.append(Launch(kernel, arguments, keywords))
    elif on.is_cpu and not interpreted():
        raise ValueError("a tensor is on the CPU; expected one on a GPU, or TRITON_INTERPRET=1 from the start")
    elif on.is_cuda and on.device.index != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(on.device):
            kernel[grid](*arguments, **keywords)
    else:
        kernel[grid](*arguments, **keywords)

"""What a micro-benchmark is made of: how its tensors are drawn, its arguments, and what it compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class Make:
    """Draws tensors of one dtype and memory format on one device."""

    device: torch.device
    dtype: torch.dtype
    layout: str
    generator: torch.Generator

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = torch.randn(shape, generator=self.generator, device=self.device).to(dtype or self.dtype)
        return self._ordered(values)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype | None = None) -> Any:
        values = torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low
        return self._ordered(values.to(dtype or self.dtype))

    def integers(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def _ordered(self, values: torch.Tensor) -> torch.Tensor:
        return values.contiguous(memory_format=FORMATS[self.layout]) if values.dim() == 4 else values


@dataclass(frozen=True)
class Inputs:
    """One set of arguments.

    Attributes:
        arguments: of the raw operator, in its schema's order.
        eager: of the formula in eager PyTorch.
        on: the tensor by whose size a backend is chosen.
    """

    arguments: tuple[Any, ...]
    eager: tuple[Any, ...]
    on: torch.Tensor


@dataclass(frozen=True)
class Entry:
    """One operator at one size.

    Attributes:
        operator: its name without the namespace.
        case: what is special here, such as a norm; may be empty.
        shape: for the reader.
        make: draws one set of arguments.
        eager: the formula in eager PyTorch; gives the operator's results, or the first few of them.
        outputs: the operator's results from what it returned and its arguments, in a form that can be compared.
        layouts: memory formats to measure.
        size: 0 small, 1 medium, 2 large, 3 larger than the cache of a GPU.
        dtypes: to measure.
        matmul: (m, k, n) of the product that bounds it, None where memory does.
        deviation: where results cannot equal the reference's: how far they are from right, 1 what is allowed.
    """

    operator: str
    case: str
    shape: str
    make: Callable[[Make], Inputs]
    eager: Callable[..., Any]
    outputs: Callable[[Any, tuple[Any, ...]], tuple[torch.Tensor, ...]] = field(
        default=lambda result, _: result if isinstance(result, tuple) else (result,)
    )
    layouts: tuple[str, ...] = ("nchw",)
    size: int = 1
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    matmul: tuple[int, int, int] | None = None
    deviation: Callable[[tuple[torch.Tensor, ...], Inputs], float] | None = None

    @property
    def name(self) -> str:
        """Operator, case and shape."""
        return "-".join(part for part in (self.operator, self.case, self.shape) if part)


def shape_name(*sizes: int) -> str:
    return "x".join(map(str, sizes))

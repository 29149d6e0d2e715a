"""What all contenders of a benchmark have in common: the network, its inputs, the device, the precision."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import build, input_shape

FORMATS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
_SPOKEN = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


@dataclass(frozen=True)
class Setting:
    """A network, a batch, a device and a precision; low precision is autocast, as in training."""

    model: str
    batch: int
    device: str = "cpu"
    precision: str = "fp32"
    classes: int = 10
    resolution: int | None = None

    @property
    def place(self) -> torch.device:
        """The device."""
        return torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of products."""
        return PRECISIONS[self.precision]

    @property
    def layouts(self) -> list[str]:
        """Memory formats that make a difference to this network."""
        return ["nchw"] if len(input_shape(self.model)) == 1 else list(FORMATS)

    def with_(self, **changes: Any) -> Setting:
        """The same with changes."""
        return replace(self, **changes)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward: what low precision means in training."""
        if self.precision in ("fp32", "fp64"):
            return contextlib.nullcontext()
        return torch.autocast(self.place.type, self.dtype)

    def make(self, layout: str = "nchw") -> tuple[nn.Module, Tensor, Tensor]:
        """The network in evaluation mode, images [N, ...] in [0, 1] and labels [N]."""
        shape = input_shape(self.model, self.resolution)
        generator = torch.Generator().manual_seed(1)
        x = torch.rand(self.batch, *shape, generator=generator)
        y = torch.randint(self.classes, (self.batch,), generator=generator)
        kept = torch.float64 if self.precision == "fp64" else torch.float32
        model = build(self.model, shape, self.classes).eval().to(self.place, kept)
        x = x.to(self.place, kept)
        if x.dim() == 4:
            model, x = model.to(memory_format=FORMATS[layout]), x.contiguous(memory_format=FORMATS[layout])  # type: ignore[call-overload]
        return model, x, y.to(self.place)

    def title(self) -> str:
        """In words."""
        other = f", {self.classes} classes" if self.classes != 10 else ""
        other += f", {self.resolution} px" if self.resolution else ""
        return f"{self.model}, batch {self.batch}, {_SPOKEN[self.precision]}{other}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `Setting(**...)` gives it back."""
        return asdict(self)

"""What one model of the zoo states about itself."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

CLASSES = 4
#: Where the tests marked `device` run: EMR_TEST_DEVICE, the CPU by default.
DEVICE = torch.device(os.environ.get("EMR_TEST_DEVICE", "cpu"))


@dataclass(frozen=True)
class Entry:
    """A model factory with the input it takes and what is expected of the library on it.

    ``engine`` is "linearized" for models that must not fall back, "autograd" for those that must (``reason``
    is a regular expression for the warning), and "any" where either is right if the gradients are.
    ``tolerance`` other than 1e-10 has its reason in ``why``. ``piecewise_linear``: no gradient in x.
    """

    id: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    batch: int = 3
    engine: str = "linearized"
    reason: str = ""
    tolerance: float = 1e-10
    why: str = ""
    piecewise_linear: bool = False
    layers: tuple[str, ...] = ()
    any_batch: bool = True
    reference_build: Callable[[], nn.Module] | None = None

    def make(self, dtype: torch.dtype = torch.float64, reference: bool = False) -> nn.Module:
        """The model in training mode, with the same weights at every call.

        ``reference`` gives its twin for the oracle, where an operator of the model has no second derivative.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.id.encode()))
            model = ((self.reference_build if reference else None) or self.build)()
            randomise(model)
        return model.to(DEVICE, dtype)

    def shared(self) -> nn.Module:
        """One float64 model, gradients cleared, for all tests that leave it as it was: one export."""
        model = _shared(self)
        model.zero_grad()
        return model

    def data(self, batch: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """x [N, *shape] uniform in [0, 1] and labels y [N]; drawn in float32, the same for all dtypes."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()) + 1)
        n = batch or self.batch
        x = torch.rand(n, *self.shape, generator=generator)
        return x.to(DEVICE, dtype), torch.randint(0, CLASSES, (n,), generator=generator).to(DEVICE)


@cache
def _shared(entry: Entry) -> nn.Module:
    return entry.make()


def randomise(model: nn.Module) -> None:
    """Give normalisation layers statistics and affine maps as training would, of mixed signs."""
    for module in model.modules():
        if not hasattr(module, "eps"):
            continue
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name == "weight":
                sign = torch.where(torch.rand(tensor.shape) < 0.3, -1.0, 1.0)
                tensor.data.copy_(sign * (0.5 + torch.rand(tensor.shape)))
            elif name == "bias" or name == "running_mean":
                tensor.data.copy_(0.3 * torch.randn(tensor.shape))
            elif name == "running_var":
                tensor.data.copy_(0.5 + torch.rand(tensor.shape))


class Lambda(nn.Module):
    """A forward function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)

"""The convolutions and matrix products of a network alone: what a step cannot do without, timed and counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.measure import Ceilings
from benchmarks.setting import FORMATS, Setting


@dataclass(frozen=True)
class Passes:
    """How often a step runs each layer: forward, data gradient, weight gradient.

    `images` of the data gradients reach the first layer's input; the others have no use for it.
    """

    forward: int
    data: int
    weight: int
    images: int

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.data + other.data,
            self.weight + other.weight,
            self.images + other.images,
        )

    def __mul__(self, times: int) -> Passes:
        return Passes(self.forward * times, self.data * times, self.weight * times, self.images * times)


@dataclass(frozen=True)
class Call:
    """One convolution or linear layer of the network, on tensors made before."""

    given: Tensor
    weight: Tensor
    cotangent: Tensor
    module: nn.Conv2d | nn.Linear

    @property
    def operations(self) -> int:
        """Multiplications and additions of one pass, whichever it is."""
        return 2 * self.cotangent.numel() * self.weight[0].numel()

    @property
    def bytes(self) -> int:
        """Read and written at least by one pass, whichever it is: two of the three tensors and the third."""
        return sum(t.numel() * t.element_size() for t in (self.given, self.weight, self.cotangent))

    def forward(self) -> Tensor:
        """The layer's output without its bias."""
        if isinstance(self.module, nn.Linear):
            return torch.mm(self.given, self.weight.T)
        return torch.ops.aten.convolution.default(self.given, self.weight, None, *self._options())

    def data(self) -> Tensor:
        """The cotangent of its input."""
        if isinstance(self.module, nn.Linear):
            return torch.mm(self.cotangent, self.weight)
        return self._backward([True, False, False])[0]

    def weights(self) -> Tensor:
        """The gradient of its weight."""
        if isinstance(self.module, nn.Linear):
            return torch.mm(self.cotangent.T, self.given)
        return self._backward([False, True, False])[1]

    def _options(self) -> tuple[object, ...]:
        conv = self.module
        assert isinstance(conv, nn.Conv2d)
        return list(conv.stride), list(conv.padding), list(conv.dilation), False, [0, 0], conv.groups

    def _backward(self, mask: list[bool]) -> tuple[Tensor, ...]:
        operator = torch.ops.aten.convolution_backward.default
        return operator(self.cotangent, self.given, self.weight, None, *self._options(), mask)


def calls_of(setting: Setting, layout: str = "nchw") -> list[Call]:
    """Every convolution and linear layer that a forward runs, in order, on random tensors."""
    model, x, _ = setting.make(layout)
    calls: list[Call] = []

    def ordered(t: Tensor) -> Tensor:
        if t.dim() == 4:
            return t.contiguous(memory_format=FORMATS[layout])
        return t.reshape(-1, t.shape[-1]).contiguous()

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, (nn.Conv2d, nn.Linear))
        given, cotangent = (ordered(torch.randn_like(t, dtype=setting.dtype)) for t in (args[0], output))
        calls.append(Call(given, ordered(module.weight.detach().to(setting.dtype)), cotangent, module))

    hooks = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return calls


def alone(setting: Setting, layout: str, passes: Passes) -> Callable[[], None]:
    """A step that runs these products and nothing else."""
    calls = calls_of(setting, layout)

    def step() -> None:
        with torch.no_grad():
            for place, call in enumerate(calls):
                for _ in range(passes.forward):
                    call.forward()
                for _ in range(passes.data if place else passes.images):
                    call.data()
                for _ in range(passes.weight):
                    call.weights()

    return step


def roofline(setting: Setting, passes: Passes, ceilings: Ceilings) -> dict[str, float]:
    """What the products cost at least: operations, bytes, and the seconds of the slower of the two, layer by layer.

    Arithmetic at the best measured rate of a matrix product or a convolution, memory at that of a large copy.
    """
    operations = moved = seconds = 0.0
    rate = max(ceilings["matmul"], ceilings["convolution"])
    for place, call in enumerate(calls_of(setting.with_(batch=1))):
        count = passes.forward + passes.weight + (passes.data if place else passes.images)
        weight = call.weight.numel() * call.weight.element_size()
        each_operations = setting.batch * call.operations
        each_bytes = setting.batch * (call.bytes - weight) + weight
        operations += count * each_operations
        moved += count * each_bytes
        seconds += count * max(each_operations / rate, each_bytes / ceilings["copy"])
    return {"operations": operations, "bytes": moved, "seconds": seconds}

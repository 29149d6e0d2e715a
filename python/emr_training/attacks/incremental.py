"""A convolutional network's logits after a small window of its input has changed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emr_kernels.linearize.graph import Graph, Node, Ref, resolve
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.rules.flattened import by_pixels
from emr_kernels.linearize.rules.packed import PackedConvolution
from emr_kernels.linearize.rules.packed import linear as linear_layer
from emr_kernels.ops import read_windows, write_windows

aten = torch.ops.aten
_POINTWISE = {
    aten.relu.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.gelu.default,
    aten.silu.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.hardtanh.default,
    aten.batch_norm.default,
}


@dataclass
class _Layer:
    """A layer whose outputs see a window of its input, and the pointwise ones after it."""

    run: Callable[[Tensor], Tensor]
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    outside: float
    extent: list[int]
    operations: int
    after: list[Callable[[Tensor], Tensor]] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        out = self.run(x)
        for step in self.after:
            out = step(out)
        return out

    def touched(self, size: int, axis: int) -> int:
        """At most so many outputs along an axis see a window of this size."""
        reach = (self.kernel[axis] - 1) * self.dilation[axis]
        return min((size - 1 + reach) // self.stride[axis] + 1, self.extent[axis])

    def first(self, start: Tensor, count: int, axis: int) -> Tensor:
        """The first of `count` outputs that cover all which see a window from `start` [n] on."""
        reach, stride = (self.kernel[axis] - 1) * self.dilation[axis], self.stride[axis]
        first = (start + self.padding[axis] - reach + stride - 1).div(stride, rounding_mode="floor")
        return first.clamp(0, self.extent[axis] - count)

    def seen(self, count: int, axis: int) -> int:
        """So many inputs along an axis do `count` outputs see."""
        return (count - 1) * self.stride[axis] + (self.kernel[axis] - 1) * self.dilation[axis] + 1


class Incremental:
    """The logits of n images, kept up to date while windows of them change.

    The network's first layers up to the first one that looks at more than a neighbourhood, or at two values, are kept
    with what they hold for each image; a change is carried through them only where it can be seen, and each value that
    it reaches is computed anew from its inputs, so that no error builds up. What follows is run as a whole. The
    results are the network's own but for rounding.
    """

    def __init__(self, program: Program, model: nn.Module, layers: list[_Layer], rest: list[Node], last: int) -> None:
        self._program, self._model = program, model
        self._layers, self._rest, self._last = layers, rest, last
        self._total = sum(_operations(node, program.graph) for node in program.graph.body)
        self._linear = self._linear_of(program.bind(model, 1))
        self._held: list[Tensor] = []
        self._changed: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rows = torch.empty(0)

    @classmethod
    def of(cls, program: Program, model: nn.Module, batch: int) -> Incremental | None:
        """For batches of up to `batch` images; None where the network does not begin with such layers."""
        graph = program.graph
        values = program.bind(model, batch)
        readers = Counter(ref for node in graph.body for ref in node.refs())
        layers: list[_Layer] = []
        last, place = graph.input, 0
        for place, node in enumerate(graph.body):  # noqa: B007
            if readers[last] != 1 or node.args[:1] != (Ref(last),):
                break
            if node.target in _POINTWISE and layers and not _trains(node):
                layers[-1].after.append(_applied(node, values))
            else:
                layer = _windowed(node, values, graph)
                if layer is None:
                    break
                layers.append(layer)
            last = node.index
        return cls(program, model, layers, graph.body[place:], last) if layers and last != graph.output else None

    def pays(self, height: int, width: int) -> bool:
        """Whether a change of a window of this size spares at least 40% of the network's arithmetic."""
        spared = 0.0
        for layer in self._layers:
            height, width = layer.touched(height, 0), layer.touched(width, 1)
            spared += layer.operations * (1 - height * width / math.prod(layer.extent))
        return spared > 0.4 * self._total

    def begin(self, x: Tensor) -> None:
        """Hold images x [n, C, H, W]."""
        self._held = []
        for layer in self._layers:
            (down, across) = layer.padding
            padded = F.pad(x, (across, across, down, down), value=layer.outside)
            self._held.append(padded.permute(0, 2, 3, 1).contiguous())
            x = layer(self._held[-1].permute(0, 3, 1, 2))
        self._held.append(x.permute(0, 2, 3, 1).contiguous())

    def keep(self, stays: Tensor) -> None:
        """Drop all images but these (indices)."""
        self._held = [held[stays] for held in self._held]

    def change(self, rows: Tensor, top: Tensor, left: Tensor, window: Tensor) -> Tensor:
        """Logits [m, classes] after the images `rows` [m] got window [m, C, h, w] at top, left [m]."""
        self._rows, self._changed = rows, []
        patch = window.permute(0, 2, 3, 1)
        for level, layer in enumerate(self._layers):
            size = patch.shape[1:3]
            self._write(level, top + layer.padding[0], left + layer.padding[1], patch)
            counts = [layer.touched(size[axis], axis) for axis in (0, 1)]
            top, left = layer.first(top, counts[0], 0), layer.first(left, counts[1], 1)
            seen = [layer.seen(counts[axis], axis) for axis in (0, 1)]
            corner = top * layer.stride[0], left * layer.stride[1]
            inputs = read_windows(self._held[level], rows, *corner, *seen)
            patch = layer(inputs.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        self._write(len(self._layers), top, left, patch)
        held = self._held[-1]
        if self._linear is not None and 2 * len(rows) > len(held):
            # Products with all rows cost less than a copy of some.
            return self._finished(held)[rows]
        return self._finished(held if len(rows) == len(held) else held[rows])

    def settle(self, accepted: Tensor) -> None:
        """Keep the last change in those of its rows that are `accepted` [m], undo it in the others."""
        undone = ~accepted
        for held, (top, left, old) in zip(self._held, self._changed, strict=True):
            write_windows(held, self._rows, top, left, old, undone)

    def _write(self, level: int, top: Tensor, left: Tensor, patch: Tensor) -> None:
        held = self._held[level]
        self._changed.append((top, left, read_windows(held, self._rows, top, left, *patch.shape[1:3])))
        write_windows(held, self._rows, top, left, patch)

    def _linear_of(self, values: list[Any]) -> Callable[[Tensor], Tensor] | None:
        """A linear layer on the flattened images that comes next, for images in the order in which they are held."""
        if len(self._rest) < 2 or not self._flattens:
            return None
        flat, linear = self._rest[:2]
        readers = Counter(ref for node in self._rest for ref in node.refs())
        channels, height, width = (size or 0 for size in self._program.graph.shapes[self._last][1:])
        if linear.target is not aten.linear.default or linear.args[0] != Ref(flat.index) or readers[flat.index] != 1:
            return None
        weight: Tensor = resolve(linear.args[1:2], values)[0]
        ordered = by_pixels(weight, (channels, height, width))
        (bias,) = resolve(linear.args[2:], values) if len(linear.args) > 2 else (None,)
        return lambda x: linear_layer(x, ordered, bias)

    @property
    def _flattens(self) -> bool:
        node = self._rest[0]
        return node.target is aten.flatten.using_ints and node.args == (Ref(self._last), 1, -1)

    def _finished(self, held: Tensor) -> Tensor:
        """The rest of the network."""
        values, rest = self._program.bind(self._model, len(held)), self._rest
        if self._linear is None:
            values[self._last] = held.permute(0, 3, 1, 2)
        else:
            values[rest[1].index] = self._linear(held.flatten(1))
            rest = rest[2:]
        for node in rest:
            values[node.index] = node.call(*resolve(node.args, values))
        logits: Tensor = values[self._program.graph.output]
        return logits


def _trains(node: Node) -> bool:
    return node.target is aten.batch_norm.default and bool(node.args[5])


def _applied(node: Node, values: list[Any]) -> Callable[[Tensor], Tensor]:
    rest = resolve(node.args[1:], values)
    return lambda x: node.call(x, *rest)


def _pair(argument: Any) -> list[int]:
    return [argument[0], argument[-1]] if isinstance(argument, (list, tuple)) else [argument, argument]


def _windowed(node: Node, values: list[Any], graph: Graph) -> _Layer | None:
    """The layer, if it is a convolution or a maximum over windows."""
    shape = graph.shapes.get(node.index, ())
    extent = [size or 0 for size in shape[2:]]
    if len(extent) != 2 or 0 in extent:
        return None
    if node.target is aten.conv2d.default:
        weight, bias, stride, padding, dilation, groups = resolve(node.args[1:], values)
        if not isinstance(padding, (list, tuple)):
            return None
        stride, dilation = _pair(stride), _pair(dilation)
        run = _convolution(weight, bias, stride, dilation, groups)
        kernel = list(weight.shape[2:])
        return _Layer(run, kernel, stride, _pair(padding), dilation, 0.0, extent, _operations(node, graph))
    if node.target is aten.max_pool2d.default and not node.args[5]:
        kernel, stride, padding, dilation = (_pair(argument) if argument else [] for argument in node.args[1:5])
        stride = stride or kernel
        run = _maximum(kernel, stride, dilation)
        return _Layer(run, kernel, stride, padding, dilation, -math.inf, extent, 0)
    return None


def _convolution(
    weight: Tensor, bias: Tensor | None, stride: list[int], dilation: list[int], groups: int
) -> Callable[[Tensor], Tensor]:
    weight = weight.contiguous(memory_format=torch.channels_last)
    packed = PackedConvolution.of(weight, weight, bias, (stride, [0, 0], dilation, False, [0, 0], groups))
    if packed is not None:
        return packed.forward
    return lambda x: F.conv2d(x, weight, bias, stride, 0, dilation, groups)


def _maximum(kernel: list[int], stride: list[int], dilation: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda x: F.max_pool2d(x, kernel, stride, 0, dilation)


def _operations(node: Node, graph: Graph) -> int:
    """Multiplications for one image in a convolution or a linear layer, as the shapes tell; 0 for others."""
    if node.target not in (aten.conv2d.default, aten.linear.default, aten.addmm.default, aten.convolution.default):
        return 0
    outputs = math.prod(size or 1 for size in graph.shapes.get(node.index, ())[1:])
    place = 2 if node.target is aten.addmm.default else 1
    weight = node.args[place]
    shape = graph.shapes.get(weight.index, ()) if isinstance(weight, Ref) else ()
    inner = math.prod(size or 1 for size in shape[1:])
    return outputs * inner

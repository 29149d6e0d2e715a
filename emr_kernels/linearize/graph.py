"""The graph that the engine runs: a flat list of operator calls over numbered values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Ref:
    """Stands in an argument list for the value with this number."""

    index: int


@dataclass
class Node:
    """One operator call.

    Attributes:
        index: number of the value that the call writes.
        name: name in the exported graph, for messages.
        target: an ATen overload, or a plain Python callable.
        args: all arguments in the schema's order, defaults filled in; a `Ref` stands for each value.
        active: the values among `args` that carry a derivative through the forward, one entry an occurrence.
        weights: the values among `args` that are leaves (parameters, or tensors computed from parameters alone).
        modules: names of the modules that the call ran in, outermost first.
        is_complex: whether it reads or writes complex numbers, whose derivatives are left to autograd.
    """

    index: int
    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    active: tuple[int, ...] = ()
    weights: tuple[int, ...] = ()
    modules: tuple[str, ...] = ()
    is_complex: bool = False

    def __post_init__(self) -> None:
        schema = getattr(self.target, "_schema", None)
        keyword_only = [a.name for a in schema.arguments if a.kwarg_only] if schema is not None else []
        self._keywords = tuple(keyword_only)

    def call(self, *args: Any) -> Any:
        """The operator on these arguments, in the order of `args`."""
        if not self._keywords:
            return self.target(*args)
        positional = len(args) - len(self._keywords)
        return self.target(*args[:positional], **dict(zip(self._keywords, args[positional:], strict=True)))

    def refs(self) -> Iterator[int]:
        """Every value that the call reads, in order of appearance."""
        for leaf in flatten(self.args):
            if isinstance(leaf, Ref):
                yield leaf.index

    def is_active(self, position: int) -> bool:
        """Whether argument number `position` is a value that carries a derivative."""
        arg = self.args[position]
        return isinstance(arg, Ref) and arg.index in self.active

    def is_weight(self, position: int) -> bool:
        """Whether argument number `position` is a leaf."""
        arg = self.args[position]
        return isinstance(arg, Ref) and arg.index in self.weights


@dataclass(frozen=True)
class Binding:
    """A value that is looked up on the live model at every call.

    `constant` is used where the model has no attribute of that name (a tensor literal written in `forward`).
    """

    index: int
    name: str
    constant: torch.Tensor | None = None


@dataclass
class Graph:
    """A classifier's evaluation-mode forward.

    Attributes:
        size: how many values there are.
        input: number of the value that is x; `output`: that of the logits.
        bindings: parameters, buffers and constants.
        extents: values that are whole numbers computed from the batch size.
        prologue: calls that read neither x nor anything computed from it; they run under autograd.
        body: the other calls, in order.
        leaves: values without x in them through which a parameter reaches the body.
        shapes: the shape of every tensor value for the exported batch (a batch-dependent extent is None).
        written: buffers that the live forward changes; the engine does not.
        batches: smallest and largest batch that the graph serves.
    """

    size: int
    input: int
    output: int
    bindings: list[Binding]
    extents: dict[int, Callable[[int], int]]
    prologue: list[Node]
    body: list[Node]
    leaves: tuple[int, ...]
    batches: tuple[int, int] = (1, 1)
    shapes: dict[int, tuple[int | None, ...]] = field(default_factory=dict)
    written: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """C, the width of the logits."""
        return self.shapes[self.output][1] or 0

    def serves(self, batch: int) -> bool:
        """Whether the graph holds for this many samples."""
        return self.batches[0] <= batch <= self.batches[1]

    def input_of(self, name: str) -> int:
        """The value that the module of this name takes as its input.

        Raises:
            ValueError: if no such module runs in the forward, or its input is not one differentiable tensor.
        """
        inside = [node for node in self.body if name in node.modules]
        if not inside:
            known = sorted({module for node in self.body for module in node.modules if module})
            raise ValueError(
                f"layers: {name!r} is not a module that runs in the model's forward; expected 'input' or one of {known}"
            )
        if any(f"{name}@" in module for node in self.body for module in node.modules):
            raise ValueError(f"layers: {name!r} runs more than once, so that it has no single input")
        made = {node.index for node in inside}
        entering = {ref for node in inside for ref in node.active if ref not in made}
        if len(entering) != 1:
            raise ValueError(f"layers: {name!r} takes {len(entering)} differentiable inputs; expected one")
        index = entering.pop()
        shape = self.shapes.get(index, (None,))
        if self.batches[1] > self.batches[0] and None in shape and shape[0] is not None:
            raise ValueError(f"layers: {name!r} takes an input whose first dimension is not the batch")
        return index


def flatten(args: Any) -> list[Any]:
    """The leaves of nested tuples, lists and dictionaries, in order."""
    return pytree.tree_leaves(args, is_leaf=lambda leaf: leaf is None)


def resolve(args: tuple[Any, ...], values: list[Any]) -> tuple[Any, ...]:
    """`args` with every `Ref` replaced by its value."""
    return tuple(_resolve(arg, values) for arg in args)


def _resolve(arg: Any, values: list[Any]) -> Any:
    if isinstance(arg, Ref):
        return values[arg.index]
    if isinstance(arg, (list, tuple)):
        return type(arg)(_resolve(item, values) for item in arg)
    return arg

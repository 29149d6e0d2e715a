"""From a live module to a `Graph`: one `torch.export` of the evaluation-mode forward, then bookkeeping."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from warnings import catch_warnings

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node as FxNode
from torch.nn.modules import module as global_hooks

from emr_kernels.linearize.graph import Binding, Graph, Node, Ref, flatten
from emr_kernels.linearize.wrappers import evaluation_mode, plain_kernels, untouched


class UnsupportedModelError(Exception):
    """The model cannot be linearized exactly; the message says why.

    Attributes:
        num_classes: C, the width of its logits.
    """

    def __init__(self, reason: str, num_classes: int = 0) -> None:
        super().__init__(reason)
        self.num_classes = num_classes


def export_graph(model: nn.Module, example: torch.Tensor, evaluation: bool = True) -> Graph:
    """Export `model`.

    Args:
        model: the unwrapped module.
        example: input `[N, ...]`. With N >= 2 the batch extent stays dynamic where the model allows it; with N = 1
            the graph is for single samples only (`torch.export` specialises an extent of 1).
        evaluation: in evaluation mode; otherwise in its present one.

    Raises:
        UnsupportedModelError: if the model cannot be exported, or the exported graph would have other derivatives.
    """
    with evaluation_mode(model) if evaluation else nullcontext():
        program = _export(model, example)
    if any(_mutates(node) for node in program.graph.nodes):
        program = program.run_decompositions({})
    return _Reader(model, program, example).read()


def _export(model: nn.Module, example: torch.Tensor) -> ExportedProgram:
    static = {0: Dim.STATIC}
    attempts: list[Any] = [({0: Dim("batch", min=2)},), ({0: Dim.AUTO},), (static,)]
    if example.shape[0] == 1:
        attempts = [(static,)]
    error: Exception | None = None
    # An input that carries gradient history would be exported as such; the graph does not need it.
    example = example.detach()
    device = example.device.type
    with untouched(model), plain_kernels(device), torch.enable_grad(), catch_warnings(), _own_buffer_hooks():
        warnings.simplefilter("ignore")
        for dynamic_shapes in attempts:
            try:
                return torch.export.export(
                    model, (example,), dynamic_shapes=_named(model, dynamic_shapes), strict=False
                )
            except Exception as caught:  # export raises many kinds of error; each means the same here
                error = error or caught
    message = str(error).strip().splitlines()
    raise UnsupportedModelError(
        f"torch.export failed: {type(error).__name__}: {message[0] if message else ''}"
    ) from error


@contextmanager
def _own_buffer_hooks() -> Iterator[None]:
    """torch 2.11 leaves a hook on the buffers of every module of the process where an export fails."""
    hooks = global_hooks._global_buffer_registration_hooks
    before = set(hooks)
    try:
        yield
    finally:
        for key in hooks.keys() - before:
            del hooks[key]


def _named(model: nn.Module, dynamic_shapes: tuple[Any, ...]) -> Any:
    """`forward(*inputs)` takes its shapes in one more level of nesting."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    if parameters and parameters[0].kind is inspect.Parameter.VAR_POSITIONAL:
        return (dynamic_shapes,)
    return dynamic_shapes


def _mutates(node: FxNode) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _Reader:
    """Turns an exported program into a `Graph`."""

    def __init__(self, model: nn.Module, program: ExportedProgram, example: torch.Tensor) -> None:
        self.model = model
        self.program = program
        self.example = example
        self.index: dict[FxNode, int] = {}
        self.depends: set[int] = set()  # values computed from the data of x
        self.active: set[int] = set()  # values that carry a derivative and are computed in the body
        self.trainable: set[int] = set()  # values without x in them that a parameter reaches
        self.graph = Graph(0, -1, -1, [], {}, [], [], ())

    def read(self) -> Graph:
        nodes = list(self.program.graph.nodes)
        output = self._output(nodes)
        live = _reachable(output)
        for node in live:
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                raise UnsupportedModelError(_region_reason(node.target))
        specs = iter(self.program.graph_signature.input_specs)
        for node in nodes:
            spec = next(specs) if node.op == "placeholder" else None
            if node not in live and not (spec is not None and spec.kind is InputKind.USER_INPUT):
                continue
            self.index[node] = len(self.index)
            if spec is not None:
                self._read_input(node, spec)
            elif node.op == "call_function":
                self._read_call(node)
            else:
                raise UnsupportedModelError(f"the exported graph holds a {node.op} node ({node.target})")
        graph = self.graph
        graph.size = len(self.index)
        outputs = self.program.graph_signature.output_specs
        graph.written = tuple(str(spec.target) for spec in outputs if spec.kind is OutputKind.BUFFER_MUTATION)
        graph.output = self.index[output]
        used = {ref for node in graph.body for ref in node.weights}
        graph.leaves = tuple(sorted(used))
        for node, index in self.index.items():
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor):
                graph.shapes[index] = tuple(s if isinstance(s, int) else None for s in value.shape)
        graph.batches = self._batches()
        return graph

    def _batches(self) -> tuple[int, int]:
        """The batch extents that export proved the graph for."""
        extent = self._batch_extent()
        if isinstance(extent, torch.SymInt) and extent.node.expr.is_symbol:
            limits = self.program.range_constraints.get(extent.node.expr)
            if limits is not None:
                upper = int(limits.upper) if limits.upper.is_Integer else sys.maxsize
                return max(2, int(limits.lower)), upper
        return self.example.shape[0], self.example.shape[0]

    def _batch_extent(self) -> int | torch.SymInt:
        placeholder = next(node for node, index in self.index.items() if index == self.graph.input)
        return placeholder.meta["val"].shape[0]

    def _output(self, nodes: list[FxNode]) -> FxNode:
        specs = self.program.graph_signature.output_specs
        wanted = [s.arg.name for s in specs if s.kind is OutputKind.USER_OUTPUT]
        by_name = {node.name: node for node in nodes}
        logits = by_name.get(wanted[0]) if wanted and isinstance(wanted[0], str) else None
        if logits is None or len(wanted) != 1:
            raise UnsupportedModelError(f"the model returns {len(wanted)} values, not one tensor of logits")
        return logits

    def _read_input(self, node: FxNode, spec: Any) -> None:
        index = self.index[node]
        if spec.kind is InputKind.USER_INPUT:
            self.graph.input = index
            self.depends.add(index)
            self.active.add(index)
            return
        constant = None
        if spec.kind is InputKind.CONSTANT_TENSOR:
            constant = self.program.constants[spec.target]
        elif spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER):
            raise UnsupportedModelError(f"the exported graph takes an input of kind {spec.kind.name}")
        self.graph.bindings.append(Binding(index, spec.target, constant))
        if _is_float(node.meta["val"]):
            # Buffers and plain tensors may require grad too (a user's own choice); frozen ones drop out at run time.
            self.trainable.add(index)

    def _read_call(self, node: FxNode) -> None:
        index = self.index[node]
        value = node.meta.get("val")
        if isinstance(value, (int, torch.SymInt)):
            extent = self._extent(value)
            if extent is not None:
                self.graph.extents[index] = extent
                return
        target = node.target
        if _draws(node):
            raise UnsupportedModelError(f"forward draws random numbers ({target}) in evaluation mode")
        assert callable(target)
        call = Node(index, node.name, target, self._arguments(node), modules=_modules(node))
        call.is_complex = any(_is_complex(n.meta.get("val")) for n in (node, *node.all_input_nodes))
        refs = list(call.refs())
        if not any(ref in self.depends for ref in refs):
            if any(ref in self.trainable for ref in refs) and _is_float(value):
                self.trainable.add(index)
            self.graph.prologue.append(call)
            return
        self.depends.add(index)
        if target in _STOPS or not _is_float(value):
            self.graph.body.append(call)
            return
        call.active = tuple(ref for ref in refs if ref in self.active)
        call.weights = tuple(ref for ref in refs if ref in self.trainable)
        if call.active or call.weights:
            self.active.add(index)
        self.graph.body.append(call)

    def _extent(self, value: int | torch.SymInt) -> Callable[[int], int] | None:
        if isinstance(value, int):
            return lambda batch, fixed=value: fixed  # type: ignore[misc]
        expression = value.node.expr
        symbols = expression.free_symbols
        if not symbols:
            return lambda batch, fixed=int(expression): fixed  # type: ignore[misc]
        batch_symbol = self._batch_extent()
        if not isinstance(batch_symbol, torch.SymInt) or symbols != batch_symbol.node.expr.free_symbols:
            return None
        (symbol,) = symbols
        known: dict[int, int] = {}

        def extent(batch: int) -> int:
            if batch not in known:
                known[batch] = int(expression.subs({symbol: batch}))
            return known[batch]

        return extent

    def _arguments(self, node: FxNode) -> tuple[Any, ...]:
        """Positional arguments, completed from the schema, so that a rule can unpack them."""
        args = list(node.args)
        if isinstance(node.target, torch._ops.OpOverload):
            for argument in node.target._schema.arguments[len(args) :]:
                args.append(node.kwargs.get(argument.name, argument.default_value))
        elif node.kwargs:
            raise UnsupportedModelError(f"{node.target} is called with keyword arguments")
        return tuple(self._convert(arg) for arg in args)

    def _convert(self, arg: Any) -> Any:
        if isinstance(arg, FxNode):
            return Ref(self.index[arg])
        if isinstance(arg, (list, tuple)):
            return (
                type(arg)(self._convert(item) for item in arg)
                if type(arg) in (list, tuple)
                else [self._convert(item) for item in arg]
            )
        if isinstance(arg, torch.SymInt):
            raise UnsupportedModelError("the exported graph holds a symbolic extent that no value carries")
        return arg


_STOPS = {torch.ops.aten.detach.default}


def _reachable(output: FxNode) -> set[FxNode]:
    seen: set[FxNode] = set()
    stack = [output]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(node.all_input_nodes)
    return seen


def _is_float(value: Any) -> bool:
    """Whether a value can carry a derivative; operators with several outputs are judged by any of them."""
    return any(
        isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex()) for leaf in flatten(value)
    )


def _is_complex(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in flatten(value))


def _modules(node: FxNode) -> tuple[str, ...]:
    stack = node.meta.get("nn_module_stack") or {}
    names = []
    for key, entry in stack.items():
        name = entry[0] if isinstance(entry, tuple) else str(entry)
        # A module's second call is "name@1".
        _, mark, call = str(key).partition("@")
        names.append(f"{name}{mark}{call}")
    return tuple(names)


def _draws(node: FxNode) -> bool:
    """Whether an operator draws random numbers; in evaluation mode, or with probability zero, it may draw none."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    schema = target._schema.arguments
    given = {a.name: a.default_value for a in schema}
    given |= dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    if any(given.get(name) is False for name in ("train", "training")):
        return False
    return not any(given.get(name) == 0.0 for name in ("p", "dropout_p", "dropout"))


def _region_reason(target: Any) -> str:
    name = str(target)
    if "set_grad_enabled" in name:
        return "forward switches gradients off or on inside (torch.no_grad or torch.enable_grad)"
    if "autocast" in name:
        return "forward opens its own autocast region"
    return f"forward holds a region that has no derivative rule ({name})"

"""One export for each model and input shape, kept as long as the model lives and stays what it was."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from emr_kernels.linearize.export import UnsupportedModelError, export_graph
from emr_kernels.linearize.graph import Graph
from emr_kernels.linearize.program import Program
from emr_kernels.linearize.sharing import difference, hooked, modes
from emr_kernels.linearize.verify import find_mismatch, probe
from emr_kernels.linearize.wrappers import ordinary

INPUT = "input"


@dataclass
class _Prepared:
    """A graph that passed the first-call check, or the reason why there is none."""

    graph: Graph | None
    num_classes: int
    reason: str = ""
    batches: tuple[int, int] = (1, 1)
    programs: dict[tuple[str, ...], Program] = field(default_factory=dict)

    def serves(self, batch: int) -> bool:
        return self.batches[0] <= batch <= self.batches[1]


@dataclass
class _Entry:
    fingerprint: Any
    prepared: dict[Any, list[_Prepared]] = field(default_factory=dict)
    differences: dict[Any, str | None] = field(default_factory=dict)


_ENTRIES: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()


def fingerprint(model: nn.Module) -> Any:
    """What a change of structure shows in: the module tree, and every tensor's identity, shape, dtype and device.

    PyTorch's own modules show their options (an eps, a stride) in `extra_repr`; a user's module may put anything there.
    Changed values (an optimizer step, `load_state_dict`) leave it as it is.
    """
    modules = tuple(
        (name, weakref.ref(module), module.extra_repr() if type(module).__module__.startswith("torch.nn.") else "")
        for name, module in model.named_modules(remove_duplicate=False)
    )
    tensors: list[Any] = []
    for module in model.modules():
        for group in (module._parameters, module._buffers):
            for name, tensor in group.items():
                if tensor is not None:
                    # A buffer may be rebound at every forward; a parameter that changes places may change ties.
                    identity = id(tensor) if group is module._parameters else None
                    tensors.append((name, identity, tensor.shape, tensor.dtype, tensor.device))
    return modules, tuple(tensors)


def find_program(model: nn.Module, x: torch.Tensor, layers: tuple[str, ...] = (INPUT,)) -> Program:
    """The checked program for this model and this kind of input, exported now if there is none yet.

    Args:
        model: the unwrapped module.
        x: `[N, ...]`.
        layers: where cotangents are wanted: "input", or names of modules (their input).

    Raises:
        UnsupportedModelError: if the engine cannot serve the model; the message says why.
        ValueError: if a layer does not name a module with one differentiable input.
    """
    x = _in_model_dtype(model, x)
    present = fingerprint(model)
    entry = _ENTRIES.get(model)
    if entry is None or entry.fingerprint != present:
        entry = _ENTRIES[model] = _Entry(present)
    kind = (x.shape[1:], x.dtype, x.device)
    known = entry.prepared.setdefault(kind, [])
    batch = x.shape[0]
    prepared = next((p for p in known if p.serves(batch)), None)
    if prepared is None:
        prepared = _prepare(model, x)
        known.append(prepared)
    if prepared.graph is None:
        raise UnsupportedModelError(prepared.reason, prepared.num_classes)
    if layers not in prepared.programs:
        graph = prepared.graph
        taps = [graph.input if layer == INPUT else graph.input_of(layer) for layer in layers]
        prepared.programs[layers] = Program(graph, taps)
    return prepared.programs[layers]


def mode_difference(model: nn.Module, program: Program, x: torch.Tensor) -> str | None:
    """Why the model in its present mode is another function than its program; None if it is the same.

    Args:
        model: the unwrapped module.
        program: from `find_program` for this model and x.
        x: `[N, ...]`.
    """
    if hooked(model):
        return "it has hooks"
    entry = _ENTRIES[model]
    key = (modes(model), id(program.graph))
    if key not in entry.differences:
        with torch.inference_mode(False):
            x = ordinary(_in_model_dtype(model, x).detach())
            entry.differences[key] = difference(model, program, x)
    return entry.differences[key]


def _in_model_dtype(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """x as the model takes it without autocast, which is how it is exported."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    if not torch.is_autocast_enabled(x.device.type) or not dtypes or x.dtype in dtypes:
        return x
    return x.to(dtypes[0])


def forget(model: nn.Module) -> None:
    """Drop what is kept for the model, so that the next call exports it again."""
    _ENTRIES.pop(model, None)


def _prepare(model: nn.Module, x: torch.Tensor) -> _Prepared:
    with torch.inference_mode(False):
        x = ordinary(x.detach())
        num_classes = probe(model, x)
        try:
            graph = export_graph(model, x)
        except UnsupportedModelError as error:
            batches = (1, 1) if x.shape[0] == 1 else (2, sys.maxsize)
            return _Prepared(None, num_classes, str(error), batches)
        program = Program(graph, [graph.input])
        try:
            mismatch = find_mismatch(model, program, x[:2] if graph.serves(2) else x)
        except Exception as error:  # an operator that runs in the model need not run on its own
            mismatch = f"running it raised {type(error).__name__}: {str(error).strip().splitlines()[0]}"
        if mismatch is not None:
            reason = f"the exported program is not exact: {mismatch}"
            return _Prepared(None, num_classes, reason, graph.batches)
        return _Prepared(graph, num_classes, "", graph.batches, {(INPUT,): program})
